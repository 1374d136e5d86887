"""The cache that llama.cpp made is compared with what it was asked for: every tensor, by what the hook in it tells."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tqgguf
from tqgguf import CACHE_TYPES
from tqgguf._native import settings
from tqgguf._native.settings import tensors_listed
from tqgguf.cache.policy import CachePolicy, resolve
from tqgguf.cache.tensors import CacheShape, CacheTensor, check_tensors
from tqgguf.demo import model as demo
from tqgguf.errors import CacheTypeError
from tqgguf.model import context

pytestmark = pytest.mark.model


def load(path: Path, **options: Any) -> Any:
    return tqgguf.Llama(path, n_ctx=512, n_threads=1, verbose=False, **options)


def lied(change: Callable[[list[CacheTensor]], list[CacheTensor]]) -> Callable[[], Any]:
    """In the place of `tensors_listed`: the list, changed."""

    @contextlib.contextmanager
    def listed() -> Any:
        with tensors_listed() as made:
            yield made
        made[:] = change(list(made))

    return listed


def swapped(made: list[CacheTensor]) -> list[CacheTensor]:
    layers = {0: 1, 1: 0}
    return [replace(tensor, layer=layers.get(tensor.layer, tensor.layer)) for tensor in made]


def changed(at: int, **lie: Any) -> Callable[[list[CacheTensor]], list[CacheTensor]]:
    return lambda made: [*made[:at], replace(made[at], **lie), *made[at + 1 :]]


LIES: list[tuple[Callable[[list[CacheTensor]], list[CacheTensor]], str]] = [
    (lambda made: [], "layer 0, K: asked for pqo4, got no K"),
    (lambda made: made[:-1], "layer 3, V: asked for pqt3, got no V"),
    (lambda made: [*made, made[3]], "layer 1, V: asked for none, got one"),
    (swapped, "layer 1, K: asked for type pqo3, got pqo4"),
    *(
        (changed(at, **lie), said)
        for at, lie, said in (
            (2, {"type": CACHE_TYPES["pqt3"].number}, "layer 1, K: asked for type pqo3, got pqt3"),
            (2, {"type": 77}, "layer 1, K: asked for type pqo3, got type 77"),
            (5, {"bytes": 512 * 56 + 1}, "layer 2, V: asked for bytes 28672, got 28673"),
            (5, {"n_cells": 256}, "layer 2, V: asked for cells 512, got 256"),
            (5, {"n_stream": 2}, "layer 2, V: asked for streams 1, got 2"),
            (6, {"n_embd": 64}, "layer 3, K: asked for values of a token 128, got 64"),
            (6, {"n_mean": 0}, "layer 3, K: asked for values of a mean key 128, got 0"),
            (4, {"n_mean": 128}, "layer 2, K: asked for values of a mean key 0, got 128"),
            (6, {"n_gain": 64}, "layer 3, K: asked for values of a key gain 128, got 64"),
            (4, {"n_gain": 128}, "layer 2, K: asked for values of a key gain 0, got 128"),
            (6, {"calibration_sum": 1}, r"layer 3, K: asked for a calibration that sums up to \d+, got 1"),
            (7, {"tail_recent": 127}, r"layer 3, V: asked for rows of a tail \(128, 4\), got \(127, 4\)"),
            (7, {"tail_bytes": 0}, "layer 3, V: asked for bytes of a tail 34320, got 0"),
            (0, {"rotated": False}, "layer 0, K: asked for rotation True, got False"),
            (2, {"rotated": True}, "layer 1, K: asked for rotation False, got True"),
        )
    ),
]


@pytest.mark.parametrize(("change", "said"), LIES)
def test_a_cache_that_is_not_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[list[CacheTensor]], list[CacheTensor]], said: str
) -> None:
    """tests/patches/test_lies.py has libraries that make such caches."""
    one = np.ones((2, 64), np.float32)
    policy = CachePolicy(("pqo4", "pqo3", "f16", "pqo3"), ("pqt3",) * 4, {1: one, 3: one}, k_gains={0: one, 3: 2 * one})
    with contextlib.closing(load(demo.MODEL_PATH, cache=policy)) as model:
        assert [layer.centred for layer in model.cache_info().layers] == [False, True, False, True]
        assert [layer.calibrated for layer in model.cache_info().layers] == [True, True, False, True]
        monkeypatch.setattr(context, "tensors_listed", lied(change))
        with pytest.raises(CacheTypeError, match=f"another KV cache than it was asked for: {said}"):
            load(demo.MODEL_PATH, cache=policy)
        with pytest.raises(CacheTypeError, match=said):
            model.add_context(policy)


def test_a_hook_that_lies_about_the_rotation_of_a_stock_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers are rotated or none is: the demo model's heads of 64, where a side has a quantized type."""
    policy = CachePolicy(("q8_0", "f16", "f16", "f16"), ("f16",) * 4)
    for cache in (policy, "q8_0", "f16"):
        load(demo.MODEL_PATH, cache=cache).close()
    for cache, at, asked in ((policy, 2, True), (policy, 3, False), ("q8_0", 1, True), ("f16", 0, False)):
        said = f"layer {at // 2}, {'KV'[at % 2]}: asked for rotation {asked}, got {not asked}"
        with monkeypatch.context() as patch, pytest.raises(CacheTypeError, match=said):
            patch.setattr(context, "tensors_listed", lied(changed(at, rotated=not asked)))
            load(demo.MODEL_PATH, cache=cache)
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    load(demo.MODEL_PATH, cache="q8_0").close()


def test_a_tensor_that_is_neither_k_nor_v(monkeypatch: pytest.MonkeyPatch) -> None:
    real = settings.base()

    class Lying:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def tq_ggml_cache_list(self, notes: Any, n: int) -> int:
            found = int(real.tq_ggml_cache_list(notes, n))
            if n:
                notes[1].side = 2
            return found

    monkeypatch.setattr(settings, "base", Lying)
    with pytest.raises(CacheTypeError, match="layer 0, V: asked for f16, got no V"):
        load(demo.MODEL_PATH, cache="f16")
    made = [CacheTensor(0, "side 2", 1, 128, 512, 1, 512 * 256, 0, 0, 0, 0, 0, 0, "CPU", False)]
    info = replace(tqgguf.read_model_info(demo.MODEL_PATH), exact=False)
    with pytest.raises(CacheTypeError, match="layer 0, side 2: the policy has K and V of 4 layers"):
        check_tensors(made, info, resolve("f16", 4), CacheShape(512, 512, 1, False, True, 0))
