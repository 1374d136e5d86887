"""The bundled model on a compressed cache: it still answers, and the cache takes exactly what it should."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import tqgguf
from tqgguf import demo

pytestmark = pytest.mark.model


@pytest.fixture(params=["pqo3", "pqo4"])
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
    parts = {"pqo3": 14, "pqo4": 18}[info.type_k]
    assert info.bytes * 64 == info.f16_bytes * parts
    assert info.f16_bytes == 2048 * 4 * 2 * 2 * 64 * 2
    assert info.ratio == parts / 64


def test_most_capitals_survive_compression(model: Any) -> None:
    countries = list(demo.CAPITALS)[::4]
    right = sum(demo.capital_correct(ask(model, demo.capital_question(c, i % 4)), c) for i, c in enumerate(countries))
    assert right >= 0.9 * len(countries)
