"""Errors of attention on stored K and V: against sums written out in float64, and what must not change them."""

from __future__ import annotations

import ctypes
from typing import Any

import gguf.quants
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tqgguf
from tqgguf import CACHE_TYPES, _native, reference
from tqgguf._native.ggml import op_name, read_tensor, round_trip, tensor_at
from tqgguf._native.library import library_path
from tqgguf.diagnostics.attention import HeadError, attention_error, head_facts

pytestmark = pytest.mark.long

STOCK = {name: getattr(gguf.GGMLQuantizationType, name.upper()) for name in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")}


def data(seed: int, n: int = 24, n_head: int = 4, n_head_kv: int = 2, dim_k: int = 64, dim_v: int = 32) -> Any:
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((n, n_head, dim_k)).astype("f4")
    k = (rng.standard_normal((n, n_head_kv, dim_k)) + 2 * rng.standard_normal((n_head_kv, dim_k))).astype("f4")
    v = rng.standard_normal((n, n_head_kv, dim_v)).astype("f4")
    return q, k, v


def hadamard(n: int) -> Any:
    """By the definition of Walsh's functions, not by recursion."""
    return np.array([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)]) / np.sqrt(n)


def stored(x: Any, name: str, rotation: int) -> Any:
    """What the cache gives back, without libggml: tqgguf's own codec, or gguf's encoders in NumPy."""
    if name not in STOCK:
        return tqgguf.dequantize(tqgguf.quantize(x, name), name)
    matrix = np.kron(np.eye(x.shape[2] // rotation), hadamard(rotation)) if rotation else np.eye(x.shape[2])
    turned = np.ascontiguousarray(x @ matrix, dtype="f4")
    return gguf.quants.dequantize(gguf.quants.quantize(turned, STOCK[name]), STOCK[name]) @ matrix


def brute_force(q: Any, k: Any, v: Any, near_k: Any, near_v: Any, scale: float, **options: Any) -> list[HeadError]:
    """Figure by figure and pair by pair; only outputs come from `reference.attention`."""
    mask, sinks, softcap = options.get("mask"), options.get("sinks"), options.get("softcap", 0.0)
    slopes = reference.alibi_slopes(q.shape[1], options.get("max_bias", 0.0))
    outputs = [
        reference.attention(q, keys, values, scale, **{"mask": mask, **options})
        for keys, values in ((k, v), (near_k, near_v))
    ]
    found = []
    group = q.shape[1] // k.shape[1]
    for h in range(k.shape[1]):
        error = energy = divergence = 0.0
        for head in range(h * group, (h + 1) * group):
            for i in range(len(q)):
                seen = [j for j in range(len(k)) if np.isfinite(mask[i, j])]
                rows = []
                for keys in (k, near_k):
                    raw = np.array([scale * float(np.dot(q[i, head].astype("f8"), keys[j, h])) for j in seen])
                    logits = softcap * np.tanh(raw / softcap) if softcap else raw
                    logits = logits + slopes[head] * mask[i, seen]
                    if sinks is not None:
                        logits = np.append(logits, sinks[head])
                    rows.append((raw, np.exp(logits) / np.exp(logits).sum()))
                error += float(np.square(rows[1][0] - rows[0][0]).sum())
                energy += float(np.square(rows[0][0]).sum())
                divergence += float((rows[0][1] * np.log(rows[0][1] / rows[1][1])).sum())
        part = slice(h * group, (h + 1) * group)
        found.append(
            HeadError(
                head=h,
                nmse_k=float(np.square(near_k[:, h] - k[:, h]).sum() / np.square(k[:, h]).sum()),
                nmse_v=float(np.square(near_v[:, h] - v[:, h]).sum() / np.square(v[:, h]).sum()),
                score=float(np.sqrt(error / energy)),
                kl=divergence / (group * len(q)),
                output=float(np.linalg.norm((outputs[1] - outputs[0])[:, part]) / np.linalg.norm(outputs[0][:, part])),
            )
        )
    return found


CAUSAL = np.where(np.tril(np.ones((24, 24))), 0.0, -np.inf)
WINDOW = np.where(np.tril(np.ones((24, 24))) * np.triu(np.ones((24, 24)), -5), 0.0, -np.inf)
DISTANCE = CAUSAL - np.abs(np.subtract.outer(np.arange(24), np.arange(24)))


@pytest.mark.parametrize("name", ["pqo3", "pqo4", "q4_0", "q8_0"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": WINDOW},
        {"mask": np.zeros((24, 24))},
        {"softcap": 3.0},
        {"sinks": np.array([0.5, -1.0, 2.0, 0.0])},
        {"mask": DISTANCE, "max_bias": 8.0},
    ],
    ids=["causal", "window", "both directions", "softcap", "sinks", "alibi"],
)
def test_against_sums_written_out(name: str, options: dict[str, Any]) -> None:
    q, k, v = data(1)
    near_k, near_v = stored(k, name, 64), stored(v, name, 0)  # heads of 32 are not rotated
    expected = brute_force(q, k, v, near_k, near_v, 0.125, **{"mask": CAUSAL, **options})
    found = attention_error(q, k, v, [name], 0.125, **options)[name]
    for mine, theirs in zip(found, expected, strict=True):
        assert vars(mine) == pytest.approx(vars(theirs), rel=1e-4)
        assert mine.kl > 0 and mine.output > 0


def test_k_and_v_are_rotated_as_upstream_does() -> None:
    # By the largest power of two that divides the head size for K, by 64 for V; 96 is not a multiple of 64.
    for dim, size_k, size_v in ((128, 128, 64), (192, 64, 64), (96, 0, 0), (256, 256, 64)):
        q, k, v = data(2, dim_k=dim, dim_v=dim)
        near_k, near_v = stored(k, "q4_0", size_k), stored(v, "q4_0", size_v)
        expected = brute_force(q, k, v, near_k, near_v, dim**-0.5, mask=CAUSAL)
        found = attention_error(q, k, v, ["q4_0"], dim**-0.5)["q4_0"]
        for mine, theirs in zip(found, expected, strict=True):
            assert vars(mine) == pytest.approx(vars(theirs), rel=1e-4)


def test_rotation_helps_where_channels_are_hot_and_can_be_left_out() -> None:
    q, k, v = data(3, n=64)
    k[:, :, 5] *= 20
    found = {rotate: attention_error(q, k, v, ["q4_0", "pqo4"], 0.125, rotate=rotate) for rotate in (True, False)}
    assert found[True]["q4_0"][0].nmse_k < 0.8 * found[False]["q4_0"][0].nmse_k
    assert found[True]["pqo4"] == found[False]["pqo4"]


def test_f32_loses_nothing_and_more_bits_lose_less() -> None:
    q, k, v = data(4, n=128, dim_v=64)
    found = attention_error(q, k, v, list(CACHE_TYPES), 0.125)
    assert list(found) == list(CACHE_TYPES)
    assert all(vars(e) == {"head": e.head, **dict.fromkeys(list(vars(e))[1:], 0.0)} for e in found["f32"])
    outputs = {name: float(np.mean([e.output for e in errors])) for name, errors in found.items()}
    for better, worse in (("f16", "q8_0"), ("q8_0", "q5_0"), ("q5_0", "q4_0"), ("pqo4", "q4_0"), ("q4_0", "pqo3")):
        assert outputs[better] < outputs[worse]


def test_centring_removes_a_constant_offset() -> None:
    q, k, v = data(5, n=256)
    displaced = k + 5 * np.random.default_rng(6).standard_normal(k.shape[1:]).astype("f4")
    plain = attention_error(q, displaced, v, ["pqo3"], 0.125)["pqo3"]
    centred = attention_error(q, displaced, v, ["pqo3"], 0.125, offset=displaced.mean(axis=0))["pqo3"]
    alone = attention_error(q, k, v, ["pqo3"], 0.125, offset=k.mean(axis=0))["pqo3"]
    for p, c, a in zip(plain, centred, alone, strict=True):
        assert c.kl < 0.2 * p.kl and c.score < 0.5 * p.score
        assert (c.kl, c.output) == pytest.approx((a.kl, a.output), rel=0.02)  # the offset is gone, whatever it was


@given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 1), (4, 2), (6, 3)]), st.sampled_from(["pqo3", "q4_0"]))
def test_heads_do_not_meet(seed: int, heads: tuple[int, int], name: str) -> None:
    n_head, n_head_kv = heads
    q, k, v = data(seed, n=8, n_head=n_head, n_head_kv=n_head_kv)
    together = attention_error(q, k, v, [name], 0.2)[name]
    group = n_head // n_head_kv
    for h in range(n_head_kv):
        part = slice(h * group, (h + 1) * group)
        alone = attention_error(q[:, part], k[:, h : h + 1], v[:, h : h + 1], [name], 0.2)[name][0]
        assert {**vars(alone), "head": h} == pytest.approx(vars(together[h]), rel=1e-9)


