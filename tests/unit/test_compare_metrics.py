"""Perplexity, divergence and the like against sums written out in Python floats; and what `compare` refuses unread."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tqgguf
from tqgguf.cache.policy import CachePolicy, resolve
from tqgguf.demo import model as demo
from tqgguf.diagnostics.compare import (
    MIN_CONTEXT,
    NamedCache,
    Reader,
    compared_caches,
    context_length,
    kl_divergence,
    log_softmax,
)
from tqgguf.diagnostics.texts import read_text
from tqgguf.errors import ArgumentError, TextError, TqggufError

LOGITS = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.floats(-80, 80, width=32)
)


def plain_log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    log_sum = top + math.log(math.fsum(math.exp(x - top) for x in row))
    return [x - log_sum for x in row]


def plain_divergence(p: list[float], q: list[float]) -> float:
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


@given(LOGITS)
def test_log_softmax(logits: np.ndarray) -> None:
    expected = [plain_log_softmax(row) for row in logits.tolist()]
    np.testing.assert_allclose(log_softmax(logits), expected, rtol=1e-13, atol=1e-13)


@given(LOGITS, st.integers(0, 2**32 - 1))
def test_divergence(logits: np.ndarray, seed: int) -> None:
    other = logits + np.random.default_rng(seed).normal(size=logits.shape).astype(np.float32)
    found = kl_divergence(log_softmax(logits), log_softmax(other))
    pairs = zip(logits.tolist(), other.tolist(), strict=True)
    expected = [plain_divergence(plain_log_softmax(a), plain_log_softmax(b)) for a, b in pairs]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-13)
    assert (kl_divergence(log_softmax(logits), log_softmax(logits)) == 0).all()


def test_divergence_of_a_pair_known_by_hand() -> None:
    p, q = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.5, 0.25]])
    assert kl_divergence(p, q)[0] == pytest.approx(0.25 * math.log(2))


def test_figures_of_a_type() -> None:
    # Two batches of different length; every figure is computed again from the rows, one at a time.
    rng = np.random.default_rng(3)
    reference, other = rng.normal(size=(2, 150, 11)).astype(np.float32) * 3
    targets = rng.integers(0, 11, 150).astype(np.int32)
    reader = Reader(NamedCache("pqo3", resolve("pqo3", 4)), context=None, seconds=4.0)
    for part in (slice(0, 40), slice(40, 150)):
        reader.score(log_softmax(reference[part]), other[part], targets[part])
    quality = reader.quality(tqgguf.read_model_info(demo.MODEL_PATH), n_ctx=256, n_tokens=1000)

    p, q = ([plain_log_softmax(row) for row in rows.tolist()] for rows in (reference, other))
    nll = [-row[target] for row, target in zip(q, targets, strict=True)]
    kld = sorted(plain_divergence(a, b) for a, b in zip(p, q, strict=True))
    assert quality.perplexity == pytest.approx(math.exp(math.fsum(nll) / 150), rel=1e-12)
    assert quality.kld.mean == pytest.approx(math.fsum(kld) / 150, rel=1e-12)
    assert quality.kld.median == pytest.approx((kld[74] + kld[75]) / 2, rel=1e-12)
    assert quality.kld.p99 == pytest.approx(kld[147] + 0.51 * (kld[148] - kld[147]), rel=1e-12)  # 0.99 * 149 = 147.51
    assert quality.kld.p999 == pytest.approx(kld[148] + 0.851 * (kld[149] - kld[148]), rel=1e-12)
    assert quality.kld.max == pytest.approx(kld[-1], rel=1e-12)
    variance = math.fsum((x - quality.kld.mean) ** 2 for x in kld) / 149
    assert quality.kld.mean_error == pytest.approx(math.sqrt(variance / 150), rel=1e-12)
    mean = math.log(quality.perplexity)
    error = math.sqrt(math.fsum((x - mean) ** 2 for x in nll) / 149 / 150)
    assert quality.perplexity_error == pytest.approx(quality.perplexity * error, rel=1e-12)
    alike = sum(a.index(max(a)) == b.index(max(b)) for a, b in zip(p, q, strict=True))
    assert 0 < quality.same_top == alike / 150 < 1
    assert quality.tokens_per_second == 250
    assert (quality.bits, quality.bytes_per_token, quality.tail, quality.bytes) == (3.5, 448, 0, 256 * 448)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(value: float) -> None:
    logits = np.array([[0, 1, value]], np.float32)
    with np.errstate(invalid="ignore"), pytest.raises(TqggufError, match="not finite with the cache q4_0"):
        Reader(NamedCache("q4_0", resolve("q4_0", 4)), context=None).score(
            np.zeros((1, 3)), logits, np.zeros(1, np.int32)
        )


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["f16"], "at least two"),
        ([], "at least two"),
        (["f16", "pqo3", "F16"], "f16 is given twice"),
        (["f16", "pqo5"], r"'pqo5'; valid types are f32.*pqo3"),
    ],
)
def test_caches_that_make_no_comparison(names: list[str], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        compared_caches(names, 4)
    with pytest.raises(ArgumentError, match=said):
        tqgguf.compare(demo.MODEL_PATH, names)


def test_labels(tmp_path: Path) -> None:
    policy = CachePolicy(("pqo4", "pqo3"), ("pqo3", "pqo3"))
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        policy.write(tmp_path / folder / "mine.gguf")
    paths = [tmp_path / "a" / "mine.gguf", str(tmp_path / "b" / "mine.gguf")]
    ranges = {"default": "q8_0", "layers": {"0": "f16"}}
    caches = compared_caches(["F16", ("pqo4", "pqo3"), {"default": "pqt4"}, policy, ranges, *paths], 2, tails=(0,))
    assert [cache.label for cache in caches] == ["f16", "pqo4/pqo3", "pqt4", "policy", "policy (2)", "mine", "mine (2)"]
    assert caches[4].policy.types_k == ("f16", "q8_0") and caches[5].policy.types_k == ("pqo4", "pqo3")
    with_tails = compared_caches(["f16", "pqo3", ranges, policy], 2, tails=(0, 64))
    assert [(cache.label, cache.tail) for cache in with_tails] == [
        ("f16", 0),
        ("pqo3", 0),
        ("pqo3+64", 64),
        ("policy", 0),
        ("policy+64", 64),
        ("policy (2)", 0),
        ("policy (2)+64", 64),
    ]
    usual = compared_caches(["f16", "q8_0", ranges, "pqo3", {"default": "q8_0", "layers": {"1": "pqt3"}}], 2)
    assert [(cache.label, cache.tail, cache.kept) for cache in usual] == [
        ("f16", 0, 0),
        ("q8_0", None, 0),
        ("policy", None, 0),
        ("pqo3+128", None, 128),
        ("policy (2)+128", None, 128),
    ]
    CachePolicy(("pqo4", "pqo3"), ("pqo3", "pqo3")).write(tmp_path / "pqo3.gguf")
    named = compared_caches([tmp_path / "pqo3.gguf", "pqo3"], 2, tails=(0,))
    assert [cache.label for cache in named] == ["pqo3", "pqo3 (2)"]
    for tails in ((), (5, 5)):
        with pytest.raises(ArgumentError, match="at least one and none twice"):
            compared_caches(["f16", "pqo3"], 2, tails)
    for cache in (policy, paths[0], ranges):
        with pytest.raises(ArgumentError, match="given twice"):
            compared_caches(["f16", cache, cache], 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_ctx": 127}, "127 tokens is too short.*128 at least"),
        ({"n_chunks": 0}, "n_chunks is 0"),
        ({"n_batch": 0}, "n_batch is 0"),
    ],
)
def test_numbers_out_of_range(options: dict[str, int], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        tqgguf.compare(demo.MODEL_PATH, **options)


def test_context_length() -> None:
    info = tqgguf.read_model_info(demo.MODEL_PATH)
    assert context_length(info, None) == 2048
    assert context_length(info, MIN_CONTEXT) == MIN_CONTEXT
    assert context_length(info, 4096) == 4096


def test_text_is_read_as_bytes_less_one_newline(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("é\r\nb\n\n".encode())
    assert read_text(path) == "é\r\nb\n"


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "latin"
    path.write_bytes(b"abc\xe9def")
    with pytest.raises(TextError, match=r"latin is not UTF-8 text: .* at byte 3"):
        read_text(path)
    with pytest.raises(TextError, match=r"cannot read .*missing: No such file"):
        read_text(tmp_path / "missing")
    with pytest.raises(TextError, match="cannot read"):
        read_text(tmp_path)
    with pytest.raises(TextError, match="text is empty"):
        tqgguf.compare(demo.MODEL_PATH, text="")
