"""Tests claims of docs/faq.md: LoRA, prompt look-up decoding, embeddings, models without a cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import write_lora

import tqgguf
from tqgguf.demo import model as demo
from tqgguf.errors import CacheTypeError

pytestmark = pytest.mark.model

PROMPT = demo.recall_prompt(1, 100)


def load(cache: str, path: Path = demo.MODEL_PATH, **options: Any) -> tqgguf.Llama:
    options = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "verbose": False, **options}
    return tqgguf.Llama(path, cache=cache, **options)


def apart(a: Any, b: Any) -> float:
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(b))


def test_lora(tmp_path: Path) -> None:
    lora = str(write_lora(tmp_path / "lora.gguf"))
    found = {}
    for cache, options in (("f16", {}), ("f16", {"lora_path": lora}), ("pqo4", {"lora_path": lora})):
        with contextlib.closing(load(cache, logits_all=True, **options)) as model:
            model.eval(model.tokenize(PROMPT.context.encode())[:300])
            found[cache, bool(options)] = model.scores[: model.n_tokens].copy()
    moved = apart(found["f16", True], found["f16", False])
    assert moved > 0.05  # the adapter does something
    assert apart(found["pqo4", True], found["f16", True]) < moved / 2


def test_prompt_look_up_decoding() -> None:
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    calls: list[int] = []

    class Draft(LlamaPromptLookupDecoding):
        def __call__(self, input_ids: Any, /, **kwargs: Any) -> Any:
            found = super().__call__(input_ids, **kwargs)
            calls.append(len(found))
            return found

    answers, read = [], []
    for options in ({}, {"logits_all": True, "draft_model": Draft(num_pred_tokens=4)}):
        with contextlib.closing(load("pqo3", **options)) as model:
            message = [{"role": "user", "content": PROMPT.prompt}]
            answers.append(model.create_chat_completion(message, temperature=0)["choices"][0]["message"]["content"])
            read.append(model.n_tokens_read)
    # The first choice leads by 0.1 of the logits' norm; batches of another size move them by 2e-4.
    assert answers[0] == answers[1] and PROMPT.answer in answers[0]
    assert max(calls) == 4 and read[1] > read[0]  # tokens were drafted, and some of them rejected


def test_embeddings() -> None:
    text = PROMPT.context[:2000]
    found = {}
    for cache in ("f16", "pqo4", "pqo3"):
        with contextlib.closing(load(cache, embedding=True, n_batch=1024, tail=0)) as model:
            found[cache] = model.create_embedding(text)["data"][0]["embedding"]
            assert model.cache_info().type_k == cache
    assert np.shape(found["f16"])[-1] == 256
    assert 0 < apart(found["pqo4"], found["f16"]) < 0.2
    assert apart(found["pqo4"], found["f16"]) < apart(found["pqo3"], found["f16"])


def test_a_model_without_a_cache(architecture: Callable[[str], Path]) -> None:
    with pytest.raises(CacheTypeError, match="architecture mamba has no KV cache"):
        load("pqo3", architecture("mamba"))
    with contextlib.closing(load("f16", architecture("mamba"))) as model:
        assert model.cache_info().bytes == 0
