"""The stand-alone PQO cache: compressed keys and values of a model's layers, for programs that are not llama.cpp."""

from __future__ import annotations

import operator
import re
import threading
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, overload

import numpy as np
import numpy.typing as npt

from ..config import CacheConfig
from ..errors import ArgumentError, CacheClosedError
from .device_array import Tensor
from .store_cuda import CudaStore
from .store_host import HostStore

if TYPE_CHECKING:
    from typing_extensions import Self

Floats = npt.NDArray[np.floating[Any]]


class Store(Protocol):
    """Where the blocks of all layers are: in host memory, or on a GPU. Layers, shapes and counts are checked before.

    Attributes:
        place: for `repr`.
    """

    place: str

    def take(self, x: Any, name: str, borrowed: ExitStack) -> Any:
        """An argument as the other methods take it, with its shape; `borrowed` gives it back."""

    def n_tokens(self, layer: int) -> int:
        """Tokens in a layer."""

    def append(self, layer: int, k: Any, v: Any) -> None:
        """Appends tokens, or none on failure."""

    def extend(self, layer: int, k: Any, v: Any, like: tuple[Any, Any]) -> tuple[Any, Any]:
        """Appends tokens and returns the whole layer decoded, in the dtype and on the device of `like`."""

    def decode(self, layer: int, k: Any, v: Any, q: Any, scale: float, like: Any) -> Any:
        """Appends one token and attends to the whole layer; the output is like `like`."""

    def dequantize(self, layer: int) -> tuple[Any, Any]:
        """The whole layer decoded."""

    def truncate(self, layer: int, n_tokens: int) -> None:
        """Keeps the first n_tokens tokens."""

    def reset(self) -> None:
        """Empties every layer and gives its memory back."""

    def memory_usage(self) -> int:
        """Bytes allocated for blocks."""

    def free(self) -> None:
        """Frees everything."""


