"""PqoCache in device memory: bytes and values beside the CPU's cache, tensors by both protocols, what it refuses.

Kernels are emulated on the CPU, and where there is a GPU they run there, too. Emulated device memory is the host's, so
NumPy takes its arrays by DLPack.
"""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tqgguf
from tqgguf import CacheConfig, PqoCache, reference
from tqgguf._native import cuda as native_cuda
from tqgguf._native.capsule import Managed
from tqgguf.errors import ArgumentError, CacheClosedError, LibraryError, OutOfMemoryError, UnsupportedError
from tqgguf.pqo.device_array import BFLOAT16, DTYPES, DeviceArray
from tqgguf.pqo.store_cuda import CudaStore

CONFIG = CacheConfig(bits=3, head_dim=64, n_head_kv=2, n_layer=2)
TOLERANCE = 2e-3
"""Of attention: test_cuda_attention.py."""
Array = npt.NDArray[Any]

few = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)


@pytest.fixture
def device(cuda_build: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[native_cuda.Queue]:
    """The library under test as tqgguf's own."""
    monkeypatch.setenv("TQGGUF_CUDA_LIB", str(cuda_build.path))
    native_cuda.cuda_library.cache_clear()
    yield native_cuda.cuda_library().queue(0)
    native_cuda.cuda_library.cache_clear()


@pytest.fixture
def emulated(device: native_cuda.Queue) -> native_cuda.Queue:
    """The same for what only the emulation can be told to do."""
    if not device.native.emulated:
        pytest.skip("a device does as it does")
    return device


def tokens(n: int, seed: int = 0, config: CacheConfig = CONFIG) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    shape = (n, config.n_head_kv, config.head_dim)
    return rng.standard_normal(shape).astype(np.float32), rng.standard_normal(shape).astype(np.float32)


def queries(n_head: int, config: CacheConfig = CONFIG, seed: int = 3) -> Array:
    return np.random.default_rng(seed).standard_normal((n_head, config.head_dim)).astype(np.float32)


def bf16(x: Array) -> Array:
    u = x.view(np.uint32)
    return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)


def wide(x: Array) -> Array:
    return (x.astype(np.uint32) << 16).view(np.float32)


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


def blocks(cache: PqoCache, layer: int) -> Array:
    """The bytes of K as they are stored."""
    where = store(cache)
    stored = where._layers[layer]
    assert stored.k
    out = np.empty((stored.n_tokens, where._token_bytes), np.uint8)
    with where._queue.current():
        where._queue.copy(stored.k.pointer, out.ctypes.data, out.nbytes, 2)
    return out


# ---- The same as on the CPU ----


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("mode", reference.MODES)
def test_bytes_values_and_attention_are_the_cpus(device: Any, bits: int, mode: Any) -> None:
    config = CacheConfig(bits=bits, head_dim=96, n_head_kv=3, n_layer=1, mode=mode)
    k, v = tokens(40, config=config)
    q = queries(6, config)
    with PqoCache(config, device="cuda") as cache, PqoCache(config) as cpu:
        assert store(cache)
        for one in (cache, cpu):
            assert one.prefill(0, k[:30], v[:30])[0].shape == (30, 3, 96)
        got, want = (one.prefill(0, k[30:], v[30:]) for one in (cache, cpu))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
        out, expected = (one.decode(0, k[0], v[0], q, 0.1) for one in (cache, cpu))
        assert out.dtype == np.float32 and np.linalg.norm(out - expected) < 2 * TOLERANCE * np.linalg.norm(expected)
        assert_same(cache, cpu)
        stored = np.concatenate((k, k[:1])).reshape(41, -1)
        np.testing.assert_array_equal(
            blocks(cache, 0), reference.encode(stored, config.type.name, mode).reshape(41, -1)
        )


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 150), st.sampled_from(["f4", "f2"])),
        st.tuples(st.just("prefill"), st.integers(0, 40), st.sampled_from(["f4", "f2"])),
        st.tuples(st.just("decode"), st.sampled_from([2, 4, 10]), st.sampled_from(["f4", "f2"])),
        st.tuples(st.just("truncate"), st.floats(0, 1), st.none()),
        st.tuples(st.just("reset"), st.none(), st.none()),
    ),
    min_size=1,
    max_size=7,
)


