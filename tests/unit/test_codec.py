"""quantize and dequantize: shapes, types, and refusals. Bytes are compared with the oracle in tests/native."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tqgguf
from tqgguf import reference
from tqgguf.errors import ArgumentError


@pytest.mark.parametrize("shape", [(32,), (2, 96), (3, 1, 2, 64), (0, 32), (2, 0)])
def test_shapes(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    encoded = tqgguf.quantize(x, "pqo3")
    assert encoded.dtype == np.uint8 and encoded.shape == (*shape[:-1], shape[-1] // 32 * 14)
    decoded = tqgguf.dequantize(encoded, "pqo3")
    assert decoded.dtype == np.float32 and decoded.shape == shape


def test_float16_and_strided_input_equal_their_copies() -> None:
    x = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float16)
    expected = reference.encode(x.T.astype(np.float32), "pqo4")
    np.testing.assert_array_equal(tqgguf.quantize(x.T, "pqo4"), expected)
    np.testing.assert_array_equal(
        tqgguf.quantize(x.astype(np.float32)[:, ::2], "pqo4"), reference.encode(x[:, ::2], "pqo4")
    )
    every_other = np.repeat(expected, 2, axis=0)[::2]
    np.testing.assert_array_equal(tqgguf.dequantize(every_other, "pqo4"), reference.decode(expected, "pqo4"))


def test_byte_swapped_input_is_refused() -> None:
    x = np.random.default_rng(0).standard_normal(64).astype(">f4")
    with pytest.raises(ArgumentError, match=">f4"):
        tqgguf.quantize(x, "pqo3")


@pytest.mark.parametrize(
    "x", [np.zeros(32), np.zeros(32, dtype=np.int32), [0.0] * 32, None, np.zeros(32, dtype=complex)]
)
def test_only_float32_and_float16(x: Any) -> None:
    with pytest.raises(ArgumentError, match="float32 or float16"):
        tqgguf.quantize(x, "pqo3")


@pytest.mark.parametrize("shape", [(), (33,), (32, 1), (2, 31)])
def test_the_last_axis_holds_blocks(shape: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match="multiple of 32"):
        tqgguf.quantize(np.zeros(shape, dtype=np.float32), "pqo3")


def test_unknown_names_list_the_valid_ones() -> None:
    x = np.zeros(32, dtype=np.float32)
    with pytest.raises(ArgumentError, match="'q4_0'; valid types are pqo3, pqo4, pqt2, pqt3, pqt4, pqt5"):
        tqgguf.quantize(x, "q4_0")
    with pytest.raises(ArgumentError, match="type 302 in mode 1"):
        tqgguf.quantize(x, "pqt3", "maxnorm")
    with pytest.raises(ArgumentError, match="'Search'; valid modes are search, maxnorm, l2norm"):
        tqgguf.quantize(x, "pqo3", "Search")
    with pytest.raises(ArgumentError, match="pqo3, pqo4"):
        tqgguf.dequantize(np.zeros(14, dtype=np.uint8), "pqo2")


@pytest.mark.parametrize("b", [np.zeros(14), np.zeros(14, dtype=np.int8), b"\0" * 14, np.zeros(13, np.uint8)])
def test_dequantize_takes_whole_blocks_of_bytes(b: Any) -> None:
    with pytest.raises(ArgumentError, match=r"uint8|14 bytes"):
        tqgguf.dequantize(b, "pqo3")
