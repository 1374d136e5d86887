"""The tables compiled into the library are the oracle's, and the generated ones can be generated again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tqgguf import reference
from tqgguf.config import CACHE_TYPES
from tqgguf.errors import ArgumentError


@pytest.mark.parametrize(("type", "name"), reference.CODECS)
def test_levels_and_boundaries(native: Any, type: str, name: str) -> None:
    mode = reference.MODES.index(name)
    levels, boundaries = np.zeros(64, dtype=np.float32), np.zeros(64, dtype=np.float32)
    pointers = [native.ffi.from_buffer("float[]", a) for a in (levels, boundaries)]
    n = native.check(native.lib.tq_codebook(CACHE_TYPES[type].number, mode, *pointers))
    book = reference.codebook(type, name)
    np.testing.assert_array_equal(levels[:n], book.levels)
    np.testing.assert_array_equal(boundaries[: len(book.boundaries)], book.boundaries)
    assert not boundaries[len(book.boundaries) :].any()
    assert native.ffi.string(native.lib.tq_mode_name(mode)).decode() == name


def test_signs(native: Any) -> None:
    signs = np.zeros(32, dtype=np.float32)
    native.lib.tq_signs(native.ffi.from_buffer("float[]", signs))
    np.testing.assert_array_equal(signs, reference.SIGNS)


@pytest.mark.parametrize(
    ("type", "mode"), [(0, 0), (299, 0), (306, 0), (300, 3), (300, -1), (302, 1), (303, 2), (304, 1), (305, 2)]
)
def test_what_has_no_codebook(native: Any, type: int, mode: int) -> None:
    with pytest.raises(ArgumentError, match=str(type)):
        native.check(native.lib.tq_codebook(type, mode, native.ffi.NULL, native.ffi.NULL))
