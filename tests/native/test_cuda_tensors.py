"""Tensors of other libraries given to a PqoCache in device memory, and its results taken by DLPack and array interface.

Kernels are emulated on the CPU, and where there is a GPU they run there, too. Emulated device memory is the host's, so
NumPy takes its arrays by DLPack.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cuda_tensors import CONFIG, TOLERANCE, Array, ByDLPack, ByInterface, assert_same, get, put, queries, tokens

from tqgguf import CacheConfig, PqoCache, reference
from tqgguf._native.capsule import Managed
from tqgguf.errors import ArgumentError


def bf16(x: Array) -> Array:
    u = x.view(np.uint32)
    return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)


def wide(x: Array) -> Array:
    return (x.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("dtype", ["f4", "f2", "u2"])
def test_tensors_by_dlpack(device: Any, versioned: bool, dtype: str) -> None:
    given = [bf16(x) if dtype == "u2" else x.astype(dtype) for x in (*tokens(5), queries(4))]
    wanted = [wide(x) if dtype == "u2" else x.astype("f4") for x in given]
    k, v, q = (ByDLPack(put(device, x), versioned) for x in given)
    with PqoCache(CONFIG, device="cuda") as cache, PqoCache(CONFIG) as cpu:
        assert cache.prefill(0, k, v) == (k, v)  # a first prompt costs no precision
        k_out, v_out = cache.prefill(0, k, v)
        cpu.append(0, *wanted[:2]), cpu.append(0, *wanted[:2])
        for out, want in zip((k_out, v_out), cpu.dequantize(0), strict=True):
            assert out.dtype == k.array.dtype and out.device == "cuda:0" and out.shape == want.shape
            np.testing.assert_array_equal(get(out), bf16(want) if dtype == "u2" else want.astype(dtype))
        one = [ByDLPack(put(device, x[0]), versioned) for x in given[:2]]
        out = cache.decode(0, *one, q, 0.125)
        want = cpu.decode(0, wanted[0][0], wanted[1][0], wanted[2], 0.125)
        assert out.dtype == q.array.dtype and out.shape == (4, 64)
        got = wide(get(out)) if dtype == "u2" else get(out).astype("f4")
        assert np.linalg.norm(got - want) < (4e-3 if dtype == "u2" else TOLERANCE) * np.linalg.norm(want)
    stream = None if device.native.emulated else 1
    assert k.asked == [(stream, {"max_version": (1, 1)} if versioned else {})] * 2


def test_tensors_by_the_cuda_array_interface(device: Any) -> None:
    k, v = tokens(8)
    with PqoCache(CONFIG, device="cuda") as cache, PqoCache(CONFIG) as cpu:
        cache.append(0, ByInterface(put(device, k)), ByInterface(put(device, v), stream=2, strides=(512, 256, 4)))
        cpu.append(0, k, v)
        # every other token, the heads swapped
        swapped = ByInterface(put(device, k.swapaxes(1, 2)), shape=(4, 2, 64), strides=(1024, 4, 8), stream=None)
        cache.append(0, swapped, ByInterface(put(device, v), shape=(4, 2, 64), strides=(1024, 256, 4)))
        cpu.append(0, k[::2], v[::2])
        # q, too: every other head, of all values or of every other one
        for dtype, step in (("f2", 1), ("f2", 2), ("f4", 1), ("f4", 2)):
            q = np.zeros((8, 64 * step), dtype)
            q[::2, ::step] = queries(4)
            strides = (2 * q.strides[0], step * q.itemsize)
            view = ByInterface(put(device, q), shape=(4, 64), strides=strides)
            out = cache.decode(0, ByInterface(put(device, k[0])), ByInterface(put(device, v[0])), view, 0.125)
            want = cpu.decode(0, k[0], v[0], q[::2, ::step], 0.125).astype("f4")
            assert np.linalg.norm(get(out).astype("f4") - want) < 2 * TOLERANCE * np.linalg.norm(want)
        assert_same(cache, cpu)


def test_results_by_both_protocols(device: Any) -> None:
    k, v = tokens(3)
    with PqoCache(CONFIG, device="cuda") as cache:
        cache.append(0, k, v)
        (a, _), want = cache.dequantize(0), reference.decode(reference.encode(k, "pqo3"), "pqo3")
        assert (a.shape, a.dtype, a.ndim, a.size, a.nbytes, len(a)) == ((3, 2, 64), "float32", 3, 384, 1536, 3)
        interface = a.__cuda_array_interface__
        assert interface["version"] == 3 and interface["typestr"] == "<f4" and interface["stream"] == 1
        assert interface["data"] == (a.memory.pointer, False) and interface["strides"] is None
        assert a.__dlpack_device__() == ((1, 0) if device.native.emulated else (2, 0))
        options: Any
        for options in ({}, {"max_version": (0, 8)}, {"max_version": (1, 0)}, {"dl_device": a.__dlpack_device__()}):
            managed = Managed(device.native, a.__dlpack__(**options), "a")
            tensor = managed.tensor
            assert [tensor.shape[i] for i in range(tensor.n_dims)] == [3, 2, 64]
            assert [tensor.strides[i] for i in range(tensor.n_dims)] == [128, 64, 1]
            assert (tensor.code, tensor.bits, tensor.lanes, tensor.byte_offset) == (2, 32, 1, 0)
            assert int(device.native.ffi.cast("uintptr_t", tensor.data)) == a.memory.pointer
            managed.release()
        for options in ({"copy": True}, {"dl_device": (7, 0)}):
            with pytest.raises(BufferError):
                a.__dlpack__(**options)
        np.testing.assert_array_equal(a.numpy(), want)


def test_results_outlive_the_cache(emulated: Any) -> None:
    k, v = tokens(3)
    cache = PqoCache(CONFIG, device="cuda")
    cache.append(0, k, v)
    shared = np.from_dlpack(cache.dequantize(0)[0])
    cache.close()
    del cache
    gc.collect()
    np.testing.assert_array_equal(shared, reference.decode(reference.encode(k, "pqo3"), "pqo3"))


def test_every_byte_comes_back(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lent, exported, thrown away or refused leaves nothing allocated: a loop fits into a few of its rounds."""
    config = CacheConfig(bits=4, head_dim=64, n_head_kv=16, n_layer=1)  # 150 KB of blocks, 8 KB of values
    k, v = tokens(2, config=config)
    gc.collect()
    monkeypatch.setenv("TQ_HOST_MEMORY", str(3 * 2**20))
    for _ in range(60):
        cache = PqoCache(config, device="cuda")
        cache.append(0, k, v)
        a = cache.dequantize(0)[0]
        a.__dlpack__(), a.__dlpack__(max_version=(1, 0)), np.from_dlpack(a)
        with pytest.raises(ArgumentError, match="v must have shape"):
            cache.append(0, ByDLPack(a), ByDLPack(put(emulated, k[0])))
        cache.decode(0, put(emulated, k[0]), put(emulated, v[0]), put(emulated, queries(16).astype("f2")), 0.125)


