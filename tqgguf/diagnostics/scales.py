"""The scales of K's blocks by layer: the steps of the quantizer, to which its error is proportional.

They are read from llama.cpp's state of sequence 0, which is a copy of the used part of the cache. Nothing is decoded.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .._native import import_llama_cpp
from ..config import CacheType
from ..errors import TqggufError
from ..session.state import parse_state

if TYPE_CHECKING:
    from ..model.llama import Llama


def k_scales(model: Llama) -> dict[int, float]:
    """The mean absolute scale of the blocks of K, by layer; nothing for layers whose K has no blocks or no cells.

    Raises:
        UnsupportedError: the model has no KV cache, or one whose layout is not known here.
        TqggufError: llama.cpp did not give its state.
    """
    if not model.n_tokens:
        return {}
    llama_cpp = import_llama_cpp()
    size = llama_cpp.llama_state_seq_get_size(model.ctx, 0)
    data = (ctypes.c_uint8 * size)()
    if llama_cpp.llama_state_seq_get_data(model.ctx, data, size, 0) != size:
        raise TqggufError(f"llama.cpp did not give the state of {model.model_info.path.name}")
    state = parse_state(memoryview(data).cast("B"), model.model_info, sequence=True)
    return {
        stored.layer.index: float(np.abs(block_scales(stored.rows, stored.type)).mean())
        for stored in sorted(state.tensors, key=lambda stored: stored.layer.index)
        if stored.side == "K" and stored.type.quantized and stored.rows.size
    }


def block_scales(rows: npt.NDArray[np.uint8], kind: CacheType) -> npt.NDArray[np.float32]:
    """The scale of each block in rows of a quantized type: the f16 that every block begins with."""
    halves: npt.NDArray[np.float16] = rows.reshape(-1, kind.bytes)[:, :2].copy().view("<f2")
    return halves.ravel().astype(np.float32)
