"""What a GGUF header says about the KV cache: defaults, per-layer values, windows, latents, and damaged files."""

from __future__ import annotations

import contextlib
import re
import struct
from pathlib import Path
from typing import Any

import pytest

from tqgguf.config import CACHE_TYPES
from tqgguf.demo import model as demo
from tqgguf.errors import ArgumentError, ModelFileError
from tqgguf.gguf import architectures
from tqgguf.gguf import info as gguf_info
from tqgguf.gguf.header import LONGEST_ARRAY, read_header

F16, PQO3, Q8 = (CACHE_TYPES[name] for name in ("f16", "pqo3", "q8_0"))

BASE = {"context_length": 4096, "embedding_length": 1024, "block_count": 6, "attention.head_count": 16}


def header(path: Path, arch: str = "llama", keys: dict[str, Any] | None = None, **plain: Any) -> Path:
    """Writes a GGUF without tensors. Keys are those of the architecture; None leaves one out."""
    out = bytearray()
    items = {"general.architecture": arch, **plain}
    items.update({f"{arch}.{key}": value for key, value in {**BASE, **(keys or {})}.items() if value is not None})

    def text(value: str) -> bytes:
        data = value.encode()
        return struct.pack("<Q", len(data)) + data

    for key, value in items.items():
        out += text(key)
        if isinstance(value, bool):
            out += struct.pack("<I?", 7, value)
        elif isinstance(value, int):
            out += struct.pack("<Iq", 11, value) if value < 0 else struct.pack("<II", 4, value)
        elif isinstance(value, float):
            out += struct.pack("<If", 6, value)
        elif isinstance(value, str):
            out += struct.pack("<I", 8) + text(value)
        elif value and isinstance(value[0], bool):
            out += struct.pack(f"<IIQ{len(value)}?", 9, 7, len(value), *value)
        elif value and isinstance(value[0], str):
            out += struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        else:
            out += struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(items)) + bytes(out))
    return path


def read(tmp_path: Path, arch: str = "llama", **keys: Any) -> gguf_info.ModelInfo:
    return gguf_info.read_model_info(
        header(tmp_path / "m.gguf", arch, {k.replace("__", "."): v for k, v in keys.items()})
    )


def test_defaults(tmp_path: Path) -> None:
    info = read(tmp_path)
    assert info.name == "m" and info.exact and info.notes == ()
    assert info.layers == tuple(gguf_info.KVLayer(i, 16, 64, 64) for i in range(6))
    assert info.bytes_per_token(F16, F16) == 6 * 2 * 16 * 64 * 2
    assert info.cache_bytes(1000, PQO3, PQO3) == 1024 * 6 * 2 * 16 * 28
    assert info.obstacle(PQO3, PQO3) is None


def test_grouped_heads_of_their_own_size(tmp_path: Path) -> None:
    info = read(tmp_path, attention__head_count_kv=4, attention__key_length=192, attention__value_length=128)
    assert info.layers[0] == gguf_info.KVLayer(0, 4, 192, 128)


def test_heads_per_layer(tmp_path: Path) -> None:
    info = read(tmp_path, attention__head_count_kv=[2, 4, 0, 2, 4, 0])
    assert [(layer.index, layer.n_head_kv) for layer in info.layers] == [(0, 2), (1, 4), (3, 2), (4, 4)]
    assert any("2 layers" in note for note in info.notes)


@pytest.mark.parametrize(
    ("arch", "keys", "windowed"),
    [
        ("gemma2", {}, [0, 2, 4]),
        ("gemma3", {}, [0, 1, 2, 3, 4]),
        ("smallthinker", {}, [1, 2, 3, 5]),
        ("gpt-oss", {"attention.sliding_window_pattern": 3}, [0, 1, 3, 4]),
        ("gemma4", {"attention.sliding_window_pattern": [True, False] * 3}, [0, 2, 4]),
        ("gemma3", {"attention.sliding_window": 0}, []),
        ("qwen2", {}, []),
        ("phi3", {}, []),
    ],
)
def test_windows(tmp_path: Path, arch: str, keys: dict[str, Any], windowed: list[int]) -> None:
    path = header(tmp_path / "m.gguf", arch, {"attention.sliding_window": 512, **keys})
    info = gguf_info.read_model_info(path)
    assert [layer.index for layer in info.layers if layer.window] == windowed
    assert info.exact
    if windowed:
        layer = info.layers[windowed[0]]
        assert (layer.cells(100), layer.cells(8192), layer.cells(8192, n_ubatch=64)) == (256, 1024, 768)
        assert any("sliding window of 512" in note for note in info.notes)