STRANGE: list[tuple[Callable[[Any, Array], Any], str]] = [
    (lambda d, k: k.tolist(), "k must be a NumPy array, or an array on the device"),
    (lambda d, k: k.astype(np.float64), "float32 or float16, not an array of float64"),
    (lambda d, k: k.astype(">f4"), "not an array of >f4"),
    (lambda d, k: ByInterface(put(d, k), typestr="<f8"), "not of '<f8'"),
    (lambda d, k: ByInterface(put(d, k), mask=k), "mask"),
    (lambda d, k: ByInterface(put(d, k), data=(0, False)), "no device memory"),
    (lambda d, k: ByInterface(put(d, k), strides=(512, -256, 4)), "negative"),
    (lambda d, k: ByInterface(put(d, k), strides=(514, 256, 4)), "no multiples of 4"),
    (lambda d, k: put(d, k[0]), r"k must have shape \(n_tokens, 2, 64\), not \(2, 64\)"),
    (lambda d, k: put(d, k[:2]), "same number of tokens"),
]


@pytest.mark.parametrize(("make", "said"), STRANGE)
def test_strange_tensors_are_refused(device: Any, make: Any, said: str) -> None:
    k, v = tokens(3)
    with PqoCache(CONFIG, device="cuda") as cache:
        with pytest.raises(ArgumentError, match=said):
            cache.append(0, make(device, k), v)
        assert cache.seq_len(0) == 0


def test_dlpack_tensors_that_cannot_be_used(device: Any) -> None:
    k, v = tokens(3)

    class Elsewhere(ByDLPack):
        where = (2, 1)

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.where

    class Spent(ByDLPack):
        def __dlpack__(self, **options: Any) -> Any:
            return "no capsule"

    class Refusing(ByDLPack):
        def __dlpack__(self, **options: Any) -> Any:
            raise BufferError("requires a gradient")

    class Doubles(ByDLPack):
        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

        def __dlpack__(self, **options: Any) -> Any:
            return k.astype(np.float64).__dlpack__()

    lent = put(device, k)
    with PqoCache(CONFIG, device="cuda") as cache:
        cases: list[tuple[Any, str]] = [
            (Elsewhere(lent), "on cuda:1, the cache on cuda:0"),
            (Spent(lent), "no capsule"),
            (Refusing(lent), "requires a gradient"),
        ]
        if device.native.emulated:
            cases.append((Doubles(lent), r"not of DLPack type \(2, 64, 1\)"))
        else:
            host = Elsewhere(lent)
            host.where = (1, 0)
            cases.append((host, "in host memory"))
        for tensor, said in cases:
            with pytest.raises(ArgumentError, match=said):
                cache.append(0, tensor, v)
            assert cache.seq_len(0) == 0
