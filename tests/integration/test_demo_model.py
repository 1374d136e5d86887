"""The bundled model on a compressed cache: it still answers, and the cache takes exactly what it should."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import tqgguf
from tqgguf.demo import model as demo

pytestmark = pytest.mark.model


@pytest.fixture(params=["pqo3", "pqo4", "pqt3", "pqt4", "pqt2", "pqt5"])
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    loaded = tqgguf.Llama(demo.MODEL_PATH, cache=request.param, n_ctx=2048, verbose=False)
    yield loaded
    loaded.close()


def ask(model: Any, prompt: str) -> str:
    reply = model.create_chat_completion([{"role": "user", "content": prompt}], temperature=0.0, max_tokens=24)
    return str(reply["choices"][0]["message"]["content"])


def test_paris_and_exact_bytes(model: Any) -> None:
    assert "Paris" in ask(model, "What is the capital of France?")
    info = model.cache_info()
    parts = tqgguf.CACHE_TYPES[info.type_k].bytes
    assert (info.bytes - info.tail_bytes) * 64 == info.f16_bytes * parts
    assert info.f16_bytes == 2048 * 4 * 2 * 2 * 64 * 2
    assert info.tail_bytes == 4 * 2 * (128 + 4) * (2 * 64 * 2 + 4)  # of each row, its owner's number
    assert info.ratio == info.bytes / info.f16_bytes


def test_most_capitals_survive_compression(model: Any) -> None:
    countries = list(demo.CAPITALS)[::4]
    right = sum(demo.capital_correct(ask(model, demo.capital_question(c, i % 4)), c) for i, c in enumerate(countries))
    assert right >= 0.9 * len(countries)


@pytest.mark.slow
def test_greedy_text_and_recall_stay_near_f16() -> None:
    # A part of benchmarks/quality/demo_quality.py, whose 50 and 200 prompts give the figures that are published.
    prompts = [demo.GREEDY_PROMPTS[i] for i in range(0, 50, 3)]
    cases = [demo.recall_prompt(9000 + i, 140) for i in range(8)]
    texts: dict[str, list[str]] = {}
    right: dict[str, list[bool]] = {}
    for cache in ("f16", "pqo4", "pqo3"):
        model = tqgguf.Llama(demo.MODEL_PATH, cache=cache, flash_attn=True, n_ctx=2048, n_batch=2048, verbose=False)
        texts[cache], right[cache] = [], []
        for prompt in prompts:
            model.reset()
            texts[cache].append(ask(model, prompt))
        for case in cases:
            model.reset()
            right[cache].append(demo.recall_correct(ask(model, case.prompt), case))
        model.close()
    assert sum(right["f16"]) >= 6
    for cache in ("pqo4", "pqo3"):
        same = sum(a == b for a, b in zip(texts[cache], texts["f16"], strict=True))
        lost = sum(a and not b for a, b in zip(right["f16"], right[cache], strict=True))
        assert same >= 0.75 * len(prompts), cache
        assert lost <= 2, cache
