"""What the diagnostics need of libggml: tensors of a running graph, and the conversions a KV cache is written with."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..config import CacheType
from ..errors import ArgumentError, UnsupportedError
from .backends import cpu_backend_path
from .bindings import import_llama_cpp
from .library import library_path

F32 = npt.NDArray[np.float32]

_CONVERSION: Final = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
"""`ggml_from_float_t` and `ggml_to_float_t`: from, to, number of values."""


class Tensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml.h: ne are sizes and nb strides in bytes, the fastest dimension first."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_float * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("block_interleave", ctypes.c_int64),
        ("bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


@functools.cache
def _base() -> Any:
    import_llama_cpp()
    lib = ctypes.CDLL(str(library_path("ggml-base")))
    lib.ggml_op_name.argtypes, lib.ggml_op_name.restype = [ctypes.c_int], ctypes.c_char_p
    lib.ggml_nbytes.argtypes, lib.ggml_nbytes.restype = [ctypes.c_void_p], ctypes.c_size_t
    lib.ggml_get_type_traits.argtypes = [ctypes.c_int]
    lib.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    lib.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    lib.ggml_backend_tensor_get.restype = None
    return lib


@functools.cache
def _cpu() -> Any:
    _base()
    lib = ctypes.CDLL(str(cpu_backend_path()))
    lib.ggml_get_type_traits_cpu.argtypes = [ctypes.c_int]
    # struct ggml_type_traits_cpu begins with from_float, and that is all that is needed of it.
    lib.ggml_get_type_traits_cpu.restype = ctypes.POINTER(ctypes.c_void_p)
    lib.ggml_cpu_init.restype = None
    lib.ggml_cpu_init()  # fills the f16 tables that the conversions read
    return lib


def op_name(tensor: Tensor) -> str:
    """Name of the operation that makes a tensor, such as "FLASH_ATTN_EXT"."""
    name: bytes = _base().ggml_op_name(tensor.op)
    return name.decode()


def tensor_at(address: int) -> Tensor:
    """The tensor a pointer points to; valid while the graph lives."""
    return Tensor.from_address(address)


def read_tensor(tensor: Tensor) -> F32:
    """The values of a tensor of any type, on any backend, contiguous or permuted: a copy.

    Returns:
        (ne[3], ne[2], ne[1], ne[0]) float32.

    Raises:
        UnsupportedError: a row (the fastest dimension) is not contiguous; ggml demands that it is of all that enters
            flash attention.
    """
    lib, address = _base(), ctypes.addressof(tensor)
    traits = lib.ggml_get_type_traits(tensor.type).contents
    if tensor.nb[0] != traits.bytes:
        raise UnsupportedError(f"tensor {tensor.name.decode()} is transposed: its rows are not contiguous")
    raw = np.empty(lib.ggml_nbytes(address), dtype=np.uint8)
    lib.ggml_backend_tensor_get(address, raw.ctypes.data, 0, raw.size)
    row_bytes = tensor.ne[0] // traits.block * traits.bytes
    rows = np.lib.stride_tricks.as_strided(raw, (*tensor.ne[:0:-1], row_bytes), (*tensor.nb[:0:-1], 1), writeable=False)
    return _to_float(tensor.type, rows, tensor.ne[0])


def round_trip(x: F32, kind: CacheType) -> F32:
    """What a KV cache of a type gives back for x: encoded as the CPU backend writes cache rows, and decoded.

    The encoder is `from_float` of `ggml_get_type_traits_cpu`, which the cache write (`SET_ROWS`) calls. For iq4_nl it
    tries one scale where `ggml_quantize_chunk`, which quantizes model files, tries several.

    Args:
        x: (..., n), n a multiple of the type's block.
        kind: the cache type.

    Returns:
        The shape of x, float32.

    Raises:
        ArgumentError: n is no multiple of the block.
    """
    values = np.ascontiguousarray(x, dtype=np.float32)
    row_bytes = kind.row_bytes(values.shape[-1])
    encode = _CONVERSION(_cpu().ggml_get_type_traits_cpu(kind.number)[0])
    rows = np.empty((*values.shape[:-1], row_bytes), dtype=np.uint8)
    encode(values.ctypes.data, rows.ctypes.data, values.size)
    return _to_float(kind.number, rows, values.shape[-1])


def decode_rows(kind: CacheType, rows: npt.NDArray[np.uint8]) -> F32:
    """The values of cache rows, (..., bytes of a row) uint8: (..., values of a row) float32.

    Raises:
        ArgumentError: a row does not hold whole blocks.
    """
    n, odd = divmod(rows.shape[-1], kind.bytes)
    if odd:
        raise ArgumentError(f"rows of {rows.shape[-1]} bytes do not hold whole {kind.name} blocks of {kind.bytes}")
    return _to_float(kind.number, rows, n * kind.block)


def _to_float(number: int, rows: npt.NDArray[np.uint8], n: int) -> F32:
    """Decodes (..., row bytes) of a ggml type into (..., n) float32."""
    data = np.ascontiguousarray(rows)
    decode = _base().ggml_get_type_traits(number).contents.to_float
    if decode is None:  # f32 needs no conversion, and has none
        return data.view(np.float32)
    out = np.empty((*rows.shape[:-1], n), dtype=np.float32)
    _CONVERSION(decode)(data.ctypes.data, out.ctypes.data, out.size)
    return out
