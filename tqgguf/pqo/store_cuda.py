"""The stand-alone PQO cache in the memory of a GPU."""

from __future__ import annotations

import math
import re
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._native.cuda import LEGACY_STREAM, PER_THREAD_STREAM, Memory, Queue, cuda_library
from ..config import MODES
from ..errors import ArgumentError
from .cache import PqoCache, as_integer, as_scale
from .device_array import FLOAT32, Borrowed, DeviceArray, Dtype, Tensor, borrow

__all__ = ["CudaPqoCache"]


@dataclass
class _Layer:
    """Rows of blocks, (capacity, n_head_kv, head_dim / 32 blocks), for K and for V."""

    k: Memory | None = None
    v: Memory | None = None
    n_tokens: int = 0
    capacity: int = 0


class CudaPqoCache(PqoCache):
    """What `PqoCache(config, device="cuda")` makes: the same methods, the same bytes, in device memory.

    Arguments may be tensors on the device, of float32, float16 or bfloat16 and with any strides, from every library
    that has DLPack or the CUDA array interface; they are read where they are. Results are then `DeviceArray`s, which
    these libraries take without a copy: `torch.from_dlpack(out)`. A NumPy array is copied to the device, and what
    belongs to it comes back as a NumPy array: `prefill` gives keys as it got k, `decode` gives its output as it got q.
    `dequantize` gives DeviceArrays.

    Work is put on the stream given to the constructor and not waited for, unless NumPy arrays are involved. Tensors
    whose library works on another stream are ordered by DLPack, inputs before the work and outputs after it; they must
    not be overwritten, or freed, before the work is done (PyTorch: `Tensor.record_stream`).

    Attention is exact to 2e-3 of the output, where the CPU's kernels are exact to 1e-3 or better. The CPU's cache
    refuses NaN and infinity in q and scores that overflow. So does this one if q is a NumPy array; with a tensor that
    would mean to wait for the device, so the token is appended and the output holds NaN.

    `memory_usage` counts blocks, as ever. Besides there are the results that live, and scratch of up to some MB.
    """

    def _create(self, device: str, stream: int | None) -> None:
        match = re.fullmatch(r"cuda(?::(\d{1,4}))?", device)
        if match is None:
            raise ArgumentError(f"unknown device {device!r}; valid devices are cpu, cuda and cuda:N, N from 0 on")
        number = LEGACY_STREAM if stream is None else as_integer(stream, "stream") or LEGACY_STREAM
        if not 0 < number < 2**64:
            raise ArgumentError(f"stream is {number}, must be a cudaStream_t as a number")
        if number == PER_THREAD_STREAM:
            raise ArgumentError(
                "stream is 2, the per-thread default stream, which is another one in each thread: give another"
            )
        self._native_cuda = cuda_library()
        self._queue: Queue = self._native_cuda.queue(int(match.group(1) or 0), number)
        self._token_bytes = self.config.bytes_per_token // 2
        self._work: Memory | None = None
        with self._queue.current():  # refuses head sizes that attention cannot take, before anything is stored
            arguments = self._attention(_Layer(), 1, self.config.n_head_kv, 1.0)
            self._native_cuda.check(self._native_cuda.lib.tq_cuda_attn_supported(arguments))
        self._cache = [_Layer() for _ in range(self.config.n_layer)]

    def prefill(self, layer: int, k: Tensor, v: Tensor) -> tuple[Any, Any]:
        with self._lock, ExitStack() as borrowed:
            target = self._open()[self._layer(layer)]
            views = self._borrow_tokens(k, v, borrowed)
            before = target.n_tokens
            if before == 0:
                self._store(target, *views)
                return k, v
            total, heads = before + views[0].shape[0], views[0].shape[1:]
            outs = [DeviceArray(self._queue, (total, *heads), view.kind) for view in views]
            self._store(target, *views)
            try:
                self._decode_layer(target, outs)
                results = [
                    out.numpy() if isinstance(x, np.ndarray) else out for x, out in zip((k, v), outs, strict=True)
                ]
            except BaseException:
                target.n_tokens = before
                raise
            return results[0], results[1]

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        with self._lock, ExitStack() as borrowed:
            target = self._open()[self._layer(layer)]
            self._store(target, *self._borrow_tokens(k, v, borrowed))

    def decode(self, layer: int, k: Tensor, v: Tensor, q: Tensor, scale: float) -> Any:
        with self._lock, ExitStack() as borrowed:
            target = self._open()[self._layer(layer)]
            n_kv, head_dim = self.config.n_head_kv, self.config.head_dim
            one = (n_kv, head_dim)
            factor = as_scale(scale)
            with self._queue.current():
                views = []
                for x, name in ((k, "k"), (v, "v")):
                    view = self._borrow(x, name, borrowed)
                    if view.shape != one:
                        raise ArgumentError(f"{name} must have shape {one}, not {view.shape}")
                    views.append(view)
                query = self._borrow(q, "q", borrowed)
            if len(query.shape) != 2 or query.shape[1] != head_dim:
                raise ArgumentError(f"q must have shape (n_head, {head_dim}), not {query.shape}")
            n_head = query.shape[0]
            if n_head == 0 or n_head % n_kv:
                raise ArgumentError(f"q has {n_head} heads, must be a positive multiple of n_head_kv, {n_kv}")
            if not math.isfinite(factor) or abs(factor) > float(np.finfo(np.float32).max):
                raise ArgumentError(f"scale = {factor:g} given; it must be a finite float32")
            if isinstance(q, np.ndarray):
                _refuse_infinite(q)
            views = [Borrowed(x.name, x.pointer, (1, *x.shape), (0, *x.strides), x.kind) for x in views]
            before = target.n_tokens
            try:
                if not isinstance(q, np.ndarray):
                    return self._attend(target, views, query, query.kind, factor)
                values = self._attend(target, views, query, FLOAT32, factor).numpy()
                if not np.isfinite(values).all():
                    raise ArgumentError(
                        f"q and scale = {factor:g} are so large that their scores overflow; nothing was appended"
                    )
                return values.astype(q.dtype, copy=False)
            except BaseException:
                target.n_tokens = before
                raise

    def dequantize(self, layer: int) -> tuple[DeviceArray, DeviceArray]:
        """The whole layer decoded: K and V, each (seq_len, n_head_kv, head_dim) float32, as DeviceArrays.

        Raises:
            OutOfMemoryError: no device memory for them.
        """
        with self._lock:
            source = self._open()[self._layer(layer)]
            shape = (source.n_tokens, self.config.n_head_kv, self.config.head_dim)
            outs = [DeviceArray(self._queue, shape, FLOAT32) for _ in range(2)]
            self._decode_layer(source, outs)
            return outs[0], outs[1]

    def reset(self) -> None:
        with self._lock:
            for layer in self._open():
                layer.k = layer.v = None
                layer.n_tokens = layer.capacity = 0
            self._work = None

    def memory_usage(self) -> int:
        with self._lock:
            return sum(2 * layer.capacity * self._token_bytes for layer in self._open())

    def __repr__(self) -> str:
        place = f"cuda:{self._queue.index} ({self._queue.name})"
        return f"<PqoCache {self.config} on {place}{' closed' if self.closed else ''}>"

    # ---- What PqoCache asks for ----

    def _count(self, handle: Any, index: int) -> int:
        count: int = handle[index].n_tokens
        return count

    def _keep(self, handle: Any, index: int, n_tokens: int) -> None:
        handle[index].n_tokens = n_tokens

    def _free(self, handle: Any) -> None:
        self.reset()

    # ---- Inputs ----

    def _borrow(self, x: Tensor, name: str, borrowed: ExitStack) -> Borrowed:
        view = borrow(x, name, self._queue)
        borrowed.callback(view.release)
        return view

    def _borrow_tokens(self, k: Tensor, v: Tensor, borrowed: ExitStack) -> list[Borrowed]:
        heads = (self.config.n_head_kv, self.config.head_dim)
        views = []
        with self._queue.current():
            for x, name in ((k, "k"), (v, "v")):
                view = self._borrow(x, name, borrowed)
                if len(view.shape) != 3 or view.shape[1:] != heads:
                    raise ArgumentError(f"{name} must have shape (n_tokens, {heads[0]}, {heads[1]}), not {view.shape}")
                views.append(view)
        if views[0].shape != views[1].shape:
            raise ArgumentError(
                f"k and v must hold the same number of tokens, shapes are {views[0].shape} and {views[1].shape}"
            )
        return views

    # ---- Work ----

    def _view(self, pointer: int, number: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        """A tq_cuda_view: sizes and strides innermost first, four of each."""
        ffi = self._native_cuda.ffi
        pad = 4 - len(shape)
        mode = MODES.index(self.config.mode)
        return ffi.new(
            "tq_cuda_view *",
            (ffi.cast("void *", pointer), number, mode, [*shape[::-1], *[1] * pad], [*strides[::-1], *[0] * pad]),
        )

    def _blocks(self, memory: Memory, first: int, n_tokens: int) -> Any:
        """A view of tokens' blocks."""
        kind = self.config.type
        shape = (n_tokens, self.config.n_head_kv * self.config.head_dim)
        start = memory.pointer + first * self._token_bytes
        return self._view(start, kind.number, shape, (self._token_bytes, kind.bytes))

    def _reserve(self, layer: _Layer, n_tokens: int) -> None:
        """Makes room for n_tokens tokens in all, a quarter and 128 more. On failure nothing has changed."""
        if n_tokens <= layer.capacity:
            return
        capacity = n_tokens + n_tokens // 4 + 128
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
            native = self._native_cuda
            for x, memory in ((k, layer.k), (v, layer.v)):
                source = self._view(x.pointer, x.kind.number, x.shape, x.strides)
                target = self._blocks(memory, layer.n_tokens, n_tokens)
                native.check(native.lib.tq_cuda_encode(source, native.ffi.NULL, target, self._queue.handle))
            layer.n_tokens += n_tokens

    def _decode_layer(self, layer: _Layer, outs: list[DeviceArray]) -> None:
        if layer.n_tokens == 0 or layer.k is None or layer.v is None:
            return
        native = self._native_cuda
        with self._queue.current():
            for memory, out in zip((layer.k, layer.v), outs, strict=True):
                source = self._blocks(memory, 0, layer.n_tokens)
                target = self._array_view(out)
                native.check(native.lib.tq_cuda_decode(source, native.ffi.NULL, 0, target, self._queue.handle))

    def _array_view(self, array: DeviceArray) -> Any:
        return self._view(array.memory.pointer, array.kind.number, array.shape, array.strides)

    def _attention(self, layer: _Layer, n_kv: int, n_head: int, scale: float) -> Any:
        """A tq_attn but for the pointers to q and out."""
        native = self._native_cuda
        ffi, config = native.ffi, self.config
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
        native, queue = self._native_cuda, self._queue
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
