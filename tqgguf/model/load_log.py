"""What llama.cpp is asked for when a cache is made, and what it did: its log is the only place where it tells."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from .._native import import_llama_cpp, library_path
from ..cache.policy import CachePolicy
from ..cache.tail import tail_bytes
from ..config import CacheType
from ..errors import CacheTypeError, OutOfMemoryError, TqggufError
from ..gguf.info import KVLayer, ModelInfo
from .control import called_by_c

llama_cpp: Any = import_llama_cpp()

LoadLog = list[tuple[int, str]]
"""llama.cpp's log as (level, text)."""

load_lock = threading.Lock()
"""The log callback is one per process, so only one model is loaded at a time."""

_LOG_WARN: Final = 3
_LOG_ERROR: Final = 4
_LOG_CONT: Final = 5

# llama_kv_cache: size = 0.88 MiB ( 2048 cells, 4 layers, 1/1 seqs), K (pqo3): 0.44 MiB, V (pqo3): 0.44 MiB
_KV_LINE: Final = re.compile(
    r"llama_kv_cache: size = +[\d.]+ MiB "
    r"\( *(?P<cells>\d+) cells, +(?P<layers>\d+) layers, +\d+/(?P<streams>\d+) seqs\), "
    r"K \((?P<k>[^)]+)\): +(?P<k_mib>[\d.]+) MiB, V \((?P<v>[^)]+)\): +(?P<v_mib>[\d.]+) MiB"
)


# llama_kv_cache: tail = 1081344 bytes (128 cells in f16)
# llama_kv_cache: layer   3: dev = RPC1
_LAYER_LINE: Final = re.compile(r"llama_kv_cache: layer +(\d+): dev = (\S+)")

_TAIL_LINE: Final = re.compile(r"llama_kv_cache: tail = (\d+) bytes")


@dataclass(frozen=True)
class KVBuffer:
    """One `llama_kv_cache` as llama.cpp reported it; sizes are its own text, in MiB with two digits."""

    cells: int
    n_layer: int
    n_stream: int
    type_k: str
    type_v: str
    k_mib: str
    v_mib: str


@contextlib.contextmanager
def captured_log(quiet: bool = False) -> Iterator[LoadLog]:
    """Collects llama.cpp's log and, unless quiet, still hands it on to whoever listened before."""
    lines: LoadLog = []
    before, user_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(user_data))

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    @called_by_c
    def callback(level: int, text: bytes, data: Any) -> None:
        if level == _LOG_CONT and lines:
            lines[-1] = (lines[-1][0], lines[-1][1] + text.decode("utf-8", "replace"))
        else:
            lines.append((level, text.decode("utf-8", "replace")))
        if before and not quiet:
            before(level, text, user_data)

    llama_cpp.llama_log_set(callback, None)
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(before, user_data)


@contextlib.contextmanager
def told_aborts(verbose: bool) -> Iterator[None]:
    """While it lasts, what ggml says when it ends the process comes to stderr, which a quiet load turns off.

    llama.cpp ends the process where it meets what it had ruled out, as an odd model can make it. Any of its threads may
    call the function of Python that says so: the one that waits for them in C has released the interpreter's lock.

    Args:
        verbose: whether stderr stays on. Then ggml's own way is left alone, which adds a backtrace.
    """
    if verbose or sys.stderr is None:  # closed when Python began: another file may have its number
        yield
        return
    register = ctypes.CDLL(str(library_path("ggml-base"))).ggml_set_abort_callback
    register.argtypes, register.restype = [ctypes.c_void_p], ctypes.c_void_p
    with open(os.dup(2), "wb", buffering=0) as stderr:

        @ctypes.CFUNCTYPE(None, ctypes.c_char_p)  # type: ignore[untyped-decorator]
        def tell(message: bytes) -> None:
            stderr.write(b"\ntqgguf: error: llama.cpp ended this process: " + message + b"\n")

        before = register(ctypes.cast(tell, ctypes.c_void_p))
        try:
            yield
        finally:
            register(before)


@contextlib.contextmanager
def rotation(allowed: bool) -> Iterator[None]:
    """While it lasts, contexts made by this process are rotated or not; upstream reads it from the environment."""
    name = "LLAMA_ATTN_ROT_DISABLE"
    before = os.environ.get(name)
    if not allowed:
        os.environ[name] = "1"
    try:
        yield
    finally:
        if not allowed:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