@few
@given(operations=OPERATIONS, layers=st.lists(st.integers(0, 1), min_size=7, max_size=7), lent=st.booleans())
def test_any_operations_leave_what_the_cpu_has(device: Any, operations: Any, layers: list[int], lent: bool) -> None:
    def give(x: Array) -> Any:
        return ByDLPack(put(device, x)) if lent else x

    def take(x: Any) -> Array:
        return x if isinstance(x, np.ndarray) else get(x.array if isinstance(x, ByDLPack) else x)

    with PqoCache(CONFIG, device="cuda:0") as cache, PqoCache(CONFIG) as cpu:
        for seed, ((name, what, dtype), layer) in enumerate(zip(operations, layers, strict=False)):
            if name == "truncate":
                for one in (cache, cpu):
                    one.truncate(layer, int(what * one.seq_len(layer)))
            elif name == "reset":
                cache.reset(), cpu.reset()
            elif name == "decode":
                (k,), (v,) = (x.astype(dtype) for x in tokens(1, seed))
                q = queries(what, seed=seed).astype(dtype)
                out = take(cache.decode(layer, give(k), give(v), give(q), 0.125)).astype(np.float32)
                want = cpu.decode(layer, k, v, q, 0.125).astype(np.float32)
                assert np.linalg.norm(out - want) < 2 * TOLERANCE * np.linalg.norm(want)
            else:
                k, v = (x.astype(dtype) for x in tokens(what, seed))
                got, want = (
                    getattr(one, name)(layer, make(k), make(v)) for one, make in ((cache, give), (cpu, lambda x: x))
                )
                if name == "prefill":
                    for a, b in zip(got, want, strict=True):
                        np.testing.assert_array_equal(take(a), b)
        assert_same(cache, cpu)


@few
@given(st.lists(st.integers(0, 90), min_size=1, max_size=6))
def test_any_chunking_equals_one_append(device: Any, chunks: list[int]) -> None:
    k, v = tokens(sum(chunks))
    with PqoCache(CONFIG, device="cuda") as chunked, PqoCache(CONFIG) as whole:
        at = 0
        for n in chunks:
            chunked.append(0, k[at : at + n], v[at : at + n])
            at += n
        whole.append(0, k, v)
        for a, b in zip(chunked.dequantize(0), whole.dequantize(0), strict=True):
            np.testing.assert_array_equal(a.numpy(), b)


def test_scratch_grows_with_the_work(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQ_HOST_SM", "40")  # of the emulation: many splits, whose results lie in the scratch
    k, v = tokens(1500)
    with PqoCache(CONFIG, device="cuda") as cache, PqoCache(CONFIG) as cpu:
        for first, last, n_head in ((0, 200, 2), (200, 1500, 10)):
            for one in (cache, cpu):
                one.append(0, k[first : last - 1], v[first : last - 1])
            out, want = (one.decode(0, k[last - 1], v[last - 1], queries(n_head), 0.125) for one in (cache, cpu))
            assert np.linalg.norm(out - want) < 2 * TOLERANCE * np.linalg.norm(want)


def test_growth_holds_the_old_and_the_new_blocks_of_one_layer_at_most(emulated: Any, monkeypatch: Any) -> None:
    config = CacheConfig(bits=3, head_dim=64, n_head_kv=16, n_layer=1)
    k, v = tokens(129, config=config)
    with PqoCache(config, device="cuda") as cache:
        cache.append(0, k, v)
        first = cache.memory_usage()
        assert first == (129 + 32 + 128) * config.bytes_per_token
        cache.append(0, *(put(emulated, x[:1].repeat(160, 0)) for x in (k, v)))
        assert cache.memory_usage() == first
        more = [put(emulated, x[:1]) for x in (k, v)]
        second = (290 + 72 + 128) * config.bytes_per_token
        gc.collect()
        lent = sum(x.nbytes for x in more)
        for spare, fits in ((-(2**15), False), (2**16, True)):  # the emulation counts pages
            monkeypatch.setenv("TQ_HOST_MEMORY", str(first + second + lent + spare))
            if fits:
                cache.append(0, *more)
            else:
                with pytest.raises(OutOfMemoryError, match="has no memory for"):
                    cache.append(0, *more)
                assert cache.seq_len(0) == 289 and cache.memory_usage() == first
        assert cache.seq_len(0) == 290 and cache.memory_usage() == second


def test_nan_and_infinity_in_k_and_v_are_stored_as_documented(device: Any) -> None:
    k, v = tokens(3)
    k[1, 0, 5], v[1, 1, 2] = np.nan, -np.inf
    with PqoCache(CONFIG, device="cuda") as cache, PqoCache(CONFIG) as cpu:
        cache.append(0, put(device, k), put(device, v))
        cpu.append(0, k, v)
        assert_same(cache, cpu)


# ---- Tensors ----


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


# ---- What it refuses ----


def test_queries_that_are_not_finite(device: Any) -> None:
    """As the CPU's cache where q is a NumPy array; NaN comes out where it is a tensor, which nobody waits for."""
    k, v = tokens(2)
    huge = np.full((4, 64), 1e38, np.float32)
    with PqoCache(CONFIG, device="cuda") as cache:
        cache.append(0, k, v)
        for value in (np.nan, np.inf, -np.inf):
            q = np.ones((4, 64), dtype=np.float32)
            q[3, 9] = value
            with pytest.raises(ArgumentError, match="head 3, value 9"):
                cache.decode(0, k[0], v[0], q, 1.0)
            with pytest.raises(ArgumentError, match="scale"):
                cache.decode(0, k[0], v[0], np.ones((4, 64), np.float32), value)
            assert cache.seq_len(0) == 2
            out = get(cache.decode(0, k[0], v[0], put(device, q), 1.0))
            assert np.isnan(out[3]).all() and np.isfinite(out[:2]).all()
            cache.truncate(0, 2)
        for sign in (1, -1):
            with pytest.raises(ArgumentError, match="overflow"):
                cache.decode(0, k[0], v[0], sign * huge, 1e3)
            assert cache.seq_len(0) == 2
            assert np.isnan(get(cache.decode(0, k[0], v[0], put(device, sign * huge), 1e3))).any()
            cache.truncate(0, 2)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda c, k, v: c.append(2, k, v), "layer is 2, must be between 0 and 1"),
        (lambda c, k, v: c.append("0", k, v), "layer must be an integer"),
        (lambda c, k, v: c.append(0, k, v[..., :32]), r"v must have shape .* not \(3, 2, 32\)"),
        (lambda c, k, v: c.prefill(0, k, v[:2]), "same number of tokens"),
        (lambda c, k, v: c.decode(0, k, v[0], k[0], 1.0), r"k must have shape \(2, 64\)"),
        (lambda c, k, v: c.decode(0, k[0], v[0], k[0, 0], 1.0), r"q must have shape \(n_head, 64\)"),
        (lambda c, k, v: c.decode(0, k[0], v[0], np.ones((3, 64), "f4"), 1.0), "3 heads.*multiple of n_head_kv, 2"),
        (lambda c, k, v: c.decode(0, k[0], v[0], np.ones((0, 64), "f4"), 1.0), "0 heads"),
        (lambda c, k, v: c.decode(0, k[0], v[0], k[0], "x"), "scale must be a number"),
        (lambda c, k, v: c.decode(0, k[0], v[0], k[0], 1e300), "finite float32"),
        (lambda c, k, v: c.truncate(0, 4), "n_tokens is 4, must be between 0 and 3"),
        (lambda c, k, v: c.seq_len(7), "layer is 7"),
    ],
)
def test_bad_arguments_change_nothing(device: Any, call: Any, said: str) -> None:
    k, v = tokens(3)
    with PqoCache(CONFIG, device="cuda") as cache:
        cache.append(0, k, v)
        with pytest.raises(ArgumentError, match=said):
            call(cache, k, v)
        assert (cache.seq_len(0), cache.seq_len(1)) == (3, 0)