def test_the_last_queries_of_a_longer_cache() -> None:
    q, k, v = data(7)
    some = attention_error(q[-3:], k, v, ["q4_0"], 0.125)["q4_0"]
    same = attention_error(q[-3:], k, v, ["q4_0"], 0.125, mask=CAUSAL[-3:])["q4_0"]
    assert some == same


def test_head_facts() -> None:
    rng = np.random.default_rng(8)
    k = rng.standard_normal((4000, 2, 64)).astype("f4")
    k[:, 1, [3, 60]] *= 6
    k[:, 0] += 2.0
    plain, hot = head_facts(k)
    assert (plain.outliers, hot.outliers) == ((), (3, 60))
    assert plain.offset == pytest.approx(np.sqrt(4 / 5), rel=0.01) and hot.offset < 0.05
    assert head_facts(np.zeros((4, 1, 32), "f4"))[0] == head_facts(np.zeros((9, 1, 32), "f4"))[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"types": ["q9"]}, "unknown cache type 'q9'"),
        ({"q": np.ones((24, 3, 64), "f4")}, r"q \(24, 3, 64\), k \(24, 2, 64\)"),
        ({"q": np.ones((24, 4, 32), "f4")}, "do not fit"),
        ({"v": np.ones((23, 2, 32), "f4")}, "do not fit"),
        ({"q": np.ones((24, 64), "f4")}, "do not fit"),
        ({"v": np.ones((24, 2, 40), "f4")}, "40 values cannot be stored as pqo3"),
        ({"mask": np.zeros((24, 23))}, r"\(n_q, n_kv\) = \(24, 24\), not \(24, 23\)"),
        ({"mask": np.full((24, 24), -np.inf)}, "every query must see a key"),
        ({"q": np.ones((30, 4, 64), "f4")}, "every query must see a key"),
        ({"q": np.ones((0, 4, 64), "f4")}, "every query must see a key"),
        ({"offset": np.ones((2, 64), "f4"), "softcap": 30.0}, "with a softcap"),
        ({"offset": np.ones((2, 64), "f4"), "sinks": np.zeros(4)}, "with attention sinks"),
        ({"offset": np.ones((2, 32), "f4")}, r"offset must be \(n_head_kv, head_dim_k\) = \(2, 64\)"),
        ({"sinks": np.zeros(3)}, r"sinks must be \(n_head,\) = \(4,\)"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], said: str) -> None:
    q, k, v = data(9)
    with pytest.raises(tqgguf.ArgumentError, match=said):
        attention_error(**{"q": q, "k": k, "v": v, "types": ["pqo3"], "scale": 0.125, **change})


