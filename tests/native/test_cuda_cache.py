"""PqoCache in device memory: bytes and values beside the CPU's cache, what it refuses, machines that cannot have one.

Kernels are emulated on the CPU, and where there is a GPU they run there, too.
"""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cuda_tensors import CONFIG, TOLERANCE, Array, ByDLPack, assert_same, get, put, queries, store, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tqgguf
from tqgguf import CacheConfig, PqoCache, reference
from tqgguf._native import cuda as native_cuda
from tqgguf.errors import ArgumentError, CacheClosedError, LibraryError, OutOfMemoryError, UnsupportedError
from tqgguf.pqo.device_array import DeviceArray

few = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)


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
    real = native_cuda.version_in
    monkeypatch.setattr(native_cuda, "version_in", lambda header, name: real(header, name) + 1)
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
