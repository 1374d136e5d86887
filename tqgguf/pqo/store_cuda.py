"""The blocks of a `PqoCache` in the memory of a GPU."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._native import library
from .._native.cuda import LEGACY_STREAM, PER_THREAD_STREAM, Memory, Queue, cuda_library
from ..config import MODES, CacheConfig
from ..errors import ArgumentError
from .device_array import FLOAT32, Borrowed, DeviceArray, Dtype, borrow


@dataclass
class _Layer:
    """Rows of blocks, (capacity, n_head_kv, head_dim / 32 blocks), for K and for V."""

    k: Memory | None = None
    v: Memory | None = None
    n_tokens: int = 0
    capacity: int = 0


class CudaStore:
    """See `tqgguf.pqo.cache.Store`.

    Work is put on the stream and not waited for, unless NumPy arrays are involved. Tensors whose library works on
    another stream are ordered by DLPack, inputs before the work and outputs after it.
    """

    def __init__(self, config: CacheConfig, device: int, stream: int | None) -> None:
        number = stream or LEGACY_STREAM
        if not 0 < number < 2**64:
            raise ArgumentError(f"stream is {number}, must be a cudaStream_t as a number")
        if number == PER_THREAD_STREAM:
            raise ArgumentError(
                "stream is 2, the per-thread default stream, which is another one in each thread: give another"
            )
        self._config, self._native = config, cuda_library()
        self._queue: Queue = self._native.queue(device, number)
        self.place = f" on cuda:{self._queue.index} ({self._queue.name})"
        self._token_bytes = config.bytes_per_token // 2
        self._work: Memory | None = None
        with self._queue.current():  # refuses head sizes that attention cannot take, before anything is stored
            arguments = self._attention(_Layer(), 1, config.n_head_kv, 1.0)
            self._native.check(self._native.lib.tq_cuda_attn_supported(arguments))
        self._layers = [_Layer() for _ in range(config.n_layer)]

    def take(self, x: Any, name: str, borrowed: ExitStack) -> Borrowed:
        with self._queue.current():
            view = borrow(x, name, self._queue)
        borrowed.callback(view.release)
        return view

    def n_tokens(self, layer: int) -> int:
        return self._layers[layer].n_tokens

    def append(self, layer: int, k: Borrowed, v: Borrowed) -> None:
        self._store(self._layers[layer], k, v)

    def extend(self, layer: int, k: Borrowed, v: Borrowed, like: tuple[Any, Any]) -> tuple[Any, Any]:
        target = self._layers[layer]
        before = target.n_tokens
        shape = (before + k.shape[0], *k.shape[1:])
        outs = [DeviceArray(self._queue, shape, view.kind) for view in (k, v)]
        self._store(target, k, v)
        try:
            self._decode_layer(target, outs)
            results = [out.numpy() if isinstance(x, np.ndarray) else out for x, out in zip(like, outs, strict=True)]
        except BaseException:
            target.n_tokens = before
            raise
        return results[0], results[1]

    def decode(self, layer: int, k: Borrowed, v: Borrowed, q: Borrowed, scale: float, like: Any) -> Any:
        if not math.isfinite(scale) or abs(scale) > float(np.finfo(np.float32).max):
            raise ArgumentError(f"scale = {scale:g} given; it must be a finite float32")
        on_host = isinstance(like, np.ndarray)
        if on_host:
            _refuse_infinite(like)
        target = self._layers[layer]
        token = [Borrowed(x.name, x.pointer, (1, *x.shape), (0, *x.strides), x.kind) for x in (k, v)]
        before = target.n_tokens
        try:
            if not on_host:
                return self._attend(target, token, q, q.kind, scale)
            values = self._attend(target, token, q, FLOAT32, scale).numpy()
            if not np.isfinite(values).all():
                raise ArgumentError(
                    f"q and scale = {scale:g} are so large that their scores overflow; nothing was appended"
                )
            return values.astype(like.dtype, copy=False)
        except BaseException:
            target.n_tokens = before
            raise

    def dequantize(self, layer: int) -> tuple[DeviceArray, DeviceArray]:
        source = self._layers[layer]
        shape = (source.n_tokens, self._config.n_head_kv, self._config.head_dim)
        k_out, v_out = (DeviceArray(self._queue, shape, FLOAT32) for _ in range(2))
        self._decode_layer(source, [k_out, v_out])
        return k_out, v_out

    def truncate(self, layer: int, n_tokens: int) -> None:
        self._layers[layer].n_tokens = n_tokens

    def reset(self) -> None:
        self._layers = [_Layer() for _ in self._layers]
        self._work = None

    def memory_usage(self) -> int:
        return sum(2 * layer.capacity * self._token_bytes for layer in self._layers)

    def free(self) -> None:
        self.reset()

    # ---- Work ----

    def _view(self, pointer: int, number: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        """A tq_cuda_view: sizes and strides innermost first, four of each."""
        ffi = self._native.ffi
        pad = 4 - len(shape)
        mode = MODES.index(self._config.mode)
        return ffi.new(
            "tq_cuda_view *",
            (ffi.cast("void *", pointer), number, mode, [*shape[::-1], *[1] * pad], [*strides[::-1], *[0] * pad]),
        )

    def _blocks(self, memory: Memory, first: int, n_tokens: int) -> Any:
        """A view of tokens' blocks."""
        kind = self._config.type
        shape = (n_tokens, self._config.n_head_kv * self._config.head_dim)
        start = memory.pointer + first * self._token_bytes
        return self._view(start, kind.number, shape, (self._token_bytes, kind.bytes))

    def _reserve(self, layer: _Layer, n_tokens: int) -> None:
        """Makes room for n_tokens tokens in all. On failure nothing has changed."""
        if n_tokens <= layer.capacity:
            return
        capacity = int(library().lib.tq_cache_capacity(n_tokens))
        new = [Memory(self._queue, capacity * self._token_bytes) for _ in range(2)]
        if layer.k is not None and layer.v is not None and layer.n_tokens > 0:
            for old, target in zip((layer.k, layer.v), new, strict=True):
                self._queue.copy(old.pointer, target.pointer, layer.n_tokens * self._token_bytes, 3)
        layer.k, layer.v = new
        layer.capacity = capacity

    def _store(self, layer: _Layer, k: Borrowed, v: Borrowed) -> None:
        n_tokens = k.shape[0]
        if n_tokens == 0:
            return
        with self._queue.current():
            self._reserve(layer, layer.n_tokens + n_tokens)
            assert layer.k is not None and layer.v is not None
            native = self._native
            for x, memory in ((k, layer.k), (v, layer.v)):
                source = self._view(x.pointer, x.kind.number, x.shape, x.strides)
                target = self._blocks(memory, layer.n_tokens, n_tokens)
                native.check(native.lib.tq_cuda_encode(source, native.ffi.NULL, target, self._queue.handle))
            layer.n_tokens += n_tokens

    def _decode_layer(self, layer: _Layer, outs: list[DeviceArray]) -> None:
        if layer.n_tokens == 0 or layer.k is None or layer.v is None:
            return
        native = self._native
        with self._queue.current():
            for memory, out in zip((layer.k, layer.v), outs, strict=True):
                source = self._blocks(memory, 0, layer.n_tokens)
                target = self._array_view(out)
                native.check(native.lib.tq_cuda_decode(source, native.ffi.NULL, 0, target, self._queue.handle))

    def _array_view(self, array: DeviceArray) -> Any:
        return self._view(array.memory.pointer, array.kind.number, array.shape, array.strides)

    def _attention(self, layer: _Layer, n_kv: int, n_head: int, scale: float) -> Any:
        """A tq_attn but for the pointers to q and out."""
        native = self._native
        ffi, config = native.ffi, self._config
        arguments = ffi.new("tq_attn *")
        row, head_bytes = self._token_bytes // config.n_head_kv, 4 * config.head_dim
        for operand, memory in ((arguments.k, layer.k), (arguments.v, layer.v)):
            operand.data = ffi.cast("void *", 0 if memory is None else memory.pointer)
            operand.type, operand.mode = config.type.number, MODES.index(config.mode)
            operand.head_dim, operand.n_head, operand.n_stream = config.head_dim, config.n_head_kv, 1
            operand.stride_token, operand.stride_head = self._token_bytes, row
        q = arguments.q
        q.type, q.head_dim, q.n_head, q.n_stream = FLOAT32.number, config.head_dim, n_head, 1
        q.stride_token, q.stride_head = head_bytes * n_head, head_bytes
        arguments.n_q, arguments.n_kv, arguments.scale = 1, n_kv, scale
        arguments.out_stride_row, arguments.out_stride_head = head_bytes * n_head, head_bytes
        return arguments

    def _attend(self, layer: _Layer, token: list[Borrowed], q: Borrowed, kind: Dtype, scale: float) -> DeviceArray:
        """Appends a token, (1, n_head_kv, head_dim), and attends; on failure the layer's count may be one too large."""
        native, queue = self._native, self._queue
        ffi, lib = native.ffi, native.lib
        n_head, n_kv = q.shape[0], layer.n_tokens + 1
        with queue.current():
            # All that can fail for want of memory comes before the token is stored.
            self._reserve(layer, n_kv)
            arguments = self._attention(layer, n_kv, n_head, scale)
            work_bytes = int(lib.tq_cuda_attn_work_bytes(arguments))
            if work_bytes == int(ffi.cast("size_t", -1)):
                raise native.error(lib.tq_cuda_attn_supported(arguments))
            if work_bytes > 0 and (self._work is None or self._work.n_bytes < work_bytes):
                self._work = Memory(queue, work_bytes)
            result = DeviceArray(queue, q.shape, kind)
            out = result if kind is FLOAT32 else DeviceArray(queue, q.shape, FLOAT32)
            direct = q.kind is FLOAT32 and q.strides[1] == 4
            converted = None if direct else DeviceArray(queue, q.shape, FLOAT32)
            if converted is not None:
                source = self._view(q.pointer, q.kind.number, q.shape, q.strides)
                native.check(lib.tq_cuda_convert(source, self._array_view(converted), queue.handle))
            self._store(layer, *token)
            arguments.q.data = ffi.cast("void *", q.pointer if converted is None else converted.memory.pointer)
            if converted is None:
                arguments.q.stride_head = q.strides[0]
            arguments.out = ffi.cast("float *", out.memory.pointer)
            work = ffi.cast("void *", 0 if self._work is None else self._work.pointer)
            native.check(lib.tq_cuda_attn(arguments, work, queue.handle))
            if out is not result:
                native.check(lib.tq_cuda_convert(self._array_view(out), self._array_view(result), queue.handle))
            return result


def _refuse_infinite(q: np.ndarray[Any, Any]) -> None:
    bad = np.argwhere(~np.isfinite(q))
    if len(bad):
        head, value = (int(i) for i in bad[0])
        raise ArgumentError(f"q holds {q[head, value]:g} at head {head}, value {value}; it must be finite")
