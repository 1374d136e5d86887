"""Blocks of our types from and to NumPy arrays, through libtqgguf."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .._native import library
from ..config import CACHE_TYPES, MODES, CacheType
from ..errors import ArgumentError

_OURS = tuple(sorted(name for name, kind in CACHE_TYPES.items() if kind.ours))


def quantize(x: npt.NDArray[np.floating[Any]], type: str, mode: str = "search") -> npt.NDArray[np.uint8]:
    """Encodes values into blocks along the last axis.

    NaN encodes as 0 and magnitudes above 65504, infinities too, as +-65504. The bytes are the same on every machine
    and equal those of `reference.encode`.

    Args:
        x: (..., n) float32 or float16, n a multiple of 32.
        type: "pqt2" (10 bytes per 32 values), "pqo3" or "pqt3" (14), "pqo4" or "pqt4" (18), or "pqt5" (22).
        mode: how block scales are found: "search", and for "pqo3" and "pqo4" also "maxnorm" or "l2norm". The bytes do
            not tell it: a reader must know.

    Returns:
        (..., n / 32 * block bytes) uint8.

    Raises:
        ArgumentError: unknown type or mode, a mode the type does not have, another dtype, or n is no multiple of 32.
        LibraryError: libtqgguf is missing or of another version.
    """
    kind, mode_number = _codec(type, mode)
    values = as_float32(x, "x")
    if values.ndim == 0 or values.shape[-1] % kind.block:
        raise ArgumentError(f"the last axis of x must be a multiple of {kind.block} values, shape is {values.shape}")
    out = np.empty((*values.shape[:-1], kind.row_bytes(values.shape[-1])), dtype=np.uint8)
    native = library()
    source, target = (native.ffi.from_buffer(array) for array in (values, out))
    native.check(
        native.lib.tq_encode(kind.number, mode_number, native.ffi.cast("float *", source), values.size, target)
    )
    return out


def dequantize(b: npt.NDArray[np.uint8], type: str, mode: str = "search") -> npt.NDArray[np.float32]:
    """Decodes blocks along the last axis.

    Any bytes are valid; a scale that is NaN or infinite decodes as 0.

    Args:
        b: (..., n_blocks * block bytes) uint8, as `quantize` returns it.
        type: "pqo3", "pqo4", or "pqt2" to "pqt5".
        mode: the mode the blocks were encoded in.

    Returns:
        (..., n_blocks * 32) float32.

    Raises:
        ArgumentError: unknown type or mode, a mode the type does not have, another dtype, or the last axis does not
            hold whole blocks.
        LibraryError: libtqgguf is missing or of another version.
    """
    kind, mode_number = _codec(type, mode)
    if not isinstance(b, np.ndarray) or b.dtype != np.uint8:
        raise ArgumentError(f"b must be a NumPy array of uint8, not {_describe(b)}")
    if b.ndim == 0 or b.shape[-1] % kind.bytes:
        raise ArgumentError(
            f"the last axis of b must hold whole {kind.name} blocks of {kind.bytes} bytes, shape is {b.shape}"
        )
    data = np.ascontiguousarray(b)
    out = np.empty((*b.shape[:-1], b.shape[-1] // kind.bytes * kind.block), dtype=np.float32)
    native = library()
    source, target = (native.ffi.from_buffer(array) for array in (data, out))
    native.check(native.lib.tq_decode(kind.number, mode_number, source, out.size, native.ffi.cast("float *", target)))
    return out


def as_float32(x: object, name: str) -> npt.NDArray[np.float32]:
    """x as C-contiguous float32; copies only if it must.

    Raises:
        ArgumentError: x is no NumPy array of float32 or float16.
    """
    if not isinstance(x, np.ndarray) or x.dtype not in (np.float32, np.float16):
        raise ArgumentError(f"{name} must be a NumPy array of float32 or float16, not {_describe(x)}")
    return np.asarray(x, dtype=np.float32, order="C")


def _codec(type: str, mode: str) -> tuple[CacheType, int]:
    if type not in _OURS:
        raise ArgumentError(f"unknown type {type!r}; valid types are {', '.join(_OURS)}")
    if mode not in MODES:
        raise ArgumentError(f"unknown mode {mode!r}; valid modes are {', '.join(MODES)}")
    return CACHE_TYPES[type], MODES.index(mode)


def _describe(x: object) -> str:
    return f"an array of {x.dtype}" if isinstance(x, np.ndarray) else x.__class__.__name__
