"""The CUDA kernels over rows: the oracle's bytes and floats, and libtqgguf's on many more blocks; ggml's strides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import tqgguf
from tqgguf import reference
from tqgguf.config import CACHE_TYPES

HERE = Path(__file__).parent
I32, I64, BF16 = 26, 27, 30
NUMBERS = {"f32": 0, "f16": 1, "bf16": BF16}


class Tensor:
    """A tq_cuda_view over an array whose last axis holds values, or a block's bytes."""

    def __init__(self, cuda: Any, array: npt.NDArray[Any], type: str, mode: str = "search", view: Any = None) -> None:
        ours = type in reference.TYPES
        self.memory = cuda.put(array)
        shown = array if view is None else view(array)
        start = shown.__array_interface__["data"][0] - array.__array_interface__["data"][0]
        size = reference.BLOCK_BYTES[type] if ours else shown.strides[-1]
        shape = [*shown.shape[::-1], 1, 1, 1][:4]
        strides = [*shown.strides[::-1], 0, 0, 0][:4]
        if ours:
            shape[0] = shape[0] // size * 32
        strides[0] = size
        number = CACHE_TYPES[type].number if ours else NUMBERS[type]
        at = cuda.ffi.cast("void *", self.memory.pointer + start)
        self.view = cuda.ffi.new("tq_cuda_view *", (at, number, reference.MODES.index(mode), shape, strides))

    def read(self) -> npt.NDArray[Any]:
        array: npt.NDArray[Any] = self.memory.read()
        return array


def rows_of(cuda: Any, numbers: npt.NDArray[Any]) -> Any:
    memory = cuda.put(numbers)
    shape = [*numbers.shape[::-1], 1, 1][:3]
    strides = [*numbers.strides[::-1], 0, 0][:3]
    return cuda.ffi.new("tq_cuda_index *", (memory.address, I64 if numbers.dtype == np.int64 else I32, shape, strides))


def encode(cuda: Any, source: Tensor, target: Tensor, rows: Any = None) -> None:
    cuda.check(cuda.lib.tq_cuda_encode(source.view, rows or cuda.ffi.NULL, target.view, cuda.ffi.NULL))


def decode(cuda: Any, source: Tensor, target: Tensor, rows: Any = None, transformed: int = 0) -> None:
    null = cuda.ffi.NULL
    cuda.check(cuda.lib.tq_cuda_decode(source.view, rows or null, transformed, target.view, null))


def encoded(cuda: Any, x: npt.NDArray[Any], type: str, mode: str = "search", source: str = "f32") -> npt.NDArray[Any]:
    n_blocks = x.shape[-1] // (reference.BLOCK_BYTES[source] if source in reference.TYPES else 32)
    out = Tensor(cuda, np.full((*x.shape[:-1], n_blocks * reference.BLOCK_BYTES[type]), 0xAA, np.uint8), type, mode)
    encode(cuda, Tensor(cuda, x, source), out)
    return out.read()


def decoded(cuda: Any, blocks: npt.NDArray[Any], type: str, mode: str = "search", **options: Any) -> npt.NDArray[Any]:
    n = blocks.shape[-1] // reference.BLOCK_BYTES[type] * 32
    out = Tensor(cuda, np.full((*blocks.shape[:-1], n), np.nan, np.float32), "f32")
    decode(cuda, Tensor(cuda, blocks, type, mode), out, **options)
    return out.read()


