"""How large the scales of K's blocks are, by layer: the step of the quantizer, to which its error is proportional.

Read from llama.cpp's own state of sequence 0, a copy of the used part of the cache; nothing is decoded.
"""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING

import numpy as np

from .._native import import_llama_cpp

if TYPE_CHECKING:
    from ..model.llama import Llama

__all__ = ["k_scales"]


def k_scales(model: Llama) -> dict[int, float]:
    """Mean absolute scale of the blocks of K, by layer.

    Layers whose K is not stored in blocks do not appear. Empty if the cache is, or if llama.cpp's state has a layout
    that is not known here (recurrent layers, positions of several parts).
    """
    llama_cpp = import_llama_cpp()
    size = llama_cpp.llama_state_seq_get_size(model.ctx, 0)
    data = (ctypes.c_uint8 * size)()
    if not model.n_tokens or llama_cpp.llama_state_seq_get_data(model.ctx, data, size, 0) != size:
        return {}
    try:
        return _read(model, memoryview(data).cast("B"))
    except (struct.error, ValueError):
        return {}


def _read(model: Llama, data: memoryview) -> dict[int, float]:
    layers = model.model_info.layers
    scales: dict[int, float] = {}
    at = 8  # after magic and sequence
    for windowed in sorted({layer.window > 0 for layer in layers}):  # full attention first
        n_stream, n_cells = struct.unpack_from("<II", data, at)
        at += 8 + 12 * n_cells  # position, number of sequences and sequence of each cell
        transposed, n_layer = struct.unpack_from("<II", data, at)
        at += 8
        mine = [layer for layer in layers if (layer.window > 0) == windowed]
        if (n_stream, n_layer) != (1, len(mine)) or transposed > 1:
            raise ValueError("another layout")
        for layer in mine:
            kind = model.cache_policy.types(layer.index)[0]
            number, n_row = struct.unpack_from("<iQ", data, at)
            at += 12
            if (number, n_row) != (kind.number, kind.row_bytes(layer.n_head_kv * layer.head_dim_k)):
                raise ValueError("another layout")
            if kind.quantized:  # every block begins with its scale
                blocks = np.frombuffer(data, np.uint8, n_cells * n_row, at).reshape(-1, kind.bytes)
                scales[layer.index] = float(np.abs(blocks[:, :2].copy().view("<f2").astype(np.float32)).mean())
            at += n_cells * n_row
        for layer in mine:  # V lies before the next cache
            kind = model.cache_policy.types(layer.index)[1]
            at += 12 + n_cells * kind.row_bytes(layer.n_head_kv * layer.head_dim_v)
    return scales
