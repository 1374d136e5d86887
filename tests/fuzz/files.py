"""Fuzz targets for what reads files in Python: GGUF headers, policies, sessions, states of llama.cpp.

A target takes any bytes and a file to put them in, and raises nothing but what the reader promises for a bad file.
`make fuzz` runs them under atheris (`drive.py`); `test_replay.py` replays saved inputs.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tqgguf.cache.policy import read_policy
from tqgguf.config import CACHE_TYPES
from tqgguf.errors import ModelFileError, PolicyError, SessionError, StateFileError, UnsupportedError
from tqgguf.gguf.header import read_header
from tqgguf.gguf.info import KVLayer, ModelInfo, read_model_info
from tqgguf.session.file import Session, read_session
from tqgguf.session.state import read_state


def shape(*layers: KVLayer, mla: bool = False, notes: tuple[str, ...] = ()) -> ModelInfo:
    """A model that states are read for."""
    return ModelInfo(Path("m.gguf"), 0, 0, "m", "llama", len(layers), 512, 64, 2, layers, mla, True, None, None, notes)


MODELS: Final = (
    shape(KVLayer(0, 1, 32, 32), KVLayer(1, 1, 32, 32)),
    shape(KVLayer(0, 1, 32, 32), KVLayer(1, 2, 64, 32, window=48)),
    shape(KVLayer(0, 1, 64, 0), mla=True),
    shape(KVLayer(0, 1, 32, 32), notes=("hybrid: the other layers keep a recurrent state",)),
)


def gguf(data: bytes, file: Path) -> None:
    file.write_bytes(data)
    try:
        header = read_header(file)
        assert 0 < header.header_bytes <= len(data) and all(t.begin + t.bytes <= len(data) for t in header.tensors)
        info = read_model_info(file)
    except ModelFileError:
        return
    assert info.name.isprintable() and info.architecture.isprintable()
    assert len(info.layers) <= info.n_layer <= 512
    for kind in CACHE_TYPES.values():
        if info.obstacle(kind, kind) is None:
            assert info.cache_bytes(4096, kind, kind) >= 0


def policy(data: bytes, file: Path) -> None:
    file.write_bytes(data)
    try:
        found = read_policy(file)
    except PolicyError:
        return
    assert len(found.types_k) == len(found.types_v) == found.n_layer and {*found.types_k, *found.types_v} <= {
        *CACHE_TYPES
    }
    vectors = (*found.k_means.values(), *found.k_gains.values())
    assert sum(values.nbytes for values in vectors) <= len(data)
    for model in MODELS:
        assert found.obstacle(model) is None or found.obstacle(model)


def session(data: bytes, file: Path) -> None:
    """The first byte says whether the others are the file, or a header to be given right checksums."""
    if data[:1] < b"\x80":
        file.write_bytes(data[1:])
    else:
        n = int.from_bytes(data[1:3], "little")
        header, rest = data[3 : 3 + n], data[3 + n :]
        head = struct.pack("<8sII32s", b"tqgguf\x00S", 1, len(header), hashlib.sha256(header).digest())
        file.write_bytes(head + header + rest)
    try:
        found = read_session(file)
    except SessionError:
        return
    assert isinstance(found, Session) and 4 * found.n_tokens + found.n_state_bytes < len(data)
    assert all(isinstance(name, str) for name in (*found.types_k, *found.types_v))


def state(data: bytes, file: Path) -> None:
    """The first byte chooses the model."""
    model = MODELS[data[0] % len(MODELS)] if data else MODELS[0]
    file.write_bytes(data[1:])
    try:
        found = read_state(file, model)
    except (StateFileError, UnsupportedError):
        return
    assert sum(tensor.rows.nbytes for tensor in found.tensors) <= len(data)
    for tensor in found.tensors:
        width = tensor.head_dim * tensor.layer.n_head_kv
        assert tensor.rows.shape[1] == tensor.type.row_bytes(width)


TARGETS: Final[dict[str, Callable[[bytes, Path], None]]] = {
    target.__name__: target for target in (gguf, policy, session, state)
}
