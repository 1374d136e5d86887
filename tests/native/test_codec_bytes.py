"""Every kernel writes the oracle's bytes and reads them back to the oracle's floats."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tqgguf
from tqgguf import reference

any_float = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)


def edge_blocks() -> npt.NDArray[np.float32]:
    """Blocks at the limits: zeros, one value, equal values, largest and smallest magnitudes, NaN and infinity."""
    rng = np.random.default_rng(11)
    rows = [np.full(32, value) for value in (0.0, -0.0, 1.0, -1.0, 65504.0, 65520.0, 1e30, 1e-30, 2.0**-24, 2.0**-149)]
    rows += [np.eye(32)[i] * value for i, value in ((0, 1.0), (31, -7.5), (7, 65504.0), (3, 2.0**-14), (9, 6e-8))]
    rows += [np.where(np.arange(32) % 2, a, b) for a, b in ((1, -1), (np.nan, 1), (np.inf, 0), (-np.inf, np.inf))]
    rows += [rng.standard_normal(32) * 2.0**e for e in range(-30, 18)]
    rows += [np.full(32, np.nan), reference.SIGNS * 3.0, reference.inverse_transform(np.eye(32, dtype=np.float32)[5])]
    return np.array(rows, dtype=np.float64).astype(np.float32)


def assert_equal_to_oracle(x: npt.NDArray[np.float32], type: str, mode: str) -> None:
    expected = reference.encode(x, type, mode)
    np.testing.assert_array_equal(tqgguf.quantize(x, type, mode), expected)
    np.testing.assert_array_equal(tqgguf.dequantize(expected, type, mode), reference.decode(expected, type, mode))


@pytest.mark.parametrize(("type", "mode"), reference.CODECS)
@pytest.mark.filterwarnings("ignore:overflow")
def test_random_and_edge_blocks(kernel: str, type: str, mode: str) -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((20_000, 32)).astype(np.float32)
    x[5000:10_000] *= np.exp2(rng.integers(-26, 17, (5000, 1))).astype(np.float32)
    x[10_000:15_000] += rng.standard_normal((5000, 1)).astype(np.float32) * 8
    x[15_000:, 3] *= 40
    assert_equal_to_oracle(np.concatenate((x, edge_blocks())), type, mode)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    x=hnp.arrays(np.float32, st.tuples(st.integers(1, 9), st.just(32)), elements=any_float),
    codec=st.sampled_from(reference.CODECS),
)
def test_any_floats(kernel: str, x: npt.NDArray[np.float32], codec: tuple[str, str]) -> None:
    assert_equal_to_oracle(x, *codec)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=22 * 7, max_size=22 * 7), codec=st.sampled_from(reference.CODECS))
def test_any_bytes_decode(kernel: str, data: bytes, codec: tuple[str, str]) -> None:
    type, mode = codec
    size = reference.BLOCK_BYTES[type]
    blocks = np.frombuffer(data[: 7 * size], dtype=np.uint8)
    np.testing.assert_array_equal(tqgguf.dequantize(blocks, type, mode), reference.decode(blocks, type, mode))


@pytest.mark.parametrize("type", ["pqo3", "pqo4"])
def test_values_on_a_boundary_take_the_lower_index(kernel: str, type: str) -> None:
    # One value fixes the scale, the others sit exactly on decision boundaries of maxnorm after the transform.
    book = reference.codebook(type, "maxnorm")
    y = np.resize(np.concatenate((book.boundaries, [book.levels[-1]])), 32).astype(np.float32)
    y[0] = book.levels[-1]
    x = reference.inverse_transform(y[None], "maxnorm")
    assert_equal_to_oracle(x, type, "maxnorm")


@pytest.mark.parametrize("offset", range(1, 8))
def test_unaligned_pointers(kernel: str, native: Any, offset: int) -> None:
    x = np.random.default_rng(offset).standard_normal(5 * 32).astype(np.float32)
    for type in reference.TYPES:
        expected = reference.encode(x, type)
        source = np.zeros(x.nbytes + 8, dtype=np.uint8)
        source[offset : offset + x.nbytes] = x.view(np.uint8)
        target = np.zeros(expected.nbytes + 8, dtype=np.uint8)
        pointers = [native.ffi.cast("char *", native.ffi.from_buffer(a)) + offset for a in (source, target)]
        number = tqgguf.CACHE_TYPES[type].number
        native.check(native.lib.tq_encode(number, 0, native.ffi.cast("float *", pointers[0]), x.size, pointers[1]))
        np.testing.assert_array_equal(target[offset : offset + expected.nbytes], expected)
        assert not target[:offset].any() and not target[offset + expected.nbytes :].any()


@pytest.mark.parametrize("type", reference.TYPES)
def test_dot_equals_decoded_dot(kernel: str, native: Any, tolerance: float, type: str) -> None:
    rng = np.random.default_rng(0)
    for n in (32, 64, 128, 576):
        x, y = (rng.standard_normal(n).astype(np.float32) for _ in range(2))
        for name in (mode for codec_type, mode in reference.CODECS if codec_type == type):
            encoded = reference.encode(x, type, name)
            got = native.lib.tq_dot(
                tqgguf.CACHE_TYPES[type].number,
                reference.MODES.index(name),
                native.ffi.from_buffer(encoded),
                native.ffi.from_buffer("float[]", y),
                n,
            )
            decoded = reference.decode(encoded, type, name).astype(np.float64)
            assert got == pytest.approx(decoded @ y, abs=tolerance * np.linalg.norm(decoded) * np.linalg.norm(y))
