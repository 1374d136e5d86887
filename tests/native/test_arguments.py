"""The C interface refuses what no caller should pass: null pointers, negative and huge counts, unknown numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tqgguf.errors import ArgumentError, OutOfMemoryError


@pytest.fixture
def cache(native: Any) -> Iterator[Any]:
    handle = native.ffi.new("tq_cache **")
    native.check(native.lib.tq_cache_new(native.ffi.new("tq_cache_config *", (3, 64, 2, 2, 0)), handle))
    yield handle[0]
    native.lib.tq_cache_free(handle[0])


@pytest.mark.parametrize("n", [-32, -1, 1, 31, 33, -(2**62)])
def test_counts_of_values(native: Any, n: int) -> None:
    x = native.ffi.new("float[64]")
    for call in (
        lambda: native.lib.tq_encode(300, 0, x, n, x),
        lambda: native.lib.tq_decode(300, 0, x, n, x),
    ):
        with pytest.raises(ArgumentError, match=str(n)):
            native.check(call())
    assert native.lib.tq_row_bytes(300, n) == 0
    assert native.lib.tq_dot(300, 0, x, x, n) != native.lib.tq_dot(300, 0, x, x, n)  # NaN


@pytest.mark.parametrize(
    ("type", "mode"), [(0, 0), (299, 0), (306, 0), (-1, 0), (300, 3), (301, -1), (302, 1), (303, 2), (304, 1), (305, 2)]
)
def test_unknown_types_and_modes(native: Any, type: int, mode: int) -> None:
    x = native.ffi.new("float[64]")
    with pytest.raises(ArgumentError, match=f"type {type} in mode {mode}"):
        native.check(native.lib.tq_encode(type, mode, x, 32, x))
    with pytest.raises(ArgumentError, match="pqo3, pqo4"):
        native.check(native.lib.tq_decode(type, mode, x, 32, x))


def test_null_pointers(native: Any, cache: Any) -> None:
    ffi, lib = native.ffi, native.lib
    x = ffi.new("float[256]")
    calls = [
        lambda: lib.tq_encode(300, 0, ffi.NULL, 32, x),
        lambda: lib.tq_decode(300, 0, x, 32, ffi.NULL),
        lambda: lib.tq_cache_new(ffi.NULL, ffi.new("tq_cache **")),
        lambda: lib.tq_cache_new(ffi.new("tq_cache_config *", (3, 64, 2, 2, 0)), ffi.NULL),
        lambda: lib.tq_cache_prefill(cache, 0, ffi.NULL, x, 1, ffi.NULL, ffi.NULL),
        lambda: lib.tq_cache_prefill(cache, 0, x, x, 1, x, ffi.NULL),
        lambda: lib.tq_cache_prefill(ffi.NULL, 0, x, x, 1, ffi.NULL, ffi.NULL),
        lambda: lib.tq_cache_decode(cache, 0, x, x, ffi.NULL, 2, 1.0, x),
        lambda: lib.tq_cache_seq_len(ffi.NULL, 0),
        lambda: lib.tq_cache_reset(ffi.NULL),
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match=r"null pointer|one of"):
            native.check(call())
    native.lib.tq_cache_free(ffi.NULL)
    assert lib.tq_cache_memory_usage(ffi.NULL) == 0
    assert lib.tq_cache_seq_len(cache, 0) == 0


@pytest.mark.parametrize("n", [-1, -(2**63), 2**40, 2**62, 2**63 - 1])
def test_negative_and_huge_counts_of_tokens(native: Any, cache: Any, n: int) -> None:
    x = native.ffi.new("float[128]")
    native.check(native.lib.tq_cache_prefill(cache, 1, x, x, 1, native.ffi.NULL, native.ffi.NULL))
    used = native.lib.tq_cache_memory_usage(cache)
    with pytest.raises((ArgumentError, OutOfMemoryError)):
        native.check(native.lib.tq_cache_prefill(cache, 1, x, x, n, native.ffi.NULL, native.ffi.NULL))
    with pytest.raises(ArgumentError, match="layer 1 has 1"):
        native.check(native.lib.tq_cache_truncate(cache, 1, n))
    assert native.lib.tq_cache_seq_len(cache, 1) == 1
    assert native.lib.tq_cache_memory_usage(cache) == used


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ((5, 64, 2, 2, 0), "bits = 5"),
        ((3, 80, 2, 2, 0), "head_dim = 80"),
        ((3, 0, 2, 2, 0), "head_dim = 0"),
        ((3, 64, 0, 2, 0), "n_head_kv = 0"),
        ((3, 64, 2, -1, 0), "n_layer = -1"),
        ((3, 2**30, 2**10, 1, 0), "at most"),
        ((4, 64, 2, 2, 7), "mode 7"),
    ],
)
def test_configurations(native: Any, config: tuple[int, ...], said: str) -> None:
    handle = native.ffi.new("tq_cache **")
    with pytest.raises(ArgumentError, match=said):
        native.check(native.lib.tq_cache_new(native.ffi.new("tq_cache_config *", config), handle))
    assert handle[0] == native.ffi.NULL
