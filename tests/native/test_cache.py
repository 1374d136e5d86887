"""PqoCache: what it gives back, how it grows, and what it refuses."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tqgguf import CacheConfig, PqoCache, reference
from tqgguf.errors import ArgumentError, CacheClosedError

CONFIG = CacheConfig(bits=3, head_dim=64, n_head_kv=2, n_layer=2)
Tokens = npt.NDArray[np.float32]


def tokens(n: int, seed: int = 0, config: CacheConfig = CONFIG) -> tuple[Tokens, Tokens]:
    rng = np.random.default_rng(seed)
    shape = (n, config.n_head_kv, config.head_dim)
    return rng.standard_normal(shape).astype(np.float32), rng.standard_normal(shape).astype(np.float32)


def decoded(x: Tokens, config: CacheConfig = CONFIG) -> Tokens:
    """What the oracle makes of x after storing it."""
    return reference.decode(reference.encode(x, config.type.name, config.mode), config.type.name, config.mode)


def test_a_first_prefill_gives_back_what_it_got() -> None:
    with PqoCache(CONFIG) as cache:
        k, v = tokens(5)
        k_out, v_out = cache.prefill(0, k, v)
        assert k_out is k and v_out is v
        assert (cache.seq_len(0), cache.seq_len(1)) == (5, 0)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("mode", reference.MODES)
def test_a_later_prefill_gives_the_whole_layer_decoded(bits: int, mode: Any) -> None:
    config = CacheConfig(bits=bits, head_dim=96, n_head_kv=3, n_layer=1, mode=mode)
    with PqoCache(config) as cache:
        k, v = tokens(9, config=config)
        cache.prefill(0, k[:4], v[:4])
        k_out, v_out = cache.prefill(0, k[4:], v[4:])
        np.testing.assert_array_equal(k_out, decoded(k, config))
        np.testing.assert_array_equal(v_out, decoded(v, config))


@pytest.mark.parametrize("n_head", [2, 4, 10])
@pytest.mark.parametrize("bits", [3, 4])
def test_decode_attends_to_everything_with_its_own_token(tolerance: float, bits: int, n_head: int) -> None:
    config = CacheConfig(bits=bits, head_dim=64, n_head_kv=2, n_layer=2)
    k, v = tokens(300, config=config)
    q = np.random.default_rng(3).standard_normal((n_head, 64)).astype(np.float32)
    with PqoCache(config) as cache:
        cache.prefill(1, k[:-1], v[:-1])
        out = cache.decode(1, k[-1], v[-1], q, 0.125)
        assert cache.seq_len(1) == 300 and out.dtype == np.float32
        want = reference.attention(q[None], decoded(k, config), decoded(v, config), 0.125)[0]
        assert np.linalg.norm(out - want) < tolerance * np.linalg.norm(want)


def test_float16_comes_back_as_float16() -> None:
    k, v = (x.astype(np.float16) for x in tokens(3))
    with PqoCache(CONFIG) as cache:
        cache.prefill(0, k, v)
        k_out, v_out = cache.prefill(0, k, v)
        assert k_out.dtype == v_out.dtype == np.float16
        assert cache.decode(0, k[0], v[0], np.ones((2, 64), np.float16), 1.0).dtype == np.float16
        np.testing.assert_array_equal(cache.dequantize(0)[0][:3], decoded(k.astype(np.float32)))


def test_strided_input_is_copied() -> None:
    k, v = tokens(8)
    with PqoCache(CONFIG) as cache:
        cache.append(0, k[::2], v[::-1][:4])
        np.testing.assert_array_equal(cache.dequantize(0)[0], decoded(k[::2]))
        np.testing.assert_array_equal(cache.dequantize(0)[1], decoded(v[::-1][:4]))


@given(st.lists(st.integers(0, 90), min_size=1, max_size=8))
def test_any_chunking_equals_one_append(chunks: list[int]) -> None:
    k, v = tokens(sum(chunks))
    with PqoCache(CONFIG) as chunked, PqoCache(CONFIG) as whole:
        at = 0
        for n in chunks:
            chunked.append(0, k[at : at + n], v[at : at + n])
            at += n
        whole.append(0, k, v)
        assert chunked.seq_len(0) == whole.seq_len(0) == len(k)
        for a, b in zip(chunked.dequantize(0), whole.dequantize(0), strict=True):
            np.testing.assert_array_equal(a, b)


@given(st.integers(0, 200), st.data())
def test_truncate_then_append_equals_fresh(n: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, n))
    k, v = tokens(n)
    k2, v2 = tokens(17, seed=1)
    with PqoCache(CONFIG) as cache, PqoCache(CONFIG) as fresh:
        cache.append(0, k, v)
        cache.truncate(0, keep)
        cache.append(0, k2, v2)
        fresh.append(0, np.concatenate((k[:keep], k2)), np.concatenate((v[:keep], v2)))
        for a, b in zip(cache.dequantize(0), fresh.dequantize(0), strict=True):
            np.testing.assert_array_equal(a, b)


def test_storage_grows_by_a_quarter_and_128_tokens() -> None:
    per_token = CONFIG.bytes_per_token
    assert per_token == 2 * 2 * 28
    with PqoCache(CONFIG) as cache:
        assert cache.memory_usage() == 0
        sizes = []
        for _ in range(2000):
            cache.append(0, *tokens(1))
            sizes.append(cache.memory_usage())
        assert sizes[0] == (1 + 0 + 128) * per_token
        grown = [(n + 1, b) for n, (a, b) in enumerate(pairwise(sizes), start=1) if a != b]
        assert [n for n, _ in grown] == [130, 291, 492, 744, 1059, 1452, 1944]
        for n, size in grown:
            assert size == (n + n // 4 + 128) * per_token
        cache.append(1, *tokens(400))
        assert cache.memory_usage() == sizes[-1] + (400 + 100 + 128) * per_token
        cache.truncate(0, 3)
        assert cache.memory_usage() == sizes[-1] + 628 * per_token
        cache.reset()
        assert cache.memory_usage() == 0 and cache.seq_len(0) == cache.seq_len(1) == 0
        cache.append(0, *tokens(2))
        np.testing.assert_array_equal(cache.dequantize(0)[0], decoded(tokens(2)[0]))


def test_nan_and_infinity_in_k_and_v_are_stored_as_documented() -> None:
    k, v = tokens(3)
    k[1, 0, 5], v[1, 1, 2] = np.nan, -np.inf
    k_clean, v_clean = k.copy(), v.copy()
    k_clean[1, 0, 5], v_clean[1, 1, 2] = 0.0, -65504.0
    with PqoCache(CONFIG) as cache:
        cache.append(0, k, v)
        np.testing.assert_array_equal(cache.dequantize(0)[0], decoded(k_clean))
        np.testing.assert_array_equal(cache.dequantize(0)[1], decoded(v_clean))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_query_that_is_not_finite_is_refused_and_nothing_appended(value: float) -> None:
    k, v = tokens(2)
    q = np.ones((4, 64), dtype=np.float32)
    q[3, 9] = value
    with PqoCache(CONFIG) as cache:
        cache.append(0, k, v)
        with pytest.raises(ArgumentError, match="head 3"):
            cache.decode(0, k[0], v[0], q, 1.0)
        with pytest.raises(ArgumentError, match="scale"):
            cache.decode(0, k[0], v[0], np.ones((4, 64), np.float32), value)
        assert cache.seq_len(0) == 2


BAD: list[tuple[Callable[[PqoCache, Tokens, Tokens], Any], str]] = [
    (lambda c, k, v: c.append(2, k, v), "layer is 2, must be between 0 and 1"),
    (lambda c, k, v: c.append(-1, k, v), "layer is -1"),
    (lambda c, k, v: c.append(2**40, k, v), "layer is 1099511627776"),
    (lambda c, k, v: c.append("0", k, v), "layer must be an integer"),  # type: ignore[arg-type]
    (lambda c, k, v: c.append(0.0, k, v), "layer must be an integer"),  # type: ignore[arg-type]
    (lambda c, k, v: c.append(0, k[0], v), r"k must have shape \(n_tokens, 2, 64\), not \(2, 64\)"),
    (lambda c, k, v: c.append(0, k, v[:, :1]), r"v must have shape .* not \(3, 1, 64\)"),
    (lambda c, k, v: c.append(0, k, v[..., :32]), r"v must have shape .* not \(3, 2, 32\)"),
    (lambda c, k, v: c.append(0, k, v[:2]), "same number of tokens"),
    (lambda c, k, v: c.prefill(0, k, v[:2]), "same number of tokens"),
    (lambda c, k, v: c.append(0, k.astype(np.float64), v), "array of float64"),
    (lambda c, k, v: c.append(0, k.astype(np.int8), v), "array of int8"),
    (lambda c, k, v: c.append(0, k.tolist(), v), "not list"),
    (lambda c, k, v: c.decode(0, k, v[0], k[0], 1.0), r"k must have shape \(2, 64\)"),
    (lambda c, k, v: c.decode(0, k[0], v[0], k[0, 0], 1.0), r"q must have shape \(n_head, 64\)"),
    (lambda c, k, v: c.decode(0, k[0], v[0], np.ones((3, 64), np.float32), 1.0), "3 heads.*multiple of n_head_kv, 2"),
    (lambda c, k, v: c.decode(0, k[0], v[0], np.ones((0, 64), np.float32), 1.0), "0 heads"),
    (lambda c, k, v: c.decode(0, k[0], v[0], k[0], "x"), "scale must be a number"),  # type: ignore[arg-type]
    (lambda c, k, v: c.truncate(0, 4), "n_tokens is 4, must be between 0 and 3"),
    (lambda c, k, v: c.truncate(0, -1), "n_tokens is -1"),
    (lambda c, k, v: c.truncate(0, 2**70), "must be between 0 and 3"),
    (lambda c, k, v: c.seq_len(7), "layer is 7"),
]


@pytest.mark.parametrize(("call", "said"), BAD)
def test_bad_arguments_change_nothing(call: Callable[..., Any], said: str) -> None:
    k, v = tokens(3)
    with PqoCache(CONFIG) as cache:
        cache.append(0, k, v)
        with pytest.raises(ArgumentError, match=said):
            call(cache, k, v)
        assert (cache.seq_len(0), cache.seq_len(1)) == (3, 0)


def test_a_closed_cache_says_so() -> None:
    k, v = tokens(1)
    cache = PqoCache(CONFIG)
    cache.append(0, k, v)
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


def test_only_a_config_makes_a_cache_and_none_is_copied() -> None:
    with pytest.raises(ArgumentError, match="CacheConfig"):
        PqoCache({"bits": 3})  # type: ignore[arg-type]
    with PqoCache(CONFIG) as cache, pytest.raises(TypeError, match="copied"):
        copy.copy(cache)


def test_memory_comes_back_without_close() -> None:
    for _ in range(50):
        PqoCache(CONFIG).append(0, *tokens(2000))
    gc.collect()


def test_one_cache_under_several_threads() -> None:
    k, v = tokens(1)
    with PqoCache(CONFIG) as cache:
        threads = [
            threading.Thread(target=lambda: [cache.decode(0, k[0], v[0], k[0], 0.1) for _ in range(200)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert cache.seq_len(0) == 800
        np.testing.assert_array_equal(cache.dequantize(0)[0], np.repeat(decoded(k), 800, axis=0))


OUT_OF_MEMORY = """
import resource
import numpy as np
from tqgguf import CacheConfig, OutOfMemoryError, PqoCache
cache = PqoCache(CacheConfig(bits=4, head_dim=128, n_head_kv=8, n_layer=1))
k = np.ones((1, 8, 128), dtype=np.float32)
cache.append(0, k, k)
big = np.zeros((40_000, 8, 128), dtype=np.float32)
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, -1))
try:
    cache.append(0, big, big)
except OutOfMemoryError as error:
    assert isinstance(error, MemoryError) and "unchanged" in str(error), error
else:
    raise SystemExit("nothing was raised")
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
assert cache.seq_len(0) == 1
cache.append(0, big, big)
assert cache.seq_len(0) == 40_001
print("good")
"""


def test_a_failed_allocation_leaves_the_cache_as_it_was(python: Callable[..., Any]) -> None:
    pytest.importorskip("resource")
    done = python("-c", OUT_OF_MEMORY)
    assert done.stdout.strip() == "good", done.stderr
