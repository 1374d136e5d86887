"""The model with hot key channels (benchmarks/quality/hot_model.py) computes what the model it was made of computes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import program
import pytest

import tqgguf
from tqgguf.demo import model as demo

make_hot = program.load("benchmarks/quality/hot_model.py").make_hot
TEXT = b"What is the capital of France? It is a city on the river Seine, and its name is"

pytestmark = pytest.mark.model


def logits(path: Path, cache: str) -> Any:
    """(tokens, n_vocab), of a text that is read with one thread."""
    options: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "logits_all": True}
    with contextlib.closing(tqgguf.Llama(path, cache=cache, tail=0, verbose=False, **options)) as model:
        model.eval(model.tokenize(TEXT))
        return np.array(model.scores[: model.n_tokens])


def test_it_computes_the_same_and_has_hot_keys(tmp_path: Path) -> None:
    plain, hot = tmp_path / "plain.gguf", tmp_path / "hot.gguf"
    make_hot(demo.MODEL_PATH, plain, 1, 2)
    make_hot(demo.MODEL_PATH, hot, 64, 2)
    exact = logits(plain, "f32")
    assert np.array_equal(logits(hot, "f32"), exact)
    # Powers of two pass through every product, so that only a cache whose blocks share a scale notices them.
    moved = [np.abs(logits(path, "pqo3") - exact).max() for path in (plain, hot)]
    assert moved[1] > 2 * moved[0]


@pytest.mark.parametrize(
    ("scale", "pairs", "message"),
    [(3, 2, "must be a power of two"), (0, 2, "must be a power of two"), (2, 0, "0 pairs"), (2, 999, "999 pairs")],
)
def test_what_is_refused(tmp_path: Path, scale: float, pairs: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_hot(demo.MODEL_PATH, tmp_path / "hot.gguf", scale, pairs)
    assert not (tmp_path / "hot.gguf").exists()


def test_the_source_is_not_written_over(tmp_path: Path) -> None:
    model, link = tmp_path / "model.gguf", tmp_path / "link.gguf"
    model.write_bytes(demo.MODEL_PATH.read_bytes())
    link.symlink_to(model)
    for target in (model, link):
        with pytest.raises(ValueError, match="is the source itself"):
            make_hot(model, target, 64, 2)
    assert model.read_bytes() == demo.MODEL_PATH.read_bytes()