class PqoCache:
    """Keys and values of all layers as PQO blocks, with attention that never decompresses them.

    Behaves as the cache of turboquant-rs: `prefill` and `decode` append and give back what attention needs. Arrays are
    float32 or float16; others than C-contiguous float32 are copied. NaN in K or V is stored as 0 and magnitudes above
    65504 as +-65504. Storage grows by a quarter plus 128 tokens at a time.

    A cache may be shared between threads: calls on one cache wait for each other, different caches run in parallel.

    With `device="cuda"` or `"cuda:1"` the blocks lie in that GPU's memory, with the same bytes. Arguments may then be
    tensors on the device, of float32, float16 or bfloat16 and with any strides, from every library that has DLPack or
    the CUDA array interface; they are read where they are. Results are `DeviceArray`s, which these libraries take
    without a copy: `torch.from_dlpack(out)`. A NumPy array is copied to the device, and what belongs to it comes back
    as a NumPy array: `prefill` gives keys as it got k, `decode` gives its output as it got q. `dequantize` gives
    DeviceArrays.

    Work on a GPU is put on the stream and not waited for, unless NumPy arrays are involved. Tensors whose library works
    on another stream are ordered by DLPack, inputs before the work and outputs after it; they must not be overwritten,
    or freed, before the work is done (PyTorch: `Tensor.record_stream`).

    Attention on a GPU is exact to 2e-3 of the output, where the CPU's kernels are exact to 1e-3 or better. The CPU's
    cache refuses NaN and infinity in q and scores that overflow. So does a GPU's if q is a NumPy array; with a tensor
    that would mean to wait for the device, so the token is appended and the output holds NaN.

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

    def __init__(self, config: CacheConfig, device: str = "cpu", *, stream: int | None = None) -> None:
        if not isinstance(config, CacheConfig):
            raise ArgumentError(f"config must be a CacheConfig, not {config.__class__.__name__}")
        self._lock = threading.RLock()
        self._store: Store | None = None
        self.config = config
        if str(device) == "cpu":
            if stream is not None:
                raise ArgumentError(f"stream = {stream} given; a cache in host memory has none")
            self._store = HostStore(config)
            return
        match = re.fullmatch(r"cuda(?::(\d{1,4}))?", str(device))
        if match is None:
            raise ArgumentError(f"unknown device {str(device)!r}; valid devices are cpu, cuda and cuda:N, N from 0 on")
        number = None if stream is None else _integer(stream, "stream")
        self._store = CudaStore(config, int(match.group(1) or 0), number)

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
        with self._lock, ExitStack() as borrowed:
            store, index = self._open(), self._layer(layer)
            views = self._tokens(k, v, borrowed)
            if store.n_tokens(index) == 0:
                store.append(index, *views)
                return k, v
            return store.extend(index, *views, (k, v))

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
        with self._lock, ExitStack() as borrowed:
            store, index = self._open(), self._layer(layer)
            store.append(index, *self._tokens(k, v, borrowed))

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
        with self._lock, ExitStack() as borrowed:
            store, index = self._open(), self._layer(layer)
            n_kv, head_dim = self.config.n_head_kv, self.config.head_dim
            views = [store.take(x, name, borrowed) for x, name in ((k, "k"), (v, "v"))]
            for view, name in zip(views, "kv", strict=True):
                if view.shape != (n_kv, head_dim):
                    raise ArgumentError(f"{name} must have shape {(n_kv, head_dim)}, not {view.shape}")
            query = store.take(q, "q", borrowed)
            if len(query.shape) != 2 or query.shape[1] != head_dim:
                raise ArgumentError(f"q must have shape (n_head, {head_dim}), not {query.shape}")
            n_head = query.shape[0]
            if n_head == 0 or n_head % n_kv:
                raise ArgumentError(f"q has {n_head} heads, must be a positive multiple of n_head_kv, {n_kv}")
            return store.decode(index, views[0], views[1], query, _scale(scale), q)

    def dequantize(self, layer: int) -> tuple[Any, Any]:
        """The whole layer decoded.

        Returns:
            K and V, each (seq_len, n_head_kv, head_dim) float32, in NumPy arrays, or in DeviceArrays on a GPU.

        Raises:
            OutOfMemoryError: no device memory for them.
        """
        with self._lock:
            return self._open().dequantize(self._layer(layer))

    def seq_len(self, layer: int = 0) -> int:
        """Tokens in a layer."""
        with self._lock:
            return self._open().n_tokens(self._layer(layer))

    def truncate(self, layer: int, n_tokens: int) -> None:
        """Keeps the first n_tokens tokens of a layer, and its memory.

        Raises:
            ArgumentError: n_tokens is negative, or more than the layer has.
        """
        with self._lock:
            store, index = self._open(), self._layer(layer)
            count, have = _integer(n_tokens, "n_tokens"), store.n_tokens(index)
            if not 0 <= count <= have:
                raise ArgumentError(f"n_tokens is {count}, must be between 0 and {have}, the tokens in layer {index}")
            store.truncate(index, count)

    def reset(self) -> None:
        """Empties every layer and gives its memory back; the cache remains usable."""
        with self._lock:
            self._open().reset()

    def memory_usage(self) -> int:
        """Bytes allocated for blocks, headroom included; on a GPU not results that live, nor scratch of some MB."""
        with self._lock:
            return self._open().memory_usage()

    def close(self) -> None:
        """Frees everything. Any later use raises CacheClosedError; closing again does nothing."""
        with self._lock:
            if self._store is not None:
                self._store.free()
                self._store = None

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._store is None

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<PqoCache {self.config}{self._store.place if self._store else ' closed'}>"

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError("a PqoCache holds native memory and cannot be pickled or copied")

    def _open(self) -> Store:
        if self._store is None:
            raise CacheClosedError("this PqoCache is closed")
        return self._store

    def _layer(self, layer: int) -> int:
        index = _integer(layer, "layer")
        if not 0 <= index < self.config.n_layer:
            raise ArgumentError(f"layer is {index}, must be between 0 and {self.config.n_layer - 1}")
        return index

    def _tokens(self, k: Any, v: Any, borrowed: ExitStack) -> tuple[Any, Any]:
        """k and v of as many tokens, (n_tokens, n_head_kv, head_dim)."""
        heads = (self.config.n_head_kv, self.config.head_dim)
        views = []
        for x, name in ((k, "k"), (v, "v")):
            views.append(view := self._open().take(x, name, borrowed))
            if len(view.shape) != 3 or view.shape[1:] != heads:
                raise ArgumentError(f"{name} must have shape (n_tokens, {heads[0]}, {heads[1]}), not {view.shape}")
        a, b = views
        if a.shape != b.shape:
            raise ArgumentError(f"k and v must hold the same number of tokens, shapes are {a.shape} and {b.shape}")
        return a, b


def _integer(value: Any, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ArgumentError(f"{name} must be an integer, not {value.__class__.__name__}") from None


def _scale(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ArgumentError("scale is beyond the range of a double; it must be finite") from None
    except (TypeError, ValueError):
        raise ArgumentError(f"scale must be a number, not {value.__class__.__name__}") from None