def verify_buffers(log: LoadLog, info: ModelInfo, policy: CachePolicy, tail: int) -> list[KVBuffer]:
    """The KV buffers llama.cpp reported; raises CacheTypeError unless they are what was asked for."""
    k, v = base_types(policy, info)
    buffers = [
        KVBuffer(int(m["cells"]), int(m["layers"]), int(m["streams"]), m["k"], m["v"], m["k_mib"], m["v_mib"])
        for _, text in log
        if (m := _KV_LINE.search(text))
    ]
    if not buffers:
        if info.layers:
            raise CacheTypeError(
                f"llama.cpp reported no KV buffer for {info.path.name}: cannot verify that it has {cache_words(policy)}"
            )
        return buffers
    for buffer in buffers:
        if (buffer.type_k, buffer.type_v) != (k.name, v.name):
            raise CacheTypeError(
                f"llama.cpp stored K as {buffer.type_k} and V as {buffer.type_v}, asked for were {k.name} and {v.name}"
            )
    if not info.exact:
        return buffers
    for buffer in buffers:
        mine = [layer for layer in info.layers if buffer_of(layer, info, buffers) is buffer]
        cells = buffer.cells * buffer.n_stream
        for side, reported, per_token in (
            ("K", buffer.k_mib, sum(policy.types(x.index)[0].row_bytes(x.n_head_kv * x.head_dim_k) for x in mine)),
            ("V", buffer.v_mib, sum(policy.types(x.index)[1].row_bytes(x.n_head_kv * x.head_dim_v) for x in mine)),
        ):
            expected = cells * per_token
            if abs(float(reported) - expected / 2**20) > 0.0051:
                raise CacheTypeError(
                    f"the {side} cache of {buffer.cells} cells takes {reported} MiB, "
                    f"but of {cache_words(policy)} it must take {expected} bytes: the type was not honoured"
                )
    expected = sum(
        buffer.n_stream * tail_bytes(layer, *policy.types(layer.index), tail, buffer.cells)
        for layer in info.layers
        for buffer in (buffer_of(layer, info, buffers),)
        if buffer
    )
    got = sum(int(m[1]) for _, text in log if (m := _TAIL_LINE.search(text)))
    if got != expected:
        raise CacheTypeError(
            f"llama.cpp allocated {got} bytes for a tail of {tail} tokens, "
            f"it must take {expected}: the tail was not honoured"
        )
    return buffers


def buffer_of(layer: KVLayer, info: ModelInfo, buffers: list[KVBuffer]) -> KVBuffer | None:
    """The buffer a layer lives in. With sliding windows llama.cpp makes two: full attention first, then windows."""
    if len(buffers) == 1:
        return buffers[0]
    if len(buffers) == 2 and any(other.window for other in info.layers):
        return buffers[1 if layer.window else 0]
    return None


def load_error(error: str, log: LoadLog, info: ModelInfo) -> TqggufError:
    """What llama.cpp said when it gave up, as an exception; an OutOfMemoryError if it was memory."""
    causes = [text.strip() for level, text in log if level in (_LOG_WARN, _LOG_ERROR) and text.strip()]
    errors = [text.strip() for level, text in log if level == _LOG_ERROR and text.strip()]
    said = "; ".join(errors[-3:]) or error
    message = f"llama.cpp could not load {info.path}: {said}"
    if re.search(r"failed to allocate|out of memory|bad_alloc|unable to allocate", " ".join(causes), re.IGNORECASE):
        return OutOfMemoryError(message)
    return TqggufError(message)


def needs_flash(policy: CachePolicy) -> bool:
    """Whether a cache can be used with flash attention alone: one with a type of ours, or a quantized V."""
    types = (policy.types(layer) for layer in range(policy.n_layer))
    return any(k.ours or v.quantized for k, v in types)


def base_types(policy: CachePolicy, info: ModelInfo) -> tuple[CacheType, CacheType]:
    """The types llama.cpp is asked for, and prints: those of the first layer that has a cache."""
    return policy.types(info.layers[0].index if info.layers else 0)


def devices(log: LoadLog) -> dict[int, str]:
    """llama.cpp's name of the device that the cache of each layer lies on, by layer."""
    return {int(m[1]): m[2] for _, text in log for m in _LAYER_LINE.finditer(text)}


def cache_words(policy: CachePolicy) -> str:
    if policy.uniform is None:
        return "a KV cache with this policy"
    k, v = policy.uniform
    return f"a {k.name} KV cache" if k == v else f"a {k.name} (K) and {v.name} (V) KV cache"
