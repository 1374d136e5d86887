"""What benchmarks/speed/cuda.py times: attention, encoding, decoding and a copy by libtqgguf_cuda, on random data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from cuda_clock import Clock

from tqgguf._native.cuda import CudaLibrary, Memory, Queue
from tqgguf.config import CACHE_TYPES

N_HEAD_KV = 8


def kv_types(types: str) -> tuple[str, str]:
    """K's type and V's: "pqo4/pqo3", or one name for both."""
    k, _, v = types.partition("/")
    return k, v or k


@dataclass(frozen=True)
class Shape:
    """Attention of one decoded token per sequence over one layer.

    Attributes:
        n_kv: tokens in the cache.
        group: query heads per KV head.
        batch: sequences, each with its own K and V.
        head_dim: of K and V.
    """

    n_kv: int
    group: int
    batch: int
    head_dim: int

    def bytes_of(self, type: str) -> int:
        """Bytes of K or V of one type."""
        return self.batch * self.n_kv * N_HEAD_KV * CACHE_TYPES[type].row_bytes(self.head_dim)

    def kv_bytes(self, types: str) -> int:
        """Bytes of K and V, which have to be read; types: one, or K's and V's."""
        return sum(self.bytes_of(type) for type in kv_types(types))


class Kernels:
    """Memory and launches of libtqgguf_cuda for one measurement."""

    def __init__(self, native: CudaLibrary, clock: Clock) -> None:
        self.native, self.clock = native, clock
        self.ffi, self.lib = native.ffi, native.lib
        native.check(self.lib.tq_cuda_device_use(0, self.ffi.NULL))
        native.check(self.lib.tq_cuda_synchronize(self.ffi.NULL))  # makes the device's context, if there is none
        self.queue = Queue(native, 0, clock.stream(), "")
        self.random = np.random.default_rng(0)

    def put(self, x: np.ndarray, n_bytes: int | None = None) -> Memory:
        """x on the device, repeated until there are n_bytes of it."""
        memory, x = Memory(self.queue, n_bytes or x.nbytes), np.ascontiguousarray(x)
        done = min(x.nbytes, memory.n_bytes)
        self.queue.copy(x.ctypes.data, memory.pointer, done, 1)
        while done < memory.n_bytes:
            more = min(done, memory.n_bytes - done)
            self.queue.copy(memory.pointer, memory.pointer + done, more, 3)
            done += more
        self.queue.synchronize()
        return memory

    def view(self, memory: Memory, number: int, n_tokens: int, row: int, unit: int) -> Any:
        """Tokens of `row` bytes, one after the other; a value, or a block of 32, takes `unit` bytes."""
        n = row // unit * (32 if number >= 300 else 1)
        return self.ffi.new(
            "tq_cuda_view *",
            (self.ffi.cast("void *", memory.pointer), number, 0, [n, n_tokens, 1, 1], [unit, row, 0, 0]),
        )

    def encoded(self, type: str, head_dim: int, n_tokens: int) -> np.ndarray:
        """Blocks of random tokens of N_HEAD_KV heads."""
        kind = CACHE_TYPES[type]
        x = self.random.standard_normal((n_tokens, N_HEAD_KV * head_dim), dtype=np.float32)
        if not kind.ours:
            return x.astype(np.float16).view(np.uint8)
        row = N_HEAD_KV * kind.row_bytes(head_dim)
        source, target = self.put(x), Memory(self.queue, n_tokens * row)
        views = (
            self.view(source, 0, n_tokens, x.strides[0], 4),
            self.view(target, kind.number, n_tokens, row, kind.bytes),
        )
        self.native.check(self.lib.tq_cuda_encode(views[0], self.ffi.NULL, views[1], self.queue.handle))
        out = np.empty((n_tokens, row), np.uint8)
        self.queue.copy(target.pointer, out.ctypes.data, out.nbytes, 2)
        return out

    def attention(self, types: str, shape: Shape, n_copies: int) -> Callable[[int, int], None]:
        """Launches call i on a stream."""
        ffi, kinds = self.ffi, kv_types(types)
        blocks = {type: self.encoded(type, shape.head_dim, min(shape.n_kv, 1024)) for type in kinds}
        pairs = [[self.put(blocks[type], shape.bytes_of(type)) for type in kinds] for _ in range(n_copies)]
        n_head = N_HEAD_KV * shape.group
        q = self.put(self.random.standard_normal((shape.batch, n_head, shape.head_dim), dtype=np.float32))
        mask = self.put(np.zeros(shape.n_kv, np.float16))
        out = Memory(self.queue, shape.batch * n_head * shape.head_dim * 4)
        args = ffi.new("tq_attn *")
        head_bytes = 4 * shape.head_dim
        args.q.data, args.q.type, args.q.head_dim = ffi.cast("void *", q.pointer), 0, shape.head_dim
        args.q.n_head, args.q.n_stream = n_head, shape.batch
        args.q.stride_token, args.q.stride_head, args.q.stride_stream = head_bytes, head_bytes, n_head * head_bytes
        for operand, type in zip((args.k, args.v), kinds, strict=True):
            row = CACHE_TYPES[type].row_bytes(shape.head_dim)
            operand.type, operand.head_dim, operand.n_head = CACHE_TYPES[type].number, shape.head_dim, N_HEAD_KV
            operand.n_stream = shape.batch
            operand.stride_token, operand.stride_head = N_HEAD_KV * row, row
            operand.stride_stream = shape.n_kv * N_HEAD_KV * row
        args.n_q, args.n_kv, args.scale = 1, shape.n_kv, shape.head_dim**-0.5
        args.mask = ffi.cast("uint16_t *", mask.pointer)
        args.n_mask_head = args.n_mask_stream = 1
        args.mask_stride_row = 2 * shape.n_kv
        args.out = ffi.cast("float *", out.pointer)
        args.out_stride_head, args.out_stride_row = head_bytes, n_head * head_bytes
        args.out_stride_stream = n_head * head_bytes
        n_work = int(self.lib.tq_cuda_attn_work_bytes(args))
        self.native.check(self.lib.tq_cuda_attn_supported(args))
        work = Memory(self.queue, n_work)

        def launch(i: int, stream: int, keep: object = (q, mask, out)) -> None:
            k, v = pairs[i % n_copies]
            args.k.data, args.v.data = ffi.cast("void *", k.pointer), ffi.cast("void *", v.pointer)
            where = ffi.cast("void *", stream)
            self.native.check(self.lib.tq_cuda_attn(args, ffi.cast("void *", work.pointer), where))

        return launch

    def rows(self, step: str, type: str, n_tokens: int) -> tuple[Callable[[int, int], None], int]:
        """Launches an encode or decode, and the bytes it reads and writes."""
        kind, width = CACHE_TYPES[type], N_HEAD_KV * 128
        row = kind.row_bytes(width)
        blocks = self.put(self.encoded(type, 128, min(n_tokens, 1024)), n_tokens * row)
        unit = 4 if step == "encode" else 2
        tile = self.random.standard_normal((min(n_tokens, 1024), width), dtype=np.float32)
        floats = self.put(tile if unit == 4 else tile.astype(np.float16), n_tokens * width * unit)
        ours = self.view(blocks, kind.number, n_tokens, row, kind.bytes)
        plain = self.view(floats, 0 if unit == 4 else 1, n_tokens, width * unit, unit)

        def launch(i: int, stream: int, keep: object = (blocks, floats)) -> None:
            where = self.ffi.cast("void *", stream)
            if step == "encode":
                self.native.check(self.lib.tq_cuda_encode(plain, self.ffi.NULL, ours, where))
            else:
                self.native.check(self.lib.tq_cuda_decode(ours, self.ffi.NULL, 0, plain, where))

        return launch, blocks.n_bytes + floats.n_bytes

    def copy(self, n_bytes: int) -> Callable[[int, int], None]:
        """Launches a copy within the device."""
        source, target = (Memory(self.queue, n_bytes) for _ in range(2))

        def launch(i: int, stream: int) -> None:
            self.queue.copy(source.pointer, target.pointer, n_bytes, 3)

        return launch
