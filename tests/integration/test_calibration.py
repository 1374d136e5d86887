"""Calibrated keys: stored less a mean and times a gain, with queries divided by the gain, models compute what they did.

The models are random, their weights f32: for weights of Q8_0 llama.cpp rounds activations to 8 bits, and one that falls
to the other level moves logits by 2e-4.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import ARCHITECTURES

import tqgguf
from tqgguf import CachePolicy, CacheTypeError

pytestmark = pytest.mark.model

F32_ROUNDING = 4e-6
"""Of an f32 cache, relative to the logits: mean and gain round a key twice and a query once, by 2^-24 each, and every
sum behind them rounds otherwise. Measured: 3e-7 to 6e-7. Keys rounded to f16 move logits by 4e-4 or more."""

GELU_ROUNDING = 2e-4
"""The same where an activation is GELU, for which ggml has a table of f16: a value that falls to the next entry moves
by 2^-11. Measured: 8e-5 at the most."""

GELU = ("gemma2", "gemma3", "gpt2", "falcon")

TOKENS = np.random.default_rng(5).integers(3, 250, 160).tolist()


def logits(path: Path, cache: Any, **options: Any) -> np.ndarray:
    """Of the last of 128 tokens that are read at once, and of 32 that follow one by one."""
    from llama_cpp import llama_get_logits_ith

    settings = {"n_ctx": 256, "n_threads": 1, "verbose": False, "tail": 0, **options}
    with contextlib.closing(tqgguf.Llama(path, cache=cache, **settings)) as model:
        found = []
        for part in (TOKENS[:128], *([token] for token in TOKENS[128:])):
            model.eval(part)
            found.append(np.ctypeslib.as_array(llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),)).copy())
    assert np.isfinite(found).all()
    return np.array(found, np.float64)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def policy(
    path: Path, types: tuple[str, str], means: bool = True, gains: bool = True, most: float = 8.0
) -> CachePolicy:
    """Means and gains, from 1/most to most, of all layers: any are right."""
    info, random = tqgguf.read_model_info(path), np.random.default_rng(1)
    shapes = {layer.index: (layer.n_head_kv, layer.head_dim_k) for layer in info.layers}
    m = {i: random.standard_normal(shape).astype(np.float32) for i, shape in shapes.items() if means}
    g = {i: (most ** random.uniform(-1, 1, shape)).astype(np.float32) for i, shape in shapes.items() if gains}
    return CachePolicy((types[0],) * info.n_layer, (types[1],) * info.n_layer, m, k_gains=g)


@pytest.mark.parametrize(
    "shape",
    [
        {"n_head": 2, "n_head_kv": 2},  # a query head for each KV head
        {"n_head": 3, "n_head_kv": 1},
        {"n_head": 8, "n_head_kv": 2, "head_dim": 32},
        {"arch": "stablelm", "n_head": 1, "n_head_kv": 1, "n_rot": 16},
        {"arch": "refact"},  # ALiBi
    ],
    ids=str,
)
def test_scores_stay_what_they_are(random_model: Callable[..., Path], shape: dict[str, Any]) -> None:
    # Without flash attention llama.cpp computes on an f32 cache as it is.
    path = random_model(**shape)
    exact = logits(path, "f32", flash_attn=False)
    for which in ({"means": False}, {"gains": False}, {}):
        found = distance(logits(path, policy(path, ("f32", "f32"), **which), flash_attn=False), exact)
        assert 0 < found < F32_ROUNDING, which


@pytest.mark.parametrize("name", sorted({*ARCHITECTURES} - {"llama", "mamba", "deepseek2"}))
def test_every_architecture_writes_and_reads_keys_where_they_are_calibrated(
    architecture: Callable[[str], Path], name: str
) -> None:
    path = architecture(name)
    exact = logits(path, "f32", flash_attn=False)
    means = tqgguf.read_model_info(path).centring_obstacle is None
    assert means or name in ("gemma2", "gpt-oss")
    found = distance(logits(path, policy(path, ("f32", "f32"), means=means), flash_attn=False), exact)
    assert 0 < found < (GELU_ROUNDING if name in GELU else F32_ROUNDING)


@pytest.mark.parametrize(
    ("name", "which", "said"),
    [
        ("deepseek2", {"means": False}, r"keys cannot have gains: K and V share one latent in this model \(MLA\)"),
        ("deepseek2", {"gains": False}, r"keys cannot be centred: K and V share one latent in this model \(MLA\)"),
        ("gemma2", {}, r"keys cannot be centred: this model caps its attention scores \(softcap\)"),
        ("gpt-oss", {}, "keys cannot be centred: this model has attention sinks"),
    ],
)
def test_what_cannot_be_calibrated(
    architecture: Callable[[str], Path], name: str, which: dict[str, bool], said: str
) -> None:
    path = architecture(name)
    with pytest.raises(CacheTypeError, match=said):
        logits(path, policy(path, ("f16", "f16"), **which))


def test_flash_attention_and_f16(random_model: Callable[..., Path]) -> None:
    path = random_model()
    exact = logits(path, "f32", flash_attn=False)
    plain = distance(logits(path, "f16"), exact)
    # Keys less a mean of their own size have 1.4 times their rounding error.
    assert 0 < distance(logits(path, policy(path, ("f16", "f16"))), exact) < 2 * plain


@pytest.mark.parametrize("n_head", [2, 6])
@pytest.mark.parametrize("cache", [("pqo3", "pqo3"), ("pqt4", "f16"), ("q4_0", "q4_0")])
def test_a_tail_holds_calibrated_keys(random_model: Callable[..., Path], cache: tuple[str, str], n_head: int) -> None:
    path = random_model(n_head=n_head)
    exact = logits(path, "f32", flash_attn=False)
    # Rows of a tail are transformed and then rounded to f16: the error of a block's largest value is shared by all. So
    # any gains but the best ones cost precision, here those of 1/2 to 2.
    calibrated = policy(path, cache, most=2.0)
    plain, found, blocks = (
        distance(logits(path, each, tail=tail), exact)
        for each, tail in ((cache, 256), (calibrated, 256), (calibrated, 0))
    )
    assert found < 3 * plain < 2e-3 < 0.1 < blocks, (found, plain, blocks)


@pytest.mark.parametrize("k", ["q8_0", "q4_0", "iq4_nl"])
@pytest.mark.parametrize("head_dim", [64, 128, 96])
def test_stock_types_are_rotated_behind_their_calibration(
    random_model: Callable[..., Path], k: str, head_dim: int
) -> None:
    path = random_model(head_dim=head_dim)
    info = tqgguf.read_model_info(path)
    plain = logits(path, (k, k))
    ones = {layer.index: np.ones((layer.n_head_kv, head_dim), np.float32) for layer in info.layers}
    same = CachePolicy((k,) * 2, (k,) * 2, k_gains=ones)
    np.testing.assert_array_equal(logits(path, same), plain)  # llama.cpp's own rotation
    # Beside a type of tqgguf llama.cpp rotates nothing; the calibrated layer is.
    mixed = CachePolicy((k, "pqo3"), (k, "pqo3"), k_gains=ones)
    with contextlib.closing(tqgguf.Llama(path, cache=mixed, n_ctx=256, verbose=False)) as model:
        assert [layer.calibrated for layer in model.cache_info().layers] == [True, True]
    exact = logits(path, "f32", flash_attn=False)
    # Without the rotation of queries, or of keys, it would be near 1.4.
    assert distance(logits(path, policy(path, (k, k), most=2.0)), exact) < 3 * distance(plain, exact)


def test_a_cleared_cache_keeps_its_calibration(random_model: Callable[..., Path]) -> None:
    from llama_cpp import llama_get_logits_ith, llama_get_memory, llama_memory_clear

    path = random_model()
    for types in (("pqo3", "pqo3"), ("q8_0", "f16")):
        with contextlib.closing(
            tqgguf.Llama(path, cache=policy(path, types), n_ctx=256, n_threads=1, verbose=False)
        ) as model:
            found = []
            for _ in range(2):
                model.eval(TOKENS)
                found.append(np.ctypeslib.as_array(llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),)).copy())
                llama_memory_clear(llama_get_memory(model.ctx), True)
                model.n_tokens = 0
        np.testing.assert_array_equal(*found)
