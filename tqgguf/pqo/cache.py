"""The stand-alone PQO cache: compressed keys and values of a model's layers, for programs that are not llama.cpp."""

from __future__ import annotations

import operator
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from .._native import library
from ..config import MODES, CacheConfig
from ..errors import ArgumentError, CacheClosedError
from .codec import as_float32

if TYPE_CHECKING:
    from typing_extensions import Self

    from .device_array import Tensor

__all__ = ["PqoCache"]

Floats = npt.NDArray[np.floating[Any]]


class PqoCache:
    """Keys and values of all layers as PQO blocks, with attention that never decompresses them.

    Behaves as the cache of turboquant-rs: `prefill` and `decode` append and give back what attention needs. Arrays are
    float32 or float16; others than C-contiguous float32 are copied. NaN in K or V is stored as 0 and magnitudes above
    65504 as +-65504. Storage grows by a quarter plus 128 tokens at a time.

    A cache may be shared between threads: calls on one cache wait for each other, different caches run in parallel.

    With `device="cuda"` or `"cuda:1"` the blocks lie in that GPU's memory, and tensors that are there can be given: see
    `tqgguf.pqo.store_cuda.CudaPqoCache`, which is what such a call makes.

    Args:
        config: shape and codec.
        device: "cpu", "cuda" (which is cuda:0) or "cuda:N".
        stream: the CUDA stream to work on, as a number: `torch.cuda.current_stream().cuda_stream` or CuPy's
            `stream.ptr`. None: the legacy default stream, which PyTorch and CuPy use unless told otherwise.

    Raises:
        ArgumentError: unknown device, or a stream for a cache in host memory.
        OutOfMemoryError: no memory for the layers' records.
        LibraryError: libtqgguf, or for CUDA libtqgguf_cuda, is missing or of another version.
        UnsupportedError: no driver, no device that this build has code for, or a head that its kernels do not take.
    """

    def __new__(cls, config: CacheConfig, device: str = "cpu", *, stream: int | None = None) -> Self:
        if cls is PqoCache and str(device) != "cpu":
            from .store_cuda import CudaPqoCache

            return object.__new__(CudaPqoCache)  # type: ignore[return-value]  # of class PqoCache, no Self narrower
        return object.__new__(cls)

    def __init__(self, config: CacheConfig, device: str = "cpu", *, stream: int | None = None) -> None:
        if not isinstance(config, CacheConfig):
            raise ArgumentError(f"config must be a CacheConfig, not {config.__class__.__name__}")
        self._lock = threading.RLock()
        self._cache: Any = None
        self.config = config
        self._create(str(device), stream)

    def _create(self, device: str, stream: int | None) -> None:
        if device != "cpu":
            raise ArgumentError(f"device = {device!r} given; for that derive {type(self).__name__} from CudaPqoCache")
        if stream is not None:
            raise ArgumentError(f"stream = {stream} given; a cache in host memory has none")
        config = self.config
        self._native = library()
        ffi, lib = self._native.ffi, self._native.lib
        fields = (config.bits, config.head_dim, config.n_head_kv, config.n_layer, MODES.index(config.mode))
        handle = ffi.new("tq_cache **")
        self._native.check(lib.tq_cache_new(ffi.new("tq_cache_config *", fields), handle))
        self._cache = ffi.gc(handle[0], lib.tq_cache_free)

    @overload
    def prefill(self, layer: int, k: Floats, v: Floats) -> tuple[Floats, Floats]: ...

    @overload
    def prefill(self, layer: int, k: Tensor, v: Tensor) -> tuple[Any, Any]: ...

    def prefill(self, layer: int, k: Any, v: Any) -> tuple[Any, Any]:
        """Appends tokens to a layer and returns the keys and values that attention over the whole layer needs.

        Args:
            layer: 0 to n_layer - 1.
            k: (n_tokens, n_head_kv, head_dim).
            v: (n_tokens, n_head_kv, head_dim).

        Returns:
            The given k and v themselves if the layer was empty (so a first prompt costs no precision), otherwise the
            whole layer decoded: (seq_len, n_head_kv, head_dim), in the dtype of k and v.

        Raises:
            ArgumentError: layer out of range, wrong shape or dtype.
            OutOfMemoryError, MemoryError: nothing was appended.
            CacheClosedError: the cache is closed.
        """
        with self._lock:
            handle, index = self._open(), self._layer(layer)
            k32, v32 = self._tokens(k, "k"), self._tokens(v, "v")
            if k32.shape != v32.shape:
                raise ArgumentError(
                    f"k and v must hold the same number of tokens, shapes are {k32.shape} and {v32.shape}"
                )
            before = self.seq_len(index)
            if before == 0:
                self._append(handle, index, k32, v32, None, None)
                return k, v
            k_out = np.empty((before + len(k32), *k32.shape[1:]), dtype=np.float32)
            v_out = np.empty_like(k_out)
            self._append(handle, index, k32, v32, k_out, v_out)
            return k_out.astype(k.dtype, copy=False), v_out.astype(v.dtype, copy=False)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Appends tokens to a layer and returns nothing, which spares decoding what was there before.

        Args:
            layer: 0 to n_layer - 1.
            k: (n_tokens, n_head_kv, head_dim).
            v: (n_tokens, n_head_kv, head_dim).

        Raises:
            ArgumentError: layer out of range, wrong shape or dtype.
            OutOfMemoryError: nothing was appended.
            CacheClosedError: the cache is closed.
        """
        with self._lock:
            handle, index = self._open(), self._layer(layer)
            k32, v32 = self._tokens(k, "k"), self._tokens(v, "v")
            if k32.shape != v32.shape:
                raise ArgumentError(
                    f"k and v must hold the same number of tokens, shapes are {k32.shape} and {v32.shape}"
                )
            self._append(handle, index, k32, v32, None, None)

    @overload
    def decode(self, layer: int, k: Tensor, v: Tensor, q: Floats, scale: float) -> Floats: ...

    @overload
    def decode(self, layer: int, k: Tensor, v: Tensor, q: Tensor, scale: float) -> Any: ...

    def decode(self, layer: int, k: Any, v: Any, q: Any, scale: float) -> Any:
        """Appends one token to a layer and attends to the whole layer, on the compressed blocks.

        Args:
            layer: 0 to n_layer - 1.
            k: (n_head_kv, head_dim).
            v: (n_head_kv, head_dim).
            q: (n_head, head_dim), n_head a multiple of n_head_kv; query head h reads KV head
                h // (n_head // n_head_kv). Values must be finite.
            scale: factor on the dot products, 1 / sqrt(head_dim) as a rule.

        Returns:
            (n_head, head_dim) in the dtype of q.

        Raises:
            ArgumentError: layer out of range, wrong shape or dtype, NaN or infinity in q or scale; nothing appended.
            OutOfMemoryError: nothing was appended.
            CacheClosedError: the cache is closed.
        """
        with self._lock:
            handle, index = self._open(), self._layer(layer)
            k32, v32 = self._token(k, "k"), self._token(v, "v")
            q32 = as_float32(q, "q")
            n_kv, head_dim = self.config.n_head_kv, self.config.head_dim
            if q32.ndim != 2 or q32.shape[1] != head_dim:
                raise ArgumentError(f"q must have shape (n_head, {head_dim}), not {q32.shape}")
            if len(q32) == 0 or len(q32) % n_kv:
                raise ArgumentError(f"q has {len(q32)} heads, must be a positive multiple of n_head_kv, {n_kv}")
            out = np.empty_like(q32)
            native = self._native
            pointers = [native.ffi.from_buffer("float[]", a) for a in (k32, v32, q32)]
            target = native.ffi.from_buffer("float[]", out, require_writable=True)
            native.check(native.lib.tq_cache_decode(handle, index, *pointers, len(q32), as_scale(scale), target))
            return out.astype(q.dtype, copy=False)

    def dequantize(self, layer: int) -> tuple[Any, Any]:
        """The whole layer decoded.

        Returns:
            K and V, each (seq_len, n_head_kv, head_dim) float32, in NumPy arrays.
        """
        with self._lock:
            handle, index = self._open(), self._layer(layer)
            k_out = np.empty((self.seq_len(index), self.config.n_head_kv, self.config.head_dim), dtype=np.float32)
            v_out = np.empty_like(k_out)
            native = self._native
            targets = [native.ffi.from_buffer("float[]", a, require_writable=True) for a in (k_out, v_out)]
            native.check(native.lib.tq_cache_dequantize(handle, index, *targets))
            return k_out, v_out

    def seq_len(self, layer: int = 0) -> int:
        """Tokens in a layer."""
        with self._lock:
            return self._count(self._open(), self._layer(layer))

    def truncate(self, layer: int, n_tokens: int) -> None:
        """Keeps the first n_tokens tokens of a layer, and its memory.

        Raises:
            ArgumentError: n_tokens is negative, or more than the layer has.
        """
        with self._lock:
            handle, index = self._open(), self._layer(layer)
            count, have = as_integer(n_tokens, "n_tokens"), self.seq_len(index)
            if not 0 <= count <= have:
                raise ArgumentError(f"n_tokens is {count}, must be between 0 and {have}, the tokens in layer {index}")
            self._keep(handle, index, count)

    def reset(self) -> None:
        """Empties every layer and gives its memory back; the cache remains usable."""
        with self._lock:
            self._native.check(self._native.lib.tq_cache_reset(self._open()))

    def memory_usage(self) -> int:
        """Bytes allocated for blocks, headroom included."""
        with self._lock:
            return int(self._native.lib.tq_cache_memory_usage(self._open()))

    def close(self) -> None:
        """Frees everything. Any later use raises CacheClosedError; closing again does nothing."""
        with self._lock:
            if self._cache is not None:
                self._free(self._cache)
                self._cache = None

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._cache is None

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<PqoCache {self.config}{' closed' if self.closed else ''}>"

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError("a PqoCache holds native memory and cannot be pickled or copied")

    def _open(self) -> Any:
        if self._cache is None:
            raise CacheClosedError("this PqoCache is closed")
        return self._cache

    def _layer(self, layer: int) -> int:
        index = as_integer(layer, "layer")
        if not 0 <= index < self.config.n_layer:
            raise ArgumentError(f"layer is {index}, must be between 0 and {self.config.n_layer - 1}")
        return index

    def _count(self, handle: Any, index: int) -> int:
        return self._native.check(self._native.lib.tq_cache_seq_len(handle, index))

    def _keep(self, handle: Any, index: int, n_tokens: int) -> None:
        self._native.check(self._native.lib.tq_cache_truncate(handle, index, n_tokens))

    def _free(self, handle: Any) -> None:
        self._native.ffi.release(handle)

    def _tokens(self, x: Tensor, name: str) -> npt.NDArray[np.float32]:
        values, shape = as_float32(x, name), (self.config.n_head_kv, self.config.head_dim)
        if values.ndim != 3 or values.shape[1:] != shape:
            raise ArgumentError(f"{name} must have shape (n_tokens, {shape[0]}, {shape[1]}), not {values.shape}")
        return values

    def _token(self, x: Tensor, name: str) -> npt.NDArray[np.float32]:
        values, shape = as_float32(x, name), (self.config.n_head_kv, self.config.head_dim)
        if values.shape != shape:
            raise ArgumentError(f"{name} must have shape {shape}, not {values.shape}")
        return values

    def _append(
        self,
        handle: Any,
        layer: int,
        k: npt.NDArray[np.float32],
        v: npt.NDArray[np.float32],
        k_out: npt.NDArray[np.float32] | None,
        v_out: npt.NDArray[np.float32] | None,
    ) -> None:
        ffi = self._native.ffi
        inputs = [ffi.from_buffer("float[]", a) for a in (k, v)]
        outputs = [
            ffi.NULL if a is None else ffi.from_buffer("float[]", a, require_writable=True) for a in (k_out, v_out)
        ]
        self._native.check(self._native.lib.tq_cache_prefill(handle, layer, *inputs, len(k), *outputs))


def as_integer(value: Any, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ArgumentError(f"{name} must be an integer, not {value.__class__.__name__}") from None


def as_scale(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ArgumentError("scale is beyond the range of a double; it must be finite") from None
    except (TypeError, ValueError):
        raise ArgumentError(f"scale must be a number, not {value.__class__.__name__}") from None