@pytest.mark.parametrize("name", [name for name, kind in CACHE_TYPES.items() if kind.ours])
def test_the_cache_is_written_with_the_codec(name: str) -> None:
    x = data(10, n=50)[1]
    assert np.array_equal(round_trip(x, CACHE_TYPES[name]), tqgguf.dequantize(tqgguf.quantize(x, name), name))


def test_reading_a_permuted_tensor() -> None:
    _native.import_llama_cpp()
    base, cpu = (ctypes.CDLL(str(path)) for path in (library_path("ggml-base"), _native.cpu_backend_path()))
    for function in (base.ggml_init, base.ggml_new_tensor_3d, base.ggml_permute, cpu.ggml_backend_cpu_init):
        function.restype = ctypes.c_void_p
    base.ggml_backend_alloc_ctx_tensors.restype = ctypes.c_void_p

    class Params(ctypes.Structure):
        _fields_ = (("bytes", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))

    context = ctypes.c_void_p(base.ggml_init(Params(1 << 16, None, True)))
    backend = ctypes.c_void_p(cpu.ggml_backend_cpu_init())
    for name, dtype in (("f32", np.float32), ("f16", np.float16)):
        sizes = [ctypes.c_int64(n) for n in (8, 3, 5)]
        address = ctypes.c_void_p(base.ggml_new_tensor_3d(context, CACHE_TYPES[name].number, *sizes))
        permuted = ctypes.c_void_p(base.ggml_permute(context, address, 0, 2, 1, 3))
        buffer = ctypes.c_void_p(base.ggml_backend_alloc_ctx_tensors(context, backend))
        values = np.arange(120, dtype=dtype).reshape(5, 3, 8)
        size = ctypes.c_size_t(values.nbytes)
        base.ggml_backend_tensor_set(address, values.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(0), size)
        tensor = tensor_at(permuted.value or 0)
        assert op_name(tensor) == "PERMUTE"
        assert np.array_equal(read_tensor(tensor)[0], values.transpose(1, 0, 2))
        transposed = tensor_at(base.ggml_permute(context, address, 1, 0, 2, 3))
        with pytest.raises(tqgguf.UnsupportedError, match="not contiguous"):
            read_tensor(transposed)
        base.ggml_backend_buffer_free(buffer)
    base.ggml_backend_free(backend)
    base.ggml_free(context)
