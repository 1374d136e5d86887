"""Tokens that `Llama` removes from the cache: after the shared prefix of a new prompt, and rejected drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

import tqgguf
from tqgguf.demo.model import GREEDY_PROMPTS, MODEL_PATH
from tqgguf.gguf.info import KVLayer

TOKENS = np.random.default_rng(0).integers(5, 250, 1200).tolist()


def answer(model: Any, prompt: Sequence[int], n: int = 12) -> list[int]:
    """The n tokens that follow at temperature 0; in a model of noise another token changes all that come after it."""
    said = []
    for token in model.generate(list(prompt), temp=0.0, top_k=1):
        said.append(int(token))
        if len(said) == n:
            break
    return said


@pytest.fixture
def loaded() -> Any:
    """A model with one thread, closed when the test ends."""
    models: list[Any] = []

    def load(path: Path, **options: Any) -> Any:
        defaults = {"n_ctx": 2048, "n_batch": 128, "n_ubatch": 128, "n_threads": 1, "n_threads_batch": 1}
        models.append(tqgguf.Llama(path, verbose=False, **(defaults | options)))
        return models[-1]

    yield load
    for model in models:
        model.close()


@pytest.mark.parametrize("cache", ["f16", "pqo3"])
@pytest.mark.parametrize("name", ["gemma3", "gpt-oss"])
def test_a_window_of_its_own_size_never_answers_from_what_is_left(
    loaded: Any, architecture: Callable[[str], Path], name: str, cache: str
) -> None:
    # Windows of 96 tokens in 256 cells. Of 1000 tokens the last 256 are there: 850 can be gone back to, 800 cannot.
    model = loaded(architecture(name), cache=cache, tail=0, swa_full=False)
    assert max(layer.cells for layer in model.cache_info().layers if layer.layer == 0) == 256
    for shared, again in ((850, False), (800, True), (300, True), (50, True)):
        model.reset()
        answer(model, TOKENS[:1000], 1)
        prompt = TOKENS[:shared] + TOKENS[1000:1030]
        before = model.n_tokens_read
        said = answer(model, prompt)
        assert model.n_tokens_read - before == 30 + 11 + (shared if again else 0)
        assert said == answer(loaded(architecture(name), cache=cache, tail=0, swa_full=True), prompt)


def test_a_whole_window_is_gone_back_in_freely(loaded: Any, architecture: Callable[[str], Path]) -> None:
    model = loaded(architecture("gemma3"), cache="pqo3", tail=0)  # swa_full, as llama-cpp-python has it
    assert model.context_params.swa_full
    answer(model, TOKENS[:1000], 1)
    before = model.n_tokens_read
    said = answer(model, TOKENS[:50] + TOKENS[1000:1030])
    assert model.n_tokens_read - before == 30 + 11
    fresh = loaded(architecture("gemma3"), cache="pqo3", tail=0)
    assert said == answer(fresh, TOKENS[:50] + TOKENS[1000:1030])


@pytest.mark.parametrize(
    ("n_layer", "heads", "size", "window", "period", "mib"),
    [(34, 4, 256, 1024, 6, (952, 178)), (24, 8, 64, 128, 2, (336, 172))],
    ids=["gemma-3-4b", "gpt-oss-20b"],
)
def test_what_windows_of_their_own_size_save(
    n_layer: int, heads: int, size: int, window: int, period: int, mib: tuple[int, int]
) -> None:
    """The figures of docs/sequences.md; that llama.cpp allocates as many cells: tests/integration/test_fit.py."""
    layers = [KVLayer(i, heads, size, size, 0 if i % period == period - 1 else window) for i in range(n_layer)]
    pqo3 = tqgguf.CACHE_TYPES["pqo3"]
    for swa_full, want in zip((True, False), mib, strict=True):
        size_bytes = sum(x.cells(32768, swa_full=swa_full) * x.bytes_per_token(pqo3, pqo3) for x in layers)
        assert round(size_bytes / 2**20) == want


class Drafts(LlamaPromptLookupDecoding):  # type: ignore[misc]
    """Counts what it drafts, and makes every third draft wrong from its middle on."""

    def __init__(self, n: int) -> None:
        super().__init__(max_ngram_size=2, num_pred_tokens=n)
        self.calls = self.longest = 0

    def __call__(self, input_ids: Any, /, **kwargs: Any) -> Any:
        self.calls += 1
        draft = np.array(super().__call__(input_ids, **kwargs))
        if self.calls % 3 == 0:
            draft = np.resize(draft, self.num_pred_tokens) if len(draft) else np.full(self.num_pred_tokens, 7, np.intc)
            draft[len(draft) // 2 :] = 11
        self.longest = max(self.longest, len(draft))
        return draft


@pytest.mark.parametrize(("cache", "n", "tail"), [("pqo3", 10, 128), ("pqo3", 150, 128), (("pqo4", "pqt3"), 10, 0)])
def test_drafts_do_not_change_the_text(loaded: Any, cache: Any, n: int, tail: int) -> None:
    options = {"cache": cache, "tail": tail, "n_ctx": 1024, "n_batch": 512, "n_ubatch": 512}
    drafts = Drafts(n)
    plain, drafting = loaded(MODEL_PATH, **options), loaded(MODEL_PATH, draft_model=drafts, logits_all=True, **options)

    def text(model: Any, prompt: str) -> tuple[str, int]:
        reply = model.create_chat_completion([{"role": "user", "content": prompt}], temperature=0.0, max_tokens=32)
        return reply["choices"][0]["message"]["content"], reply["usage"]["completion_tokens"]

    # A batch of another size rounds logits otherwise, by 2e-4 of their norm. The first choice leads by 0.1 of it.
    said = [text(plain, prompt) for prompt in GREEDY_PROMPTS[::11]]
    assert [text(drafting, prompt) for prompt in GREEDY_PROMPTS[::11]] == said
    n_said = sum(n for _, n in said)
    assert drafts.longest == n
    assert drafts.calls < n_said - len(said)  # some drafts came true,
    assert drafting.n_tokens_read > plain.n_tokens_read  # and some were taken back


@pytest.mark.parametrize(
    ("name", "options"), [("jamba", {}), ("gemma3", {"swa_full": False}), ("gemma3", {"swa_full": True})]
)
def test_drafts_on_recurrent_layers_and_windows(
    loaded: Any, architecture: Callable[[str], Path], name: str, options: dict[str, Any]
) -> None:
    plain = loaded(architecture(name), cache="pqo3", tail=0, **options)
    drafting = loaded(architecture(name), cache="pqo3", tail=0, draft_model=Drafts(10), logits_all=True, **options)
    want = answer(plain, TOKENS[:300], 20)
    assert answer(drafting, TOKENS[:300], 20) == want


def test_drafts_longer_than_a_batch_are_an_error(loaded: Any) -> None:
    # llama.cpp ends the process when logits are asked for that it has not.
    model = loaded(MODEL_PATH, draft_model=Drafts(200), logits_all=True, n_ctx=1024)
    with pytest.raises(tqgguf.ArgumentError, match="drafts more than the 127 tokens that fit in a batch"):
        answer(model, model.tokenize(b"What is the capital of France?"), 60)


def test_nothing_is_taken_back_where_nothing_may_be_computed(loaded: Any, architecture: Callable[[str], Path]) -> None:
    model = loaded(architecture("jamba"), cache="pqo3", tail=0)
    model.eval(TOKENS[:40])
    model.n_tokens = 20
    model.stop()
    with pytest.raises(tqgguf.StoppedError):
        model.eval(TOKENS[20:30])
    assert model.n_tokens == 20
    model.resume()
    model.eval(TOKENS[20:30])
    assert model.n_tokens == 30 and model.n_tokens_read == 40 + 20 + 10
    model.close()
    with pytest.raises(tqgguf.CacheClosedError):
        model.eval(TOKENS[30:31])
