"""Tokens read by llama.cpp itself, timed, without what llama_cpp's classes do between batches."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tqgguf._native import import_llama_cpp

llama_cpp: Any = import_llama_cpp()


def read(context: Any, tokens: np.ndarray, n_batch: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Reads tokens (n,) int32 behind those in the cache, n_batch at a time; seconds by a clock."""
    start = clock()
    for first in range(0, len(tokens), n_batch):
        part = tokens[first : first + n_batch]
        batch = llama_cpp.llama_batch_get_one(part.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), len(part))
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama.cpp could not read the tokens")
    llama_cpp.llama_synchronize(context)
    return clock() - start
