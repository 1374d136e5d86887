"""`tqgguf.compare` and `tqgguf.recall` on loaded models: the right tokens are scored, and types rank as they must.

Agreement with llama.cpp's own llama-perplexity needs that program: benchmarks/quality/compare_upstream.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tqgguf
from tqgguf import CACHE_TYPES, CachePolicy, Comparison
from tqgguf.config import MEASURED_TYPES
from tqgguf.demo import model as demo
from tqgguf.diagnostics.compare import log_softmax
from tqgguf.errors import ArgumentError, CacheTypeError, TextError, UnsupportedError

pytestmark = pytest.mark.model

Model = Callable[..., Path]
TEXT = " ".join(demo.recall_prompt(seed, 60).context for seed in range(3))
"""Some 1,260 tokens of the demo model, none of them control tokens."""


@pytest.fixture(scope="module")
def on_own_text() -> Comparison:
    return tqgguf.compare(demo.MODEL_PATH, tails=(0,), n_ctx=512, n_chunks=3, n_threads=1)


def test_the_reference_does_not_diverge_from_itself(on_own_text: Comparison) -> None:
    reference = on_own_text.rows[0]
    assert reference.type == "f16" and reference.same_top == 1
    assert set(vars(reference.kld).values()) == {0}


def test_types_rank_by_divergence(on_own_text: Comparison) -> None:
    kld = {row.type: row.kld.mean for row in on_own_text.rows}
    assert tuple(kld) == MEASURED_TYPES
    assert 0 < kld["q8_0"] < kld["q5_0"] < kld["pqo4"] < kld["q4_0"] < kld["pqo3"]
    assert kld["q8_0"] < 0.01 and kld["pqo3"] < 0.5
    same_top = {row.type: row.same_top for row in on_own_text.rows}
    assert 1 > same_top["q8_0"] > same_top["pqo4"] > same_top["pqo3"] > 0.8


@pytest.fixture(scope="module")
def with_tails() -> Comparison:
    """The context is four tails long; of the last half of a chunk a quarter of the keys is precise."""
    return tqgguf.compare(demo.MODEL_PATH, ["f16", "q4_0", "pqo3", "pqo4"], tails=(0, 32, 128), n_ctx=1024, n_chunks=2)


def test_a_tail_takes_divergence_away(with_tails: Comparison) -> None:
    kld = {row.type: row.kld.mean for row in with_tails.rows}
    names = ("q4_0", "pqo3", "pqo4")
    assert tuple(kld) == ("f16", *(f"{name}{n}" for name in names for n in ("", "+32", "+128")))
    for name in names:
        # The bar is 30 %; measured is two thirds.
        assert kld[f"{name}+128"] < 0.5 * kld[name]
        assert kld[f"{name}+128"] < kld[f"{name}+32"] < kld[name]


def test_a_tail_is_counted(with_tails: Comparison) -> None:
    row_bytes = 4 * 2 * (2 * 64 * 2 + 4)  # layers, K and V; each row has an owner's number of four bytes
    for row in with_tails.rows:
        assert row.tail == (int(row.type.split("+")[1]) if "+" in row.type else 0)
        assert row.bytes == 1024 * row.bytes_per_token + ((row.tail + 4) * row_bytes if row.tail else 0)


def test_bytes_per_token_are_exact(on_own_text: Comparison) -> None:
    for row in on_own_text.rows:
        assert row.bits == CACHE_TYPES[row.type].bits
        assert row.bytes_per_token == 4 * 2 * 2 * 64 * row.bits / 8  # layers, K and V, heads, values


def test_what_was_read(on_own_text: Comparison) -> None:
    assert (on_own_text.model, on_own_text.n_ctx, on_own_text.n_chunks) == ("demo.gguf", 512, 3)
    assert on_own_text.n_scored == 3 * 255
    assert "taught to predict answers" in on_own_text.notes[0]
    assert all(row.tokens_per_second > 0 for row in on_own_text.rows)


def test_figures_are_those_of_logits_computed_apart() -> None:
    # Every logit of each chunk by `Llama` itself, scored here: BOS, positions, targets and batches are all as stated.
    n_ctx, n_chunks = 300, 2
    first = n_ctx // 2
    log_p: dict[str, np.ndarray] = {}
    for name in ("f16", "pqo3"):
        model = tqgguf.Llama(
            demo.MODEL_PATH, cache=name, flash_attn=True, n_ctx=n_ctx, logits_all=True, n_threads_batch=1, verbose=False
        )
        tokens = model.tokenize(TEXT.encode())[: n_chunks * n_ctx]
        rows = []
        for start in range(0, n_chunks * n_ctx, n_ctx):
            model.reset()
            model.eval([model.token_bos(), *tokens[start + 1 : start + n_ctx]])
            rows.append(log_softmax(model.scores[first : n_ctx - 1]))
        log_p[name] = np.concatenate(rows)
        model.close()
    targets = np.concatenate([tokens[i * n_ctx + first + 1 : (i + 1) * n_ctx] for i in range(n_chunks)])
    p, q = log_p["f16"], log_p["pqo3"]
    found = tqgguf.compare(demo.MODEL_PATH, ["f16", "pqo3"], TEXT, n_ctx=n_ctx, n_chunks=n_chunks, n_threads=1)
    for row, own in zip(found.rows, (p, q), strict=True):
        assert row.perplexity == pytest.approx(np.exp(-own[np.arange(len(targets)), targets].mean()), rel=1e-6)
    assert found.rows[1].kld.mean == pytest.approx((np.exp(p) * (p - q)).sum(axis=1).mean(), rel=1e-6)
    assert found.rows[1].same_top == (p.argmax(axis=1) == q.argmax(axis=1)).mean()
    assert found.n_scored == len(targets) == 2 * 149


def test_the_size_of_batches_changes_rounding_only() -> None:
    whole, parts = (
        tqgguf.compare(demo.MODEL_PATH, ["f16", "q8_0"], TEXT, n_ctx=256, n_chunks=2, n_batch=n, n_threads=1)
        for n in (256, 100)  # 100: the scored half begins within a batch, and the last batch is short
    )
    assert parts.n_scored == whole.n_scored
    for a, b in zip(whole.rows, parts.rows, strict=True):
        assert a.perplexity == pytest.approx(b.perplexity, rel=2e-3)
    assert whole.rows[1].kld.mean == pytest.approx(parts.rows[1].kld.mean, rel=0.05)


def test_two_contexts_that_compute_the_same_do_not_diverge() -> None:
    # llama.cpp casts an f32 cache to f16 for flash attention: other buffers, the same arithmetic.
    found = tqgguf.compare(demo.MODEL_PATH, ["f32", "f16", "bf16"], TEXT, n_ctx=256, n_threads=1)
    assert found.n_chunks == 4  # all that the text has
    f32, f16, bf16 = found.rows
    assert f16.kld == f32.kld and f16.kld.max == 0 and f16.perplexity == f32.perplexity
    assert 0 < bf16.kld.mean < 0.01


def test_keys_stay_centred_from_chunk_to_chunk() -> None:
    # A mean that the keys do not have makes them worse to store: unless llama.cpp has cleared it with the first chunk.
    wrong = {i: 10 * np.random.default_rng(i).standard_normal((2, 64)).astype(np.float32) for i in range(4)}
    policy = CachePolicy(("pqo3",) * 4, ("f16",) * 4, wrong)
    found = tqgguf.compare(demo.MODEL_PATH, ["f16", ("pqo3", "f16"), policy], TEXT, tails=(0,), n_ctx=256, n_chunks=3)
    plain, centred = found.rows[1:]
    assert centred.type == "policy" and centred.bytes_per_token == plain.bytes_per_token
    assert centred.kld.mean > 3 * plain.kld.mean


def test_progress_counts_every_token_of_every_type() -> None:
    seen: list[tuple[int, int]] = []
    tqgguf.compare(
        demo.MODEL_PATH,
        ["f16", "pqo4"],
        TEXT,
        n_ctx=256,
        n_chunks=2,
        n_batch=128,
        n_threads=1,
        progress=lambda *at: seen.append(at),
    )
    assert seen == [(128 * i, 1024) for i in range(1, 9)]


def test_a_text_too_short_says_how_long_it_is() -> None:
    text = "The capital of France is Paris. " * 10
    n_tokens = len(tqgguf.Llama(demo.MODEL_PATH, vocab_only=True, verbose=False).tokenize(text.encode()))
    with pytest.raises(TextError, match=f"the text has {n_tokens} tokens, but a context of 256 needs as many"):
        tqgguf.compare(demo.MODEL_PATH, ["f16", "pqo3"], text, n_ctx=256, n_threads=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"caches": "pqo3"}, "caches is 'pqo3', must be a list"),
        ({"caches": 3}, "caches is 3, must be a list"),
        ({"tails": 128}, "tails is 128, must be a list"),
        ({"n_ctx": 256.0}, "n_ctx is 256.0, must be an integer"),
        ({"n_ctx": 2**32}, "n_ctx is 4294967296, must be at most 2147483647"),
        ({"n_chunks": True}, "n_chunks is True, must be an integer"),
        ({"n_batch": "8"}, "n_batch is '8', must be an integer"),
        ({"text": 5}, "text is of type int, must be a str"),
        ({"n_ctx": 2**21}, "own text has at most 1,048,576 tokens"),
    ],
)
def test_arguments_of_the_wrong_kind(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        tqgguf.compare(demo.MODEL_PATH, **options)
    if options.keys() <= {"caches", "tails"} or isinstance(options.get("n_ctx"), float):
        with pytest.raises(ArgumentError, match=said):
            tqgguf.recall(demo.MODEL_PATH, **options)


def test_a_text_too_short_is_told_before_a_context_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from tqgguf.diagnostics import compare

    monkeypatch.setattr(compare, "load", None)
    with pytest.raises(TextError, match="the text has 4 bytes, but a context of 5,000,000 needs as many tokens"):
        tqgguf.compare(demo.MODEL_PATH, ["f16", "pqo3"], "abcd", n_ctx=5_000_000)


def test_a_context_beyond_the_trained_one_is_noted(random_model: Model) -> None:
    path = random_model(n_ctx=256)
    found = tqgguf.compare(path, ["f16", "pqo3"], "abcd " * 100, n_ctx=320, n_threads=1)
    assert found.notes == ("the context of 320 tokens exceeds the 256 that the model was trained for",)


def test_another_model_needs_a_text(random_model: Model) -> None:
    with pytest.raises(ArgumentError, match=r"needs a text .*-f FILE.*only the demo model"):
        tqgguf.compare(random_model())


def test_a_type_the_model_cannot_have(random_model: Model) -> None:
    with pytest.raises(CacheTypeError, match="cannot have a pqo3 KV cache: layer 0: head_dim of K is 80"):
        tqgguf.compare(random_model(head_dim=80), ["f16", "pqo3"], "abcd " * 100, n_ctx=128)


def test_a_further_context_is_verified_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from tqgguf.model import llama as module

    def other_type(weights: Any, params: Any) -> Any:
        params.type_k = CACHE_TYPES["q8_0"].number
        return stock(weights, params)

    model = tqgguf.Llama(demo.MODEL_PATH, cache="f16", n_ctx=256, verbose=False)
    stock = module.llama_cpp.llama_init_from_model
    monkeypatch.setattr(module.llama_cpp, "llama_init_from_model", other_type)
    with pytest.raises(CacheTypeError, match="layer 0, K: asked for type pqo3, got q8_0"):
        model.add_context("pqo3")
    model.close()


# ---- Recall ----


def test_recall_of_the_demo_model() -> None:
    seen: list[tuple[int, int]] = []
    found = tqgguf.recall(
        demo.MODEL_PATH,
        ["f16", "pqo3"],
        tails=(0,),
        n_ctx=512,
        n_prompts=1,
        n_threads=1,
        progress=lambda *at: seen.append(at),
    )
    assert (found.unit, found.n_ctx) == ("facts", 512)
    places = [(score.type, score.size, score.depth) for score in found.scores]
    assert places == [
        (name, size, depth) for name in ("f16", "pqo3") for size in (16, 64) for depth in (0, 0.25, 0.5, 0.75, 1)
    ]
    # All 20 are right; a fact or two may be lost where sums are rounded otherwise.
    assert sum(score.right for score in found.scores) >= 17 and all(score.n == 1 for score in found.scores)
    assert seen == [(i, 20) for i in range(1, 21)]


def test_the_needle_test_of_another_chat_model(tmp_path: Path) -> None:
    path = tmp_path / "chat.gguf"
    path.write_bytes(demo.MODEL_PATH.read_bytes().replace(b"tqgguf demo", b"other model"))
    found = tqgguf.recall(path, ["f16", "q8_0"], n_ctx=512, n_prompts=1, n_predict=12, n_threads=1)
    assert (found.model, found.unit) == ("chat.gguf", "tokens")
    assert {score.size for score in found.scores} == {256, 512}  # 128 has no room for the facts
    assert found == tqgguf.recall(path, ["f16", "q8_0"], n_ctx=512, n_prompts=1, n_predict=12, n_threads=1)


def test_recall_refuses_what_it_cannot_ask(random_model: Model) -> None:
    with pytest.raises(UnsupportedError, match="has no chat template"):
        tqgguf.recall(random_model(), ["f16", "pqo3"])
    with pytest.raises(ArgumentError, match="128 tokens has no room for 16 facts"):
        tqgguf.recall(demo.MODEL_PATH, ["f16", "pqo3"], n_ctx=128)
    for name in ("n_prompts", "n_predict"):
        with pytest.raises(ArgumentError, match=f"{name} is 0"):
            tqgguf.recall(demo.MODEL_PATH, **{name: 0})
