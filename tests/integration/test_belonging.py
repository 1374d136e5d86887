"""What a session or state belongs to: every file of a split model, and the adapter with its scale."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import gguf
import pytest
from models import write_lora

import tqgguf
from tqgguf.demo import model as demo

pytestmark = pytest.mark.model

TOKENS = list(range(5, 105))


def load(path: Path = demo.MODEL_PATH, **options: Any) -> Any:
    return contextlib.closing(tqgguf.Llama(path, cache="pqo3", n_ctx=512, n_threads=1, verbose=False, **options))


def split(path: Path, folder: Path) -> list[Path]:
    """Writes a model as two files."""
    reader = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(folder / "split.gguf", arch, split_max_tensors=len(reader.tensors) // 2 + 1)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    with contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return sorted(folder.glob("split-*.gguf"))


def refused(model: Any, session: Path, state: Any, said: str) -> None:
    with pytest.raises(tqgguf.SessionError, match=said):
        model.load_session(session)
    with pytest.raises(tqgguf.StateFileError, match=said):
        model.load_state(state)
    assert model.n_tokens == 0


def taken(model: Any, session: Path, state: Any) -> None:
    for restore in (lambda: model.load_session(session), lambda: model.load_state(state)):
        restore()
        assert model.input_ids[: model.n_tokens].tolist() == TOKENS
        model.reset()


def test_every_part_of_a_split_model_counts(tmp_path: Path) -> None:
    first, second = split(demo.MODEL_PATH, tmp_path)
    session = tmp_path / "s"
    with load(first) as model:
        model.eval(TOKENS)
        model.save_session(session)
        state = model.save_state()
    with load(first) as model:
        taken(model, session, state)
    data = bytearray(second.read_bytes())
    data[-5000] ^= 4
    second.write_bytes(data)
    with load(first) as model:
        refused(model, session, state, "another model")


def test_an_adapter_and_its_scale_count(tmp_path: Path) -> None:
    lora, session = write_lora(tmp_path / "lora.gguf"), tmp_path / "s"
    with load(lora_path=str(lora), lora_scale=0.5) as model:
        model.eval(TOKENS)
        model.save_session(session)
        state = model.save_state()
    with load(lora_path=str(lora), lora_scale=0.5) as model:
        taken(model, session, state)
    for options in ({"lora_path": str(lora), "lora_scale": 0.25}, {"lora_path": str(lora)}, {}):
        with load(**options) as model:
            refused(model, session, state, "lora")
    write_lora(lora, seed=1)  # of the same name and size
    with load(lora_path=str(lora), lora_scale=0.5) as model:
        refused(model, session, state, "lora_identity|of another adapter")