def test_a_closed_cache_says_so(device: Any) -> None:
    k, v = tokens(1)
    cache = PqoCache(CONFIG, device="cuda")
    cache.append(0, k, v)
    assert "cuda:0" in repr(cache)
    with pytest.raises(TypeError, match="copied"):
        copy.copy(cache)
    cache.close()
    cache.close()
    assert cache.closed and "closed" in repr(cache)
    calls: list[Callable[[], Any]] = [
        lambda: cache.append(0, k, v),
        lambda: cache.prefill(0, k, v),
        lambda: cache.decode(0, k[0], v[0], k[0], 1.0),
        lambda: cache.dequantize(0),
        cache.seq_len,
        lambda: cache.truncate(0, 0),
        cache.reset,
        cache.memory_usage,
        cache.__enter__,
    ]
    for call in calls:
        with pytest.raises(CacheClosedError, match="closed"):
            call()


def test_a_failed_allocation_leaves_the_cache_as_it_was(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    k, v = tokens(200)
    with PqoCache(CONFIG, device="cuda") as cache, PqoCache(CONFIG) as cpu:
        cache.append(0, k, v), cpu.append(0, k, v)
        monkeypatch.setenv("TQ_HOST_MEMORY", "1")
        for call in (
            lambda: cache.append(0, k, v),
            lambda: cache.prefill(0, k, v),
            lambda: cache.decode(0, k[0], v[0], queries(4), 1.0),
            lambda: cache.dequantize(0),
        ):
            with pytest.raises(OutOfMemoryError, match="has no memory for"):
                call()
        monkeypatch.delenv("TQ_HOST_MEMORY")
        assert_same(cache, cpu)
        cache.append(0, k, v), cpu.append(0, k, v)
        assert_same(cache, cpu)


def test_one_cache_under_several_threads(device: Any) -> None:
    k, v = tokens(1)
    with PqoCache(CONFIG, device="cuda") as cache:
        threads = [threading.Thread(target=lambda: [cache.append(0, k, v) for _ in range(50)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert cache.seq_len(0) == 200
        want = reference.decode(reference.encode(k, "pqo3"), "pqo3")
        np.testing.assert_array_equal(cache.dequantize(0)[0].numpy(), np.repeat(want, 200, axis=0))


# ---- Machines ----


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CUDA", ""])
def test_an_unknown_device_is_named(name: str) -> None:
    with pytest.raises(ArgumentError, match="valid devices are cpu, cuda and cuda:N"):
        PqoCache(CONFIG, device=name)


def test_a_stream_goes_with_a_device(device: Any) -> None:
    with pytest.raises(ArgumentError, match="host memory has none"):
        PqoCache(CONFIG, stream=7)
    with pytest.raises(ArgumentError, match="stream must be an integer"):
        PqoCache(CONFIG, device="cuda", stream="x")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="per-thread default stream"):
        PqoCache(CONFIG, device="cuda", stream=2)
    if device.native.emulated:  # where any number is a stream
        with PqoCache(CONFIG, device="cuda", stream=7) as cache:
            cache.append(0, *tokens(1))
            assert cache.dequantize(0)[0].__cuda_array_interface__["stream"] == 7
    with PqoCache(CONFIG, device="cuda", stream=0) as cache:  # PyTorch's number for the legacy default stream
        assert store(cache)._queue.stream == 1


def test_a_subclass_is_where_it_is_asked_to_be(device: Any) -> None:
    class Mine(PqoCache):
        pass

    with Mine(CONFIG, device="cuda") as cache, Mine(CONFIG) as host:
        for one, kind in ((cache, DeviceArray), (host, np.ndarray)):
            one.append(0, *tokens(2))
            assert isinstance(one, Mine) and isinstance(one.dequantize(0)[0], kind)


AT_EXIT = """
import numpy as np
from tqgguf import CacheConfig, PqoCache
k = np.ones((5, 2, 64), np.float32)
cache = PqoCache(CacheConfig(head_dim=64, n_head_kv=2), device="cuda")
cache.append(0, k, k)
array, spare = cache.dequantize(0)
shared = np.from_dlpack(array) if cache._store._queue.native.emulated else array
capsules = [spare.__dlpack__(), spare.__dlpack__(max_version=(1, 0))]
cycle = [cache, shared, capsules]
cycle.append(cycle)
print("good")
"""


def test_what_is_left_at_exit_does_no_harm(device: Any, python: Callable[..., Any]) -> None:
    done = python("-c", AT_EXIT, env={"TQGGUF_CUDA_LIB": str(device.native.path)})
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "good", "")


def test_a_device_that_does_not_exist(device: Any) -> None:
    with pytest.raises(ArgumentError, match="CUDA device 99 given; there"):
        PqoCache(CONFIG, device="cuda:99")


def test_a_missing_library_says_how_to_build_it(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQGGUF_CUDA_LIB", str(tmp_path / "libtqgguf_cuda.so"))
    native_cuda.cuda_library.cache_clear()
    with pytest.raises(LibraryError, match=r"libtqgguf_cuda\.so does not exist.*make cuda"):
        PqoCache(CONFIG, device="cuda")
    (tmp_path / "libtqgguf_cuda.so").write_bytes(b"no library")
    with pytest.raises(LibraryError, match="cannot load"):
        PqoCache(CONFIG, device="cuda")
    native_cuda.cuda_library.cache_clear()
    monkeypatch.setenv("TQGGUF_CUDA_LIB", str(tqgguf._native.library_path()))
    with pytest.raises(LibraryError, match=r"cannot load .*tq_cuda_abi_version"):
        PqoCache(CONFIG, device="cuda")


def test_a_library_of_another_version_is_refused(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    native_cuda.cuda_library.cache_clear()
    real = native_cuda._version
    monkeypatch.setattr(native_cuda, "_version", lambda header, name: real(header, name) + 1)
    with pytest.raises(LibraryError, match=r"has ABI version \d+, this tqgguf needs \d+"):
        PqoCache(CONFIG, device="cuda")


@pytest.mark.parametrize(
    "words", ["CUDA driver version is insufficient for CUDA runtime version", "no CUDA-capable device is detected"]
)
def test_a_machine_without_a_driver(emulated: Any, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setenv("TQ_HOST_NO_DRIVER", words)
    with pytest.raises(UnsupportedError, match=f"{words}.*needs an NVIDIA GPU and a driver"):
        PqoCache(CONFIG, device="cuda")


def test_a_device_that_nothing_was_compiled_for(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQ_HOST_NO_CODE", "1")
    with pytest.raises(UnsupportedError, match=r"capability 9\.0, .* no code: build with .*ARCHITECTURES=90"):
        PqoCache(CONFIG, device="cuda")


def test_heads_that_attention_cannot_take_are_refused_at_once(device: Any) -> None:
    with pytest.raises(UnsupportedError, match="up to 512"):
        PqoCache(CacheConfig(head_dim=544), device="cuda")