def any_blocks(n: int, seed: int) -> npt.NDArray[np.float32]:
    """Random blocks of all sizes, offsets and outliers; random bits, so NaN and infinities too; the limits."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 32)).astype(np.float32)
    x[: n // 4] *= np.exp2(rng.integers(-30, 18, (n // 4, 1))).astype(np.float32)
    x[n // 4 : n // 2] += rng.standard_normal((n // 2 - n // 4, 1)).astype(np.float32) * 8
    x[n // 2 : 5 * n // 8, 3] *= 40
    x[-n // 8 :] = rng.integers(0, 2**32, (len(x[-n // 8 :]), 32), dtype=np.uint32).view(np.float32)
    values = (0.0, -0.0, 1.0, -1.0, 65504.0, 65520.0, 1e30, 1e-30, 2.0**-24, 2.0**-149, np.nan, np.inf, -np.inf)
    for i, value in enumerate(values):
        x[4 * i] = value
        x[4 * i + 1] = np.where(np.arange(32) % 2, value, -value)
        x[4 * i + 2, i % 32] = value
        x[4 * i + 3] = np.where(np.arange(32) == i, value, 0)
    return x


@pytest.mark.filterwarnings("ignore:overflow")
def test_golden_vectors(cuda: Any) -> None:
    vectors = json.loads((HERE / "vectors.json").read_text())
    x = np.frombuffer(bytes.fromhex("".join(vectors["inputs"])), dtype="<f4").reshape(-1, 32).astype(np.float32)
    for codec, blocks in vectors["blocks"].items():
        type, mode = codec.split("/")
        expected = np.frombuffer(bytes.fromhex("".join(blocks)), dtype=np.uint8).reshape(len(x), -1)
        np.testing.assert_array_equal(encoded(cuda, x, type, mode), expected)
        np.testing.assert_array_equal(decoded(cuda, expected, type, mode), reference.decode(expected, type, mode))


@pytest.mark.parametrize(("type", "mode"), reference.CODECS)
@pytest.mark.filterwarnings("ignore:overflow")
def test_blocks_equal_the_cpus(cuda: Any, type: str, mode: str) -> None:
    # 100,000 blocks where threads are emulated, 1,000,000 on a GPU; the oracle itself sees a part
    n = (20_000 if type.startswith("pqt") else 10_000) if cuda.emulated else 125_000
    x = any_blocks(n, seed=reference.CODECS.index((type, mode)))
    expected = tqgguf.quantize(x, type, mode)
    np.testing.assert_array_equal(encoded(cuda, x, type, mode), expected)
    np.testing.assert_array_equal(expected[:1000], reference.encode(x[:1000], type, mode))
    np.testing.assert_array_equal(decoded(cuda, expected, type, mode), tqgguf.dequantize(expected, type, mode))


@pytest.mark.parametrize(("type", "mode"), reference.CODECS)
def test_any_bytes_decode(cuda: Any, type: str, mode: str) -> None:
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (1001, reference.BLOCK_BYTES[type]), dtype=np.uint8)
    want = tqgguf.dequantize(blocks, type, mode)
    np.testing.assert_array_equal(decoded(cuda, blocks, type, mode), want)
    inner = decoded(cuda, blocks, type, mode, transformed=1)
    np.testing.assert_array_equal(reference.inverse_transform(inner, mode), want)


def bf16(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    u = x.view(np.uint32)
    return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)


@pytest.mark.parametrize("type", reference.TYPES)
def test_other_sources_and_targets(cuda: Any, type: str) -> None:
    x = np.random.default_rng(3).standard_normal((7, 96)).astype(np.float32)
    half, brain = x.astype(np.float16), bf16(x)
    np.testing.assert_array_equal(
        encoded(cuda, half, type, source="f16"), tqgguf.quantize(half.astype(np.float32), type)
    )
    wide = (brain.astype(np.uint32) << 16).view(np.float32)
    blocks = tqgguf.quantize(wide, type)
    np.testing.assert_array_equal(encoded(cuda, brain, type, source="bf16"), blocks)
    values = tqgguf.dequantize(blocks, type)
    out = Tensor(cuda, np.zeros((7, 96), np.float16), "f16")
    decode(cuda, Tensor(cuda, blocks, type), out)
    np.testing.assert_array_equal(out.read(), values.astype(np.float16))
    out = Tensor(cuda, np.zeros((7, 96), np.uint16), "bf16")
    decode(cuda, Tensor(cuda, blocks, type), out)
    np.testing.assert_array_equal(out.read(), bf16(values))
    for other in reference.TYPES:
        np.testing.assert_array_equal(encoded(cuda, blocks, other, source=type), tqgguf.quantize(values, other))


@pytest.mark.parametrize("type", ["pqo3", "pqt4", "pqt5"])
@pytest.mark.parametrize("number", [np.int32, np.int64])
def test_set_rows_and_get_rows(cuda: Any, type: str, number: Any) -> None:
    rng = np.random.default_rng(4)
    size = reference.BLOCK_BYTES[type]
    x = rng.standard_normal((2, 3, 9, 64)).astype(np.float32)  # of which rows 1, 3, 5, 7 are stored
    numbers = np.array(
        [[[5, 0, 11, 3]], [[2, 7, 1, 12]]], number
    )  # one set per stream, for all planes; 12 is out of range
    target = np.full((2, 3, 12, 3 * size), 0x55, np.uint8)
    source = Tensor(cuda, x, "f32", view=lambda a: a[:, :, 1:8:2])
    out = Tensor(cuda, target, type, view=lambda a: a[..., size:])
    encode(cuda, source, out, rows_of(cuda, numbers))
    want = target.copy()
    for i3 in range(2):
        for i2 in range(3):
            for i1 in range(4):
                row = numbers[i3, 0, i1]
                if row < 12:
                    want[i3, i2, row, size:] = tqgguf.quantize(x[i3, i2, 1 + 2 * i1], type).reshape(-1)
    np.testing.assert_array_equal(out.read(), want)
    back = Tensor(cuda, np.full((2, 3, 4, 70), np.nan, np.float32), "f32", view=lambda a: a[..., 3:67])
    decode(cuda, Tensor(cuda, want, type, view=lambda a: a[..., size:]), back, rows_of(cuda, np.repeat(numbers, 3, 1)))
    got = back.read()
    assert np.isnan(got[..., :3]).all() and np.isnan(got[..., 67:]).all()
    for i3 in range(2):
        for i1 in range(4):
            row = numbers[i3, 0, i1]
            for i2 in range(3):
                stored = tqgguf.dequantize(want[i3, i2, row, size:], type) if row < 12 else np.zeros(64)
                np.testing.assert_array_equal(got[i3, i2, i1, 3:67], stored.reshape(-1))


@pytest.mark.parametrize("type", ["pqo4", "pqt3", "pqt2"])
def test_copies_between_shapes(cuda: Any, type: str) -> None:
    # the same sequence of values in other shapes, rows of 20 values, and steps of two values
    x = np.random.default_rng(5).standard_normal((16, 20)).astype(np.float32)
    wide = np.zeros((16, 20, 2), np.float32)
    wide[..., 0] = x
    size = reference.BLOCK_BYTES[type]
    out = Tensor(cuda, np.zeros((5, 2 * size), np.uint8), type)
    encode(cuda, Tensor(cuda, wide, "f32", view=lambda a: a[..., 0]), out)
    want = tqgguf.quantize(x.reshape(5, 64), type)
    np.testing.assert_array_equal(out.read().reshape(want.shape), want)
    back = Tensor(cuda, np.full((16, 20, 2), 7, np.float32), "f32", view=lambda a: a[..., 1])
    decode(cuda, out, back)
    np.testing.assert_array_equal(back.read()[..., 1], tqgguf.dequantize(want, type).reshape(16, 20))
    assert (back.read()[..., 0] == 7).all()


@pytest.mark.parametrize("mode", reference.MODES)
@pytest.mark.parametrize("number", [np.int32, np.int64])
@pytest.mark.filterwarnings("ignore:overflow")
def test_tails(cuda: Any, mode: str, number: Any) -> None:
    """Of the tokens that share a row the last one stays, whatever order the kernels run in."""
    rng = np.random.default_rng(7)
    n_recent, n_first, n_cells, n_stream, n = 5, 2, 40, 2, 60
    x = any_blocks(4 * n, seed=8).reshape(n, 128)
    cells = rng.integers(-3, n_cells * n_stream + 3, n)  # some out of range
    rows = np.full((n_stream, n_recent + n_first, 128), 0x7777, np.uint16)
    owner = rng.integers(0, 2, rows.shape[:2]).astype(np.int32)
    want, want_owner = rows.copy(), owner.copy()
    for i, cell in enumerate(cells):
        if 0 <= cell < n_cells * n_stream:
            stream, token = divmod(int(cell), n_cells)
            row = n_recent + token if token < n_first else token % n_recent
            want[stream, row] = reference.encode_tail(x[i], mode).view(np.uint16)
            want_owner[stream, row] = token + 1
    data, owners = cuda.put(rows), cuda.put(owner)
    sizes = (n_recent, n_first, n_cells, n_stream, *rows.strides[1::-1], owner.strides[0])
    tail = cuda.ffi.new("tq_cuda_tail *", (data.address, owners.address, *sizes))
    index = rows_of(cuda, cells.astype(number))
    source = Tensor(cuda, x, "f32")
    number_of_mode = reference.MODES.index(mode)
    cuda.check(cuda.lib.tq_cuda_tail_encode(source.view, index, number_of_mode, tail, cuda.ffi.NULL))
    np.testing.assert_array_equal(data.read(), want)
    np.testing.assert_array_equal(owners.read(), want_owner)

    # and back, as two heads of 64, into the first 30 tokens
    operand = cuda.ffi.new("tq_attn_operand *")
    operand.type, operand.mode = CACHE_TYPES["pqo3"].number, number_of_mode
    operand.head_dim, operand.n_head, operand.n_stream = 64, 2, n_stream
    operand.tail.data, operand.tail.owner = data.address, owners.address
    operand.tail.n_recent, operand.tail.n_first, operand.tail.stride_head = n_recent, n_first, 128
    operand.tail.stride_stream, operand.tail.stride_row = rows.strides[:2]
    operand.tail.owner_stride_stream = owner.strides[0]
    values = rng.standard_normal((n_stream, 30, 2, 64)).astype(np.float16)
    out = Tensor(cuda, values, "f16")
    cuda.check(cuda.lib.tq_cuda_tail_decode(operand, out.view, cuda.ffi.NULL))
    for stream, row in np.argwhere(want_owner > 0):
        token = want_owner[stream, row] - 1
        at = n_recent + token if token < n_first else token % n_recent
        if token < 30 and at == row:
            values[stream, token] = reference.decode_tail(want[stream, row].view(np.float16), mode).reshape(2, 64)
    np.testing.assert_array_equal(out.read(), values)


@pytest.mark.parametrize("mode", reference.MODES)
def test_transform(cuda: Any, mode: str) -> None:
    x = np.random.default_rng(6).standard_normal((37, 32)).astype(np.float32)
    for inverse, function in ((0, reference.transform), (1, reference.inverse_transform)):
        source, target = cuda.put(x), cuda.put(np.zeros_like(x))
        number = reference.MODES.index(mode)
        cuda.check(cuda.lib.tq_cuda_transform(source.address, x.size, number, inverse, target.address, cuda.ffi.NULL))
        np.testing.assert_array_equal(target.read(), function(x, mode))


def test_bad_arguments_are_named(cuda: Any) -> None:
    x = np.zeros((2, 64), np.float32)
    source = Tensor(cuda, x, "f32")
    for change, text in (
        ({"type": 5}, "type 5"),
        ({"mode": 7}, "mode 7"),
        ({"data": cuda.ffi.NULL}, "null pointer"),
        ({"nb": (14, 15, 0, 0)}, "multiples of 2"),
        ({"nb": (28, 56, 0, 0)}, "14 bytes"),
        ({"ne": (48, 2, 1, 1)}, "multiple of 32"),
        ({"ne": (64, 3, 1, 1)}, "128 values given for 192"),
        ({"ne": (64, -1, 1, 1)}, "ne[1] = -1"),
    ):
        target = Tensor(cuda, np.zeros((2, 28), np.uint8), "pqo3")
        for name, value in change.items():
            setattr(target.view, name, value)
        assert cuda.lib.tq_cuda_encode(source.view, cuda.ffi.NULL, target.view, cuda.ffi.NULL) == -1
        assert text in cuda.message()
