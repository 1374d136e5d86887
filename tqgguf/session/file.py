"""Session files: the tokens a model has read and its KV cache, compressed as it lies in memory, in one file.

All numbers are little-endian::

    0   8  magic
    8   4  version of this layout
    12  4  bytes of the header
    16  32 SHA-256 of the header
    48     header: JSON, what the session belongs to and what follows, with the SHA-256 of all that follows
           tokens: int32 each
           state: llama.cpp's own state of sequence 0 (llama_state_seq_get_data): the cells in use, and the rows of the
           precise tail that belong to them (native/ggml/tq_ggml_tail_state.h)

The checksum is SHA-256 because the standard library has it at 2 GB/s, which no disk that is waited for reaches, and
because 32 bits would let one damaged file in four thousand million pass as whole. It tells accidents, not forgery: a
file that was made to deceive still meets llama.cpp's own checks of every count and type, and ours of every position.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .._native import import_llama_cpp
from .._native.settings import tail_in_states
from .._util import check_folder, write_whole
from ..cache.policy import CachePolicy, model_hash
from ..config import CACHE_TYPES
from ..errors import ArgumentError, OutOfMemoryError, SessionError, StateFileError, UnsupportedError
from ..gguf.info import ModelInfo
from .state import cell_positions

SESSION_VERSION: Final = 2
"""Of the layout above. Version 1 had no rows of the tail, and is read; another one is refused."""

CODEC: Final = 2
"""Of what the bytes of a block mean, and those of a calibrated key; another one is refused."""

LATER: Final = ("model_identity", "rotated", "lora_identity")
"""Settings that sessions saved before they were compared do not have; they are not compared with those."""

_MAGIC: Final = b"tqgguf\x00S"
_HEAD: Final = struct.Struct("<8sII32s")
_LARGEST_HEADER: Final = 1 << 24
"""Bytes. A conversation that fills a context of a million tokens takes a third of it."""


@dataclass(frozen=True)
class Session:
    """What the header of a session file says.

    Attributes:
        model: name of the model, for people.
        model_hash: of the model's file (`tqgguf.cache.policy.model_hash`).
        types_k: names of the cache types of K, of the layers that have a cache.
        types_v: the same for V.
        type_numbers: ggml's number of each of these types.
        k_means: SHA-256 of what the policy does to keys: means, gains, and which layers it rotates; "" if nothing.
        settings: options of the context that change what a cache holds: RoPE, flash attention, LoRA.
        codec: CODEC of the library that wrote the blocks.
        state: version of llama.cpp's state (LLAMA_STATE_SEQ_VERSION).
        n_tokens: tokens in it.
        n_state_bytes: bytes of llama.cpp's state.
        sha256: of tokens and state.
        extra: what the caller of `Llama.save_session` gave to be kept beside it.
        tail: whether the state holds the rows of the precise tail; sessions of version 1 do not.
    """

    model: str
    model_hash: str
    types_k: tuple[str, ...]
    types_v: tuple[str, ...]
    type_numbers: dict[str, int]
    k_means: str
    settings: dict[str, Any]
    codec: int
    state: int
    n_tokens: int
    n_state_bytes: int
    sha256: str
    extra: dict[str, Any]
    tail: bool = False


@dataclass(frozen=True)
class Owner:
    """What a session belongs to.

    Attributes:
        info: of the model.
        policy: types and mean keys of its KV cache.
        settings: see `Session`.
    """

    info: ModelInfo
    policy: CachePolicy
    settings: dict[str, Any]


def read_session(path: str | Path) -> Session:
    """Reads the header of a session file, and checks that the file is as long as the header says.

    Args:
        path: a file that `Llama.save_session` wrote. What is behind the header is not read.

    Raises:
        FileNotFoundError: no such file.
        SessionError: no session or no regular file, of another version, truncated, or a damaged header.
    """
    with _open(path) as file:
        return _read_header(file, Path(path))


def is_session(path: str | Path) -> bool:
    """Whether a file begins as a session does.

    Raises:
        OSError: it cannot be read.
        SessionError: it is no regular file.
    """
    with _open(path) as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read_body(path: str | Path, info: ModelInfo) -> tuple[Session, memoryview]:
    """Header of a session file, and llama.cpp's state in it (as `llama_state_seq_get_data` wrote it); loads no model.

    Raises:
        OutOfMemoryError: no memory to read it into.
        SessionError: see `read_session`; or it is damaged, or was saved with another model.
    """
    with _open(path) as file:
        session = _read_header(file, Path(path))
        _refuse_other_model(session, info, Path(path))
        return session, memoryview(_read_body(file, session, Path(path)))[4 * session.n_tokens :]


def _open(path: str | Path) -> BufferedReader:
    """Opens a file for reading; a pipe would be waited for, perhaps for ever."""
    file = Path(path)
    if file.exists() and not file.is_file():
        raise SessionError(f"cannot read the session {file}: it is no regular file")
    return file.open("rb")


def _read_header(file: BufferedReader, path: Path) -> Session:
    head = file.read(_HEAD.size)
    if head[: len(_MAGIC)] != _MAGIC[: len(head)] or not head:
        raise SessionError(f"{path} is not a session of tqgguf")
    if len(head) < _HEAD.size:
        raise SessionError(f"{path} is truncated: it has {len(head)} bytes, a session has at least {_HEAD.size}")
    _, version, n_header, digest = _HEAD.unpack(head)
    if not 1 <= version <= SESSION_VERSION:
        raise SessionError(
            f"{path} has session version {version}, this tqgguf reads 1 to {SESSION_VERSION}: save it again"
        )
    if n_header > _LARGEST_HEADER:
        raise SessionError(f"{path} is damaged: its header has {n_header:,} bytes, at most {_LARGEST_HEADER:,} can be")
    n_file = os.fstat(file.fileno()).st_size
    if n_file < _HEAD.size + n_header:
        raise SessionError(f"{path} is truncated: it has {n_file:,} bytes, its header alone ends at byte {n_header:,}")
    text = file.read(n_header)
    if hashlib.sha256(text).digest() != digest:
        raise SessionError(f"{path} is damaged: the checksum of its header does not match")
    session = _parse(text, path, version)
    expected = _HEAD.size + n_header + 4 * session.n_tokens + session.n_state_bytes
    if n_file != expected:
        what = "truncated" if n_file < expected else "damaged"
        raise SessionError(f"{path} is {what}: it has {n_file:,} bytes, its header says {expected:,}")
    return session


def _read_body(file: BufferedReader, session: Session, path: Path) -> bytearray:
    """Tokens and state, which follow the header that was just read."""
    n_bytes = 4 * session.n_tokens + session.n_state_bytes  # what the file was found to have
    try:
        body = bytearray(n_bytes)
    except MemoryError:
        raise OutOfMemoryError(f"no memory for the {n_bytes:,} bytes of {path}") from None
    if file.readinto(body) != n_bytes or hashlib.sha256(body).hexdigest() != session.sha256:
        raise SessionError(f"{path} is damaged: the checksum of its contents does not match")
    return body


def _parse(text: bytes, path: Path, version: int) -> Session:
    try:
        data = json.loads(text)
        kinds = {"n_tokens": int, "n_state_bytes": int, "codec": int, "state": int, "settings": dict, "extra": dict}
        kinds |= {"model": str, "model_hash": str, "k_means": str, "sha256": str, "type_numbers": dict}
        kinds |= {"types_k": list, "types_v": list}
        if version > 1:
            kinds["tail"] = bool
        if not isinstance(data, dict) or data.keys() != kinds.keys():
            raise ValueError("its keys are not those of a session")
        for key, kind in kinds.items():
            if type(data[key]) is not kind or (kind is int and data[key] < 0):
                raise ValueError(f"{key} is {data[key]!r:.80}")
            if kind is list and not all(type(name) is str for name in data[key]):
                raise ValueError(f"{key} is {data[key]!r:.80}")
        for name in (data["model"], data["model_hash"], *data["types_k"], *data["types_v"], *data["settings"]):
            if not name.isprintable() or len(name) > 256:  # these are shown
                raise ValueError(f"{name!r:.80} is no name")
        return Session(**{**data, "types_k": tuple(data["types_k"]), "types_v": tuple(data["types_v"])})
    except (ValueError, RecursionError) as error:
        raise SessionError(f"{path} has a header that cannot be read: {error}") from None


# ---- What a session belongs to ----


def calibration_digest(policy: CachePolicy, info: ModelInfo) -> str:
    """SHA-256 of what a policy does to keys: means, gains, and which layers it rotates; "" if nothing."""
    if not policy.calibrated:
        return ""
    digest = hashlib.sha256()
    for name, vectors in ((b"", policy.k_means), (b"gain", policy.k_gains)):
        for i, values in sorted(vectors.items()):
            digest.update(name + i.to_bytes(4, "little") + np.ascontiguousarray(values, np.float32).tobytes())
    for layer in info.layers:
        if policy.rotates_k(layer):
            digest.update(b"rotated" + layer.index.to_bytes(4, "little"))
    return digest.hexdigest()


def belongs_to(owner: Owner) -> dict[str, Any]:
    """What must be the same when a session is loaded, by the names of `Session`."""
    policy, info = owner.policy, owner.info
    layers = [layer.index for layer in info.layers] or range(policy.n_layer)
    types_k = tuple(policy.types_k[i] for i in layers)
    types_v = tuple(policy.types_v[i] for i in layers)
    return {
        "model_hash": model_hash(info),
        "types_k": types_k,
        "types_v": types_v,
        "type_numbers": {name: CACHE_TYPES[name].number for name in sorted({*types_k, *types_v})},
        "k_means": calibration_digest(policy, info),
        "settings": owner.settings,
        "codec": CODEC,
        "state": int(import_llama_cpp().LLAMA_STATE_SEQ_VERSION),
    }


def _refuse_other(session: Session, owner: Owner, n_ctx: int, path: Path) -> None:
    """Raises SessionError, naming both sides, unless a session belongs to its owner and fits into n_ctx tokens."""
    _refuse_other_model(session, owner.info, path)
    mine = belongs_to(owner)
    for side, theirs, ours in (("K", session.types_k, mine["types_k"]), ("V", session.types_v, mine["types_v"])):
        if theirs != ours:
            raise SessionError(
                f"{path} holds {side} as {_types(theirs)}, this cache stores {_types(ours)}: "
                f"load the model with the cache the session was saved with"
            )
    if session.k_means != mine["k_means"]:
        was = "with keys calibrated otherwise" if session.k_means else "without a calibration of keys"
        advice = "with the calibration or policy that it had" if session.k_means else 'with calibration="off"'
        raise SessionError(f"{path} was saved {was}: load the model {advice} (--calibration)")
    for what, there, here in (
        ("numbers the cache types", session.type_numbers, mine["type_numbers"]),
        ("was written by codec version", session.codec, mine["codec"]),
        ("holds llama.cpp state version", session.state, mine["state"]),
    ):
        if there != here:
            raise SessionError(f"{path} {what} {there!r:.200}, this installation needs {here!r}")
    if "model_identity" in session.settings and session.settings["model_identity"] != owner.settings["model_identity"]:
        raise SessionError(f"{path} was saved with another model, whose weights are not those of {owner.info.path}")
    for name in sorted({*session.settings, *mine["settings"]}):
        if name in LATER and name not in session.settings:
            continue
        then, now = session.settings.get(name), mine["settings"].get(name)
        if then != now:
            then_, now_ = f"{name}={then!r:.80}", f"{name}={now!r}"
            raise SessionError(f"{path} was saved with {then_}, this model was loaded with {now_}")
    if session.n_tokens > n_ctx:
        raise SessionError(
            f"{path} holds {session.n_tokens:,} tokens, the context has {n_ctx:,}: "
            f"load the model with n_ctx={session.n_tokens} or more"
        )


def _refuse_other_model(session: Session, info: ModelInfo, path: Path) -> None:
    if session.model_hash != (mine := model_hash(info)):
        raise SessionError(
            f"{path} was saved with another model, {session.model} ({session.model_hash[:12]}); "
            f"this is {info.name} ({mine[:12]})"
        )


def _types(names: tuple[str, ...]) -> str:
    return names[0] if len(set(names)) == 1 else ",".join(names)


# ---- Saving ----


def check_target(path: str | Path) -> None:
    """Says before anything is computed why a session could not be saved there.

    Raises:
        ArgumentError: its folder does not exist or cannot be written to, or there is something that is no session.
    """
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise ArgumentError(f"cannot save a session as {path}: it is a link that leads to itself")
    check_folder(target, f"cannot save a session as {path}")
    if target.is_file() and not is_session(target):
        raise ArgumentError(f"{path} exists and is no session: it is not overwritten")


def save(
    path: str | Path, context: Any, tokens: npt.NDArray[np.intc], owner: Owner, extra: Mapping[str, Any]
) -> Session:
    """See `Llama.save_session`.

    Args:
        path: the file, which `check_target` allowed.
        context: a `llama_context` pointer, whose cache holds `tokens` in sequence 0.
        tokens: (n_tokens), all that were read.
        owner: what the session belongs to.
        extra: to be kept beside it.
    """
    llama_cpp = import_llama_cpp()
    memory = llama_cpp.llama_get_memory(context)
    # Cells of tokens that the model does not count any more, as after an answer that was cut short.
    llama_cpp.llama_memory_seq_rm(memory, 0, len(tokens), -1)
    if (last := llama_cpp.llama_memory_seq_pos_max(memory, 0)) != len(tokens) - 1:
        raise SessionError(f"cannot save: the cache ends at token {last}, the model counts {len(tokens)}")
    with tail_in_states():
        try:
            size = llama_cpp.llama_state_seq_get_size(context, 0)
            state = (ctypes.c_uint8 * size)()
        except MemoryError:
            raise OutOfMemoryError(f"no memory for a copy of the cache of {size:,} bytes, which saving needs") from None
        n_written = llama_cpp.llama_state_seq_get_data(context, state, size, 0)
    if size == 0 or n_written != size:
        raise SessionError("llama.cpp could not write the state of its cache")
    numbers = tokens.astype("<i4").tobytes()
    digest = hashlib.sha256(numbers)
    digest.update(state)
    session = Session(
        model=owner.info.name,
        n_tokens=len(tokens),
        n_state_bytes=size,
        sha256=digest.hexdigest(),
        extra=dict(extra),
        tail=True,
        **belongs_to(owner),
    )
    try:
        header = json.dumps(asdict(session)).encode()
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"extra must be what JSON can hold: {error}") from None
    if len(header) > _LARGEST_HEADER:
        raise ArgumentError(f"extra takes {len(header):,} bytes as JSON; a session holds {_LARGEST_HEADER:,} at most")
    head = _HEAD.pack(_MAGIC, SESSION_VERSION, len(header), hashlib.sha256(header).digest())
    write_whole(path, (head, header, numbers, state), what="session", private=True)  # it is a conversation
    return session


# ---- Loading ----


def load(path: str | Path, owner: Owner, n_ctx: int, n_vocab: int) -> tuple[Session, npt.NDArray[np.int32], memoryview]:
    """Reads a session that a context shall take up; see `Llama.load_session`.

    Args:
        path: a file that `save` wrote.
        owner: what the session must belong to.
        n_ctx: tokens of the context.
        n_vocab: tokens of the vocabulary.

    Returns:
        The header, the tokens, and llama.cpp's state, for `put`.

    Raises:
        FileNotFoundError: no such file.
        SessionError: no session, damaged, of another version or owner, or longer than the context.
        OutOfMemoryError: no memory to read it into.
    """
    file_path = Path(path)
    with _open(file_path) as file:
        session = _read_header(file, file_path)
        _refuse_other(session, owner, n_ctx, file_path)
        body = _read_body(file, session, file_path)
    tokens = np.frombuffer(body, "<i4", session.n_tokens)
    if session.n_tokens and not 0 <= tokens.min() <= tokens.max() < n_vocab:
        raise SessionError(f"{path} is damaged: it names tokens beyond the {n_vocab:,} of the vocabulary")
    state = memoryview(body)[4 * session.n_tokens :]
    _refuse_positions(state, session, owner.info, file_path)
    return session, tokens, state


def _refuse_positions(state: memoryview, session: Session, info: ModelInfo, path: Path) -> None:
    """Raises SessionError if a cell is of no token of the session. llama.cpp takes what it is given."""
    try:
        positions = cell_positions(state, info, session.tail)
    except (StateFileError, UnsupportedError):
        return  # of a layout that is not modelled here, or damaged: llama.cpp checks its counts, types and sizes
    wrong = positions[(positions < 0) | (positions >= session.n_tokens)]
    if wrong.size:
        raise SessionError(f"{path} is damaged: it has a cell of token {wrong[0]}, and {session.n_tokens:,} tokens")


def put(context: Any, state: memoryview, session: Session) -> bool:
    """Puts a state that `load` read into an empty context; whether llama.cpp took it, all of the session's tokens."""
    llama_cpp = import_llama_cpp()
    data = (ctypes.c_uint8 * len(state)).from_buffer(state)
    with tail_in_states(session.tail):
        if llama_cpp.llama_state_seq_set_data(context, data, len(state), 0) != len(state):
            return False
    memory = llama_cpp.llama_get_memory(context)
    first, last = llama_cpp.llama_memory_seq_pos_min(memory, 0), llama_cpp.llama_memory_seq_pos_max(memory, 0)
    return bool(last == session.n_tokens - 1 and (first >= 0 or not session.n_tokens))