def test_heads_of_windowed_layers(tmp_path: Path) -> None:
    pattern = [True, False] * 3
    keys = {"sliding_window": 512, "sliding_window_pattern": pattern, "key_length": 512, "key_length_swa": 256}
    info = read(tmp_path, "gemma4", **{f"attention.{key}": value for key, value in keys.items()})
    assert [layer.head_dim_k for layer in info.layers] == [256, 512] * 3


def test_latent_attention_stores_no_v(tmp_path: Path) -> None:
    keys = {"head_count_kv": 1, "key_length": 576, "value_length": 512, "key_length_mla": 192, "value_length_mla": 128}
    info = read(tmp_path, "deepseek2", **{f"attention.{key}": value for key, value in keys.items()})
    assert info.mla and info.layers[0] == gguf_info.KVLayer(0, 1, 576, 0)
    assert info.bytes_per_token(PQO3, PQO3) == 6 * 18 * 14
    assert "cannot differ" in str(info.obstacle(PQO3, F16))


def test_recurrent_and_hybrid_models(tmp_path: Path) -> None:
    mamba = read(tmp_path, "mamba", **{"attention.head_count": None})
    assert mamba.layers == () and "recurrent" in mamba.notes[0]
    assert "no KV cache" in str(mamba.obstacle(PQO3, PQO3)) and mamba.obstacle(F16, F16) is None
    named = read(tmp_path, "qwen35", attention__recurrent_layers=[1, 1, 0, 1, 0, 1])
    assert [layer.index for layer in named.layers] == [2, 4]
    with pytest.raises(ModelFileError, match=r"recurrent_layers has fewer than 6 entries"):
        read(tmp_path, "qwen35", attention__recurrent_layers=[1, 0])
    # In Nemotron-H a layer is attention, a recurrent state, or feed-forward.
    heads, widths = [16, 0, 16, 16, 0, 16], [0, 0, 64, 0, 0, 64]
    one_job = read(tmp_path, "nemotron_h", attention__head_count_kv=heads, feed_forward_length=widths)
    assert [layer.index for layer in one_job.layers] == [0, 3]
    hybrid = read(tmp_path, "qwen3next", full_attention_interval=3)
    assert [layer.index for layer in hybrid.layers] == [2, 5] and "hybrid" in hybrid.notes[0]
    bert = read(tmp_path, "bert")
    assert bert.layers == () and bert.obstacle(PQO3, PQO3)


def test_what_is_not_modelled_says_so(tmp_path: Path) -> None:
    assert not read(tmp_path, "minimax-m3").exact
    unknown = read(tmp_path, "brandnew", **{"attention.sliding_window": 512})
    assert not unknown.exact and "not modelled" in unknown.notes[-1]


def test_shared_and_predicting_layers(tmp_path: Path) -> None:
    info = read(tmp_path, "glm4moe", nextn_predict_layers=1)
    assert len(info.layers) == 5 and "predict" in info.notes[0]


def test_obstacle_names_layer_and_value(tmp_path: Path) -> None:
    info = read(tmp_path, attention__key_length=80, attention__value_length=64)
    assert info.obstacle(PQO3, F16) == "layer 0: head_dim of K is 80, not divisible by 32, the block of pqo3"
    assert "q8_0" in str(info.obstacle(Q8, Q8)) and info.obstacle(F16, PQO3) is None
    with pytest.raises(ArgumentError, match="80"):
        gguf_info.KVLayer(0, 1, 80, 64).bytes_per_token(PQO3, PQO3)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"block_count": None}, "llama.block_count is missing"),
        ({"embedding_length": None}, "embedding_length is missing"),
        ({"context_length": None}, "context_length is missing"),
        ({"attention.head_count": None}, "head_count is missing"),
        ({"attention.head_count": 0}, "head_count is 0"),
        ({"block_count": 0}, "block_count is 0"),
        ({"block_count": 1_000_000}, "block_count is 1000000"),
        ({"block_count": -1}, "block_count is -1"),
        ({"block_count": "six"}, "'six'"),
        ({"attention.head_count_kv": [1, 2]}, "each of 6 layers"),
        ({"attention.key_length": 1.5}, "1.5"),
    ],
)
def test_missing_and_wrong_keys(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelFileError, match=said):
        gguf_info.read_model_info(header(tmp_path / "m.gguf", keys=keys))


