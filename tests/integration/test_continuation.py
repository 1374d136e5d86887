"""`tqgguf.continuation`: caches follow the reference's answer, and where they leave it is where their own would."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest

import tqgguf
from tqgguf._native import import_llama_cpp
from tqgguf.demo import model as demo
from tqgguf.diagnostics.texts import own_text
from tqgguf.errors import ArgumentError, TextError
from tqgguf.gguf.info import read_model_info

llama_cpp: Any = import_llama_cpp()
pytestmark = pytest.mark.model

N_CTX, N_GENERATE, N_CHUNKS = 256, 48, 3
N_PROMPT = N_CTX - N_GENERATE


@pytest.fixture(scope="module")
def followed() -> tqgguf.Continuation:
    return tqgguf.continuation(
        demo.MODEL_PATH,
        ["f16", "q8_0", "q4_0", "pqo3"],
        n_generate=N_GENERATE,
        tails=(0,),
        n_ctx=N_CTX,
        n_chunks=N_CHUNKS,
    )


def test_the_reference_agrees_with_itself(followed: tqgguf.Continuation) -> None:
    reference = followed.rows[0]
    assert (followed.n_prompt, followed.n_generate) == (N_PROMPT, N_GENERATE)
    assert reference.agreed == (N_GENERATE,) * N_CHUNKS and reference.same_top == 1
    assert set(vars(reference.kld).values()) == {0} and set(reference.by_position) == {0}


def test_figures_belong_together(followed: tqgguf.Continuation) -> None:
    for row in followed.rows[1:]:
        sizes = np.diff([N_GENERATE * i // 5 for i in range(6)])
        assert np.average(row.by_position, weights=sizes) == pytest.approx(row.kld.mean)
        assert 0 < row.kld.median < row.kld.p999 <= row.kld.max
    kld = {row.type: row.kld.mean for row in followed.rows}
    assert kld["q8_0"] < min(kld["q4_0"], kld["pqo3"])


def greedy(cache: str, prompt: list[int]) -> list[int]:
    """The answer of a model of its own with that cache, computed as users compute it."""
    answer: list[int] = []
    options: dict[str, Any] = {"cache": cache, "tail": 0, "n_ctx": N_CTX, "flash_attn": True, "verbose": False}
    with contextlib.closing(tqgguf.Llama(demo.MODEL_PATH, **options)) as model:
        model.eval(prompt)
        while len(answer) < N_GENERATE:
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),))
            answer.append(int(logits.argmax()))
            model.eval(answer[-1:])
    return answer


def test_own_answers_agree_as_long_as_it_says(followed: tqgguf.Continuation) -> None:
    text = own_text(read_model_info(demo.MODEL_PATH), N_CTX, N_CHUNKS)
    with contextlib.closing(tqgguf.Llama(demo.MODEL_PATH, n_ctx=N_CTX, verbose=False)) as model:
        tokens = model.tokenize(text.encode(), add_bos=True, special=True)
    for i in range(N_CHUNKS):
        prompt = [tokens[0], *tokens[i * N_CTX + 1 : i * N_CTX + N_PROMPT]]  # each chunk begins with BOS
        reference = greedy("f16", prompt)
        for row in followed.rows[1:]:
            own = greedy(row.type, prompt)
            same = [a == b for a, b in zip(reference, own, strict=True)]
            assert row.agreed[i] == (N_GENERATE if all(same) else same.index(False))


def test_a_draw_is_the_seeds(followed: tqgguf.Continuation) -> None:
    def drawn(seed: int) -> tqgguf.Continuation:
        return tqgguf.continuation(
            demo.MODEL_PATH,
            ["f16", "pqo3"],
            n_generate=16,
            tails=(0,),
            n_ctx=128,
            n_chunks=1,
            temperature=2.0,
            seed=seed,
        )

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"n_generate": 0}, ArgumentError, "n_generate is 0"),
        ({"n_generate": 129}, ArgumentError, "at most half of the context of 256"),
        ({"n_generate": 8.5}, ArgumentError, "n_generate is 8.5"),
        ({"n_generate": 8, "temperature": -1}, ArgumentError, "temperature is -1"),
        ({"n_generate": 8, "temperature": float("nan")}, ArgumentError, "temperature is nan"),
        ({"n_generate": 8, "text": "short"}, TextError, "give a longer text"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        tqgguf.continuation(demo.MODEL_PATH, ["f16", "pqo3"], n_ctx=256, **options)
