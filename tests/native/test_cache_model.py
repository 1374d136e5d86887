"""PqoCache against a model of it in plain NumPy: any sequence of calls, good and bad, on the CPU and on emulated CUDA.

The model keeps what was appended as `tqgguf.reference` stores it, and attends as the definition says. Some 200
sequences on the CPU here; HYPOTHESIS_PROFILE=thorough runs 10,000 (make conformance-cache).
"""

from __future__ import annotations

import os
from typing import Any, Final

import here
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tqgguf import CacheConfig, PqoCache, reference
from tqgguf._native import cuda as native_cuda
from tqgguf.errors import ArgumentError, CacheClosedError, OutOfMemoryError

F32 = npt.NDArray[np.float32]

THOROUGH: Final = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
N_SEQUENCES: Final = {"cpu": 10_000 if THOROUGH else 200, "cuda": 400 if THOROUGH else 15}
MOST_TOKENS: Final = 200
"""In a layer: beyond what storage has room for at first (128), and three tiles of attention (64)."""

# float16 arrays come back as float16, and what is stored may be beyond it
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:overflow encountered in cast")]

seeds = st.integers(0, 2**32 - 1)
layers = st.integers(0, 2)
dtypes = st.sampled_from([np.float32, np.float16])


def values(seed: int, *shape: int, dtype: Any = np.float32) -> npt.NDArray[Any]:
    """Normal values of a size between 2^-6 and 2^6; in some arrays NaN, infinities and zeros, too."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(shape) * 2.0 ** rng.uniform(-6, 6)).astype(dtype)
    if seed % 4 == 0 and x.size:
        where = rng.random(shape) < 0.02
        x[where] = rng.choice([np.nan, np.inf, -np.inf, 0.0], int(where.sum())).astype(dtype)
    return x


class Layer:
    """What one layer should hold."""

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.k = self.v = np.empty((0, config.n_head_kv, config.head_dim), np.float32)
        self.capacity = 0

    def append(self, k: npt.NDArray[Any], v: npt.NDArray[Any]) -> None:
        name, mode = self.config.type.name, self.config.mode
        stored = [reference.decode(reference.encode(x.astype(np.float32), name, mode), name, mode) for x in (k, v)]
        self.k, self.v = np.concatenate((self.k, stored[0])), np.concatenate((self.v, stored[1]))
        self.reserve(len(self.k))

    def reserve(self, n: int) -> None:
        if n > self.capacity:
            self.capacity = n + n // 4 + 128

    def keep(self, n: int) -> None:
        self.k, self.v = self.k[:n], self.v[:n]


class CacheMachine(RuleBasedStateMachine):
    device = "cpu"
    tolerance = 1e-3

    cache: PqoCache
    config: CacheConfig

    @initialize(
        bits=st.sampled_from([3, 4]),
        mode=st.sampled_from(["search", "maxnorm", "l2norm"]),
        head_dim=st.sampled_from([32, 64, 96, 128]),
        n_head_kv=st.integers(1, 3),
        n_layer=st.integers(1, 3),
    )
    def create(self, bits: int, mode: Any, head_dim: int, n_head_kv: int, n_layer: int) -> None:
        self.config = CacheConfig(bits, head_dim, n_head_kv, n_layer, mode)
        self.cache = PqoCache(self.config, self.device)
        self.layers = [Layer(self.config) for _ in range(n_layer)]
        self.closed = False

    def layer(self, number: int) -> tuple[int, Layer]:
        index = number % self.config.n_layer
        return index, self.layers[index]

    def tokens(self, seed: int, n: int, dtype: Any) -> list[npt.NDArray[Any]]:
        shape = (n, self.config.n_head_kv, self.config.head_dim)
        return [values(seed, *shape, dtype=dtype), values(seed + 1, *shape, dtype=dtype)]

    def open(self) -> bool:
        return not self.closed

    # ---- Good calls ----

    @precondition(open)
    @rule(number=layers, n=st.integers(0, 90), seed=seeds, dtype=dtypes, returns=st.booleans())
    def add(self, number: int, n: int, seed: int, dtype: Any, returns: bool) -> None:
        index, layer = self.layer(number)
        n = max(0, min(n, MOST_TOKENS - len(layer.k)))
        k, v = self.tokens(seed, n, dtype)
        was_empty = not len(layer.k)
        layer.append(k, v)
        if not returns:
            self.cache.append(index, k, v)
            return
        k_out, v_out = self.cache.prefill(index, k, v)
        assert k_out.dtype == v_out.dtype == dtype
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(k_out, k if was_empty else layer.k.astype(dtype))
            np.testing.assert_array_equal(v_out, v if was_empty else layer.v.astype(dtype))

    @precondition(open)
    @rule(number=layers, seed=seeds, group=st.integers(1, 9), dtype=dtypes)
    def decode(self, number: int, seed: int, group: int, dtype: Any) -> None:
        index, layer = self.layer(number)
        (k,), (v,) = self.tokens(seed, 1, dtype)
        q = (
            np.random.default_rng(seed)
            .standard_normal((group * self.config.n_head_kv, self.config.head_dim))
            .astype(dtype)
        )
        layer.append(k[None], v[None])
        # scores of about 1: what large scores do to the precision of attention is measured elsewhere
        norm = float(np.linalg.norm(layer.k, axis=-1).max() * np.linalg.norm(q.astype(np.float64), axis=-1).max())
        scale = 1.0 / norm if norm else 1.0
        out = self.cache.decode(index, k, v, q, scale)
        want = reference.attention(q.astype(np.float32)[None], layer.k, layer.v, scale)[0]
        rounding = 1e-3 if dtype == np.float16 else 0.0
        size = np.linalg.norm(layer.v.reshape(-1, self.config.head_dim), axis=-1).max()
        assert out.dtype == dtype and out.shape == q.shape
        finite = np.isfinite(out)  # values may be beyond float16
        assert (finite | (np.abs(want) > 65000)).all()
        assert np.abs(np.where(finite, out, want) - want).max() <= (self.tolerance + rounding) * size + 1e-7

    @precondition(open)
    @rule(number=layers, part=st.floats(0, 1))
    def truncate(self, number: int, part: float) -> None:
        index, layer = self.layer(number)
        n = int(part * len(layer.k))
        self.cache.truncate(index, n)
        layer.keep(n)

    @precondition(open)
    @rule()
    def reset(self) -> None:
        self.cache.reset()
        self.layers = [Layer(self.config) for _ in self.layers]

    @precondition(open)
    @rule(number=layers)
    def compare(self, number: int) -> None:
        index, layer = self.layer(number)
        for found, want in zip(self.cache.dequantize(index), (layer.k, layer.v), strict=True):
            np.testing.assert_array_equal(found.numpy() if hasattr(found, "numpy") else found, want)

    @precondition(open)
    @rule(number=layers, n=st.integers(1, 3), seed=seeds)
    def add_few(self, number: int, n: int, seed: int) -> None:
        self.add(number, n, seed, np.float32, True)

    # ---- Bad calls: the invariant sees that they change nothing ----

    @precondition(open)
    @rule(number=layers, seed=seeds, which=st.integers(0, 5), data=st.data())
    def bad_call(self, number: int, seed: int, which: int, data: st.DataObject) -> None:
        """One rule for all, so that most of a sequence are good calls."""
        if which == 0:
            self.no_such_layer(data.draw(st.sampled_from([-1, 3, 2**31, -(2**63), 2**70, "0", 0.0, None])), seed)
        elif which == 1:
            self.no_such_length(number, data.draw(st.sampled_from([-1, -(2**63), 2**31, 2**63, 2**70, 0.0, None])))
        elif which == 2:
            self.bad_arrays(number, seed, data.draw(st.integers(0, 5)))
        elif which == 3:
            self.query_not_finite(
                number, seed, data.draw(st.sampled_from([np.nan, np.inf, -np.inf])), data.draw(st.booleans())
            )
        elif which == 4:
            self.query_of_wrong_shape(number, seed)
        else:
            self.more_than_there_is_memory(number)

    def no_such_layer(self, number: Any, seed: int) -> None:
        k, v = self.tokens(seed, 1, np.float32)
        for call in (self.cache.append, self.cache.prefill):
            with pytest.raises(ArgumentError, match="layer"):
                call(number, k, v)
        with pytest.raises(ArgumentError, match="layer"):
            self.cache.truncate(number, 0)
        with pytest.raises(ArgumentError, match="layer"):
            self.cache.decode(number, k[0], v[0], k[0], 1.0)

    def no_such_length(self, number: int, n: Any) -> None:
        with pytest.raises(ArgumentError, match="n_tokens"):
            self.cache.truncate(self.layer(number)[0], n)

    def bad_arrays(self, number: int, seed: int, which: int) -> None:
        index, _ = self.layer(number)
        k, v = self.tokens(seed, 2, np.float32)
        bad = (k[:1], k[..., :-1], k[:, :, None], k.astype(np.float64), np.ones(k.shape, np.int32), k.tolist())[which]
        for pair in ((bad, v), (k, bad)):
            with pytest.raises(ArgumentError):
                self.cache.append(index, *pair)
            with pytest.raises(ArgumentError):
                self.cache.prefill(index, *pair)

    def query_not_finite(self, number: int, seed: int, bad: float, in_scale: bool) -> None:
        index, _ = self.layer(number)
        k, v = self.tokens(seed, 1, np.float32)
        q = np.ones((self.config.n_head_kv, self.config.head_dim), np.float32)
        if not in_scale:
            q[-1, -1] = bad
        with pytest.raises(ArgumentError):
            self.cache.decode(index, k[0], v[0], q, bad if in_scale else 1.0)

    def query_of_wrong_shape(self, number: int, seed: int) -> None:
        index, _ = self.layer(number)
        k, v = self.tokens(seed, 1, np.float32)
        n, dim = self.config.n_head_kv, self.config.head_dim
        for shape in ((0, dim), (n, dim - 1), (n,), (n, dim, 1), *([(n + 1, dim)] if n > 1 else [])):
            with pytest.raises(ArgumentError):
                self.cache.decode(index, k[0], v[0], np.ones(shape, np.float32), 1.0)

    def more_than_there_is_memory(self, number: int) -> None:
        index, _ = self.layer(number)
        few = np.zeros((1, self.config.n_head_kv, self.config.head_dim), np.float32)
        many = np.broadcast_to(few, (2**40, *few.shape[1:]))
        with pytest.raises((OutOfMemoryError, MemoryError)):
            self.cache.append(index, many, many)

    # ---- The end ----

    @precondition(lambda self: self.closed)
    @rule(number=layers, seed=seeds)
    def use_after_close(self, number: int, seed: int) -> None:
        k, v = self.tokens(seed, 1, np.float32)
        for call in (
            lambda: self.cache.append(0, k, v),
            lambda: self.cache.decode(0, k[0], v[0], k[0], 1.0),
            lambda: self.cache.seq_len(number),
            self.cache.reset,
        ):
            with pytest.raises(CacheClosedError):
                call()

    @rule(sure=st.integers(0, 9))
    def close(self, sure: int) -> None:
        if sure == 0 or self.closed:
            self.cache.close()
            self.closed = True

    @invariant()
    def lengths_and_bytes(self) -> None:
        if not hasattr(self, "cache") or self.closed:
            return
        assert [self.cache.seq_len(i) for i in range(len(self.layers))] == [len(layer.k) for layer in self.layers]
        allocated = sum(layer.capacity for layer in self.layers) * self.config.bytes_per_token
        assert self.cache.memory_usage() == allocated

    def teardown(self) -> None:
        if hasattr(self, "cache") and not self.closed:
            for index in range(len(self.layers)):
                self.compare(index)
            self.cache.close()


def run(machine: type[CacheMachine], n: int) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=n, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_any_sequence_of_calls(kernel: str, native: Any) -> None:
    n_kernels = sum(native.kernels().values())
    machine = type("CpuMachine", (CacheMachine,), {"tolerance": 1e-3 if kernel in here.INTEGER_SUMS else 2e-5})
    run(machine, N_SEQUENCES["cpu"] // n_kernels + 1)


def test_any_sequence_of_calls_on_a_device(cuda_build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQGGUF_CUDA_LIB", str(cuda_build.path))
    native_cuda.cuda_library.cache_clear()
    run(type("CudaMachine", (CacheMachine,), {"device": "cuda", "tolerance": 2e-3}), N_SEQUENCES["cuda"])
    native_cuda.cuda_library.cache_clear()