def test_a_later_part_of_a_split_model_names_the_first(tmp_path: Path) -> None:
    keys = {"split.no": 1, "split.count": 3}
    path = header(tmp_path / "m-00002-of-00003.gguf", keys={"block_count": None}, **keys)
    with pytest.raises(ModelFileError, match=r"part 2 of 3 of a model: give its first part, m-00001-of-00003\.gguf"):
        gguf_info.read_model_info(path)
    first = header(tmp_path / "m-00001-of-00003.gguf", **{**keys, "split.no": 0})
    assert gguf_info.read_model_info(first).n_layer == 6


def test_files_for_other_purposes(tmp_path: Path) -> None:
    path = header(tmp_path / "m.gguf", "clip")
    with pytest.raises(ModelFileError, match="not a language model"):
        gguf_info.read_model_info(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    with pytest.raises(ModelFileError, match=r"general\.architecture is missing"):
        gguf_info.read_model_info(path)


def test_versions_and_byte_order(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for version, said in ((1, "version 1"), (9, "version 9"), (3 << 24, "big-endian")):
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, 0, 0))
        with pytest.raises(ModelFileError, match=said):
            read_header(path)


def test_every_truncation_and_many_damages_are_told(tmp_path: Path) -> None:
    keys = {"attention.head_count_kv": [1, 2, 3, 4, 5, 6]}
    whole = header(tmp_path / "m.gguf", keys=keys, tokens=["a", "bc"]).read_bytes()
    path = tmp_path / "cut.gguf"
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(ModelFileError):
            gguf_info.read_model_info(path)
    for at in range(4, len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with contextlib.suppress(ModelFileError):
            gguf_info.read_model_info(path)


def test_tensors_beyond_the_end(tmp_path: Path) -> None:
    data = demo.MODEL_PATH.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[:-32])
    with pytest.raises(ModelFileError, match=f"truncated.*{len(data) - 32} bytes"):
        read_header(path)


def test_long_arrays_are_stepped_over(tmp_path: Path) -> None:
    n = LONGEST_ARRAY + 1
    path = header(tmp_path / "m.gguf", tokens=["token"] * n, scores=[1] * n, short=[1, 2])
    metadata = read_header(path).metadata
    assert metadata["tokens"] == range(n) and metadata["scores"] == range(n) and metadata["short"] == [1, 2]


def test_the_demo_model() -> None:
    info = gguf_info.read_model_info(demo.MODEL_PATH)
    assert {(layer.n_head_kv, layer.head_dim_k, layer.head_dim_v) for layer in info.layers} == {(2, 64, 64)}
    assert info.n_head == 4 and info.n_ctx_train >= 2048 and info.exact


def test_a_latent_of_no_width_is_none(tmp_path: Path) -> None:
    # llama.cpp writes the key whenever it saves a model.
    info = read(tmp_path, attention__key_length_mla=0, attention__kv_lora_rank=0)
    assert not info.mla and info.layers[0].head_dim_v == 64 and info.notes == () and info.centring_obstacle is None


def test_every_architecture_named_here_is_one_of_llama_cpps() -> None:
    source = Path(__file__).parents[2] / "build/upstream/llama.cpp/src/llama-arch.cpp"
    if not source.exists():
        pytest.skip("the upstream source is not unpacked")
    known = set(re.findall(r'\{ LLM_ARCH_\w+, *"([^"]+)"', source.read_text()))
    named = {arch for table in architectures.__all__ for arch in getattr(architectures, table)}
    assert len(named) > 50 and named <= known, named - known
