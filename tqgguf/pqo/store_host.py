"""The blocks of a `PqoCache` in host memory: libtqgguf's own cache."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt

from .._native import library
from ..config import MODES, CacheConfig
from .codec import as_float32

F32 = npt.NDArray[np.float32]


class HostStore:
    """See `tqgguf.pqo.cache.Store`."""

    place = ""

    def __init__(self, config: CacheConfig) -> None:
        self._config, self._native = config, library()
        ffi, lib = self._native.ffi, self._native.lib
        fields = (config.bits, config.head_dim, config.n_head_kv, config.n_layer, MODES.index(config.mode))
        handle = ffi.new("tq_cache **")
        self._native.check(lib.tq_cache_new(ffi.new("tq_cache_config *", fields), handle))
        self._cache: Any = ffi.gc(handle[0], lib.tq_cache_free)

    def take(self, x: Any, name: str, _borrowed: ExitStack) -> F32:
        return as_float32(x, name)

    def n_tokens(self, layer: int) -> int:
        return self._native.check(self._native.lib.tq_cache_seq_len(self._cache, layer))

    def append(self, layer: int, k: F32, v: F32, k_out: Any = None, v_out: Any = None) -> None:
        inputs = [self._native.ffi.from_buffer("float[]", each) for each in (k, v)]
        outs = [self._native.ffi.NULL if each is None else self._out(each) for each in (k_out, v_out)]
        self._native.check(self._native.lib.tq_cache_prefill(self._cache, layer, *inputs, len(k), *outs))

    def extend(self, layer: int, k: F32, v: F32, like: tuple[Any, Any]) -> tuple[Any, Any]:
        k_out = np.empty((self.n_tokens(layer) + len(k), *k.shape[1:]), dtype=np.float32)
        v_out = np.empty_like(k_out)
        self.append(layer, k, v, k_out, v_out)
        return k_out.astype(like[0].dtype, copy=False), v_out.astype(like[1].dtype, copy=False)

    def decode(self, layer: int, k: F32, v: F32, q: F32, scale: float, like: Any) -> Any:
        out, lib = np.empty_like(q), self._native.lib
        pointers = [self._native.ffi.from_buffer("float[]", each) for each in (k, v, q)]
        self._native.check(lib.tq_cache_decode(self._cache, layer, *pointers, len(q), scale, self._out(out)))
        return out.astype(like.dtype, copy=False)

    def dequantize(self, layer: int) -> tuple[Any, Any]:
        k_out = np.empty((self.n_tokens(layer), self._config.n_head_kv, self._config.head_dim), dtype=np.float32)
        v_out = np.empty_like(k_out)
        outs = self._out(k_out), self._out(v_out)
        self._native.check(self._native.lib.tq_cache_dequantize(self._cache, layer, *outs))
        return k_out, v_out

    def truncate(self, layer: int, n_tokens: int) -> None:
        self._native.check(self._native.lib.tq_cache_truncate(self._cache, layer, n_tokens))

    def reset(self) -> None:
        self._native.check(self._native.lib.tq_cache_reset(self._cache))

    def memory_usage(self) -> int:
        return int(self._native.lib.tq_cache_memory_usage(self._cache))

    def free(self) -> None:
        self._native.ffi.release(self._cache)

    def _out(self, array: F32) -> Any:
        return self._native.ffi.from_buffer("float[]", array, require_writable=True)
