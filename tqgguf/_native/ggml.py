"""What the diagnostics need of libggml: tensors of a running graph, and the conversions a KV cache is written with."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import CacheType
from ..errors import ArgumentError, UnsupportedError
from .backends import cpu_backend_path
from .bindings import import_llama_cpp
from .libggml import base, ffi, library_of

F32 = npt.NDArray[np.float32]

Tensor = Any
"""A pointer to a `struct ggml_tensor`, whose fields can be read."""


@functools.cache
def _base() -> Any:
    import_llama_cpp()
    return base()


@functools.cache
def _cpu() -> Any:
    import_llama_cpp()
    lib = library_of(str(cpu_backend_path()))
    lib.ggml_cpu_init()  # fills the f16 tables that the conversions read
    return lib


def op_name(tensor: Tensor) -> str:
    """Name of the operation that makes a tensor, such as "FLASH_ATTN_EXT"."""
    return str(ffi().string(_base().ggml_op_name(tensor.op)).decode())


def tensor_at(where: Any) -> Tensor:
    """The tensor at an address, or at one of the pointers in a tensor; valid while the graph lives."""
    return ffi().cast("struct ggml_tensor *", where)


def tensor_name(tensor: Tensor) -> bytes:
    """The name that llama.cpp gave a tensor."""
    name: bytes = ffi().string(tensor.name)
    return name


def read_tensor(tensor: Tensor) -> F32:
    """The values of a tensor of any type, on any backend, contiguous or permuted: a copy.

    Returns:
        (ne[3], ne[2], ne[1], ne[0]) float32.

    Raises:
        UnsupportedError: a row (the fastest dimension) is not contiguous; ggml demands that it is of all that enters
            flash attention.
    """
    lib = _base()
    traits, sizes, strides = lib.ggml_get_type_traits(tensor.type), list(tensor.ne), list(tensor.nb)
    if strides[0] != traits.type_size:
        raise UnsupportedError(f"tensor {tensor_name(tensor).decode()} is transposed: its rows are not contiguous")
    raw = np.empty(lib.ggml_nbytes(tensor), dtype=np.uint8)
    lib.ggml_backend_tensor_get(tensor, ffi().from_buffer(raw, require_writable=True), 0, raw.size)
    row_bytes = sizes[0] // traits.blck_size * traits.type_size
    rows = np.lib.stride_tricks.as_strided(raw, (*sizes[:0:-1], row_bytes), (*strides[:0:-1], 1), writeable=False)
    return _to_float(tensor.type, rows, sizes[0])


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
    rows = np.empty((*values.shape[:-1], row_bytes), dtype=np.uint8)
    encode = _cpu().ggml_get_type_traits_cpu(kind.number).from_float
    encode(ffi().from_buffer("float[]", values), ffi().from_buffer(rows, require_writable=True), values.size)
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
    decode = _base().ggml_get_type_traits(number).to_float
    if not decode:  # f32 needs no conversion, and has none
        return data.view(np.float32)
    out = np.empty((*rows.shape[:-1], n), dtype=np.float32)
    decode(ffi().from_buffer(data), ffi().from_buffer("float[]", out, require_writable=True), out.size)
    return out
