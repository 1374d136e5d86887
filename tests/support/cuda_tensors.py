"""A PqoCache in device memory for tests: random tokens, tensors as other libraries lend them, and what is compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tqgguf import CacheConfig, PqoCache
from tqgguf._native import cuda as native_cuda
from tqgguf.pqo.device_array import BFLOAT16, DTYPES, DeviceArray
from tqgguf.pqo.store_cuda import CudaStore

CONFIG = CacheConfig(bits=3, head_dim=64, n_head_kv=2, n_layer=2)
TOLERANCE = 2e-3
"""Of attention: test_cuda_attention.py."""

Array = npt.NDArray[Any]


def tokens(n: int, seed: int = 0, config: CacheConfig = CONFIG) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    shape = (n, config.n_head_kv, config.head_dim)
    return rng.standard_normal(shape).astype(np.float32), rng.standard_normal(shape).astype(np.float32)


def queries(n_head: int, config: CacheConfig = CONFIG, seed: int = 3) -> Array:
    return np.random.default_rng(seed).standard_normal((n_head, config.head_dim)).astype(np.float32)


class ByDLPack:
    """A tensor of a library that has DLPack only, of version 1 or before."""

    def __init__(self, array: DeviceArray, versioned: bool = True) -> None:
        self.array, self.versioned, self.asked = array, versioned, []  # type: ignore[var-annotated]

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __dlpack__(self, *, stream: Any = None, **options: Any) -> Any:
        if not self.versioned and options:
            raise TypeError(f"unexpected {options}")
        self.asked.append((stream, options))
        return self.array.__dlpack__(stream=stream, **options)


class ByInterface:
    """A tensor of a library that has the CUDA array interface only."""

    def __init__(self, array: DeviceArray, **changes: Any) -> None:
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, **changes}
        self.array = array


def put(queue: native_cuda.Queue, x: Array) -> DeviceArray:
    """x on the device; uint16 are bits of bfloat16."""
    kind = BFLOAT16 if x.dtype == np.uint16 else next(d for d in DTYPES if d.name == x.dtype.name)
    array, values = DeviceArray(queue, x.shape, kind), np.ascontiguousarray(x)
    with queue.current():
        queue.copy(values.ctypes.data, array.memory.pointer, x.nbytes, 1)
    return array


def get(array: DeviceArray) -> Array:
    if array.kind is not BFLOAT16:
        return array.numpy()
    out = np.empty(array.shape, np.uint16)
    with array.queue.current():
        array.queue.copy(array.memory.pointer, out.ctypes.data, out.nbytes, 2)
    return out


def assert_same(cache: PqoCache, cpu: PqoCache) -> None:
    """Every layer, and the figures about them, are equal."""
    assert cache.memory_usage() == cpu.memory_usage()
    for layer in range(cpu.config.n_layer):
        assert cache.seq_len(layer) == cpu.seq_len(layer)
        for a, b in zip(cache.dequantize(layer), cpu.dequantize(layer), strict=True):
            np.testing.assert_array_equal(a.numpy(), b)


def store(cache: PqoCache) -> CudaStore:
    found = cache._store
    assert isinstance(found, CudaStore)
    return found
