"""`attention_path` says what llama.cpp and libtqgguf do: against their own logs and sources."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tqgguf
from tqgguf.demo import model as demo
from tqgguf.diagnostics.attention_path import MAX_FUSED, attention_path
from tqgguf.errors import ArgumentError
from tqgguf.model.context import captured_log

pytestmark = pytest.mark.model

Model = Callable[..., Path]


def test_the_limit_of_the_fused_kernels_is_that_of_the_source() -> None:
    source = Path(__file__).parents[2] / "native" / "src" / "kernels.h"
    found = re.search(r"#define TQI_MAX_FUSED (\d+)", source.read_text())
    assert found and int(found[1]) == MAX_FUSED


@pytest.mark.parametrize("cache", ["f16", "q8_0", "pqo3", "pqt4", ("q8_0", "f16"), ("f16", "pqo3"), ("pqo3", "f16")])
def test_flash_attention_is_on_where_it_is_said_to_be(cache: Any) -> None:
    path = attention_path(demo.MODEL_PATH, cache)
    with captured_log(quiet=True) as log:
        tqgguf.Llama(demo.MODEL_PATH, cache=cache, n_ctx=256, n_threads=1, verbose=False).close()
    (told,) = {m[1] for _, text in log if (m := re.search(r"flash_attn += (\w+)", text))}
    assert path.obstacle is None and path.flash == (told == "enabled")


@pytest.mark.parametrize(
    ("cache", "decode", "prefill", "said"),
    [
        ("pqo3", "fused", "tiled", "2 query heads share"),
        (("pqo4", "pqt3"), "fused", "tiled", "K and V are of types of tqgguf"),
        (("pqo4", "q8_0"), "tiled", "tiled", "only K is"),
        (("f16", "pqo3"), "tiled", "tiled", "only V is"),
        ("q8_0", "upstream rows", "upstream rows", "quantized"),
        (("f16", "q8_0"), "upstream rows", "upstream rows", "not the same"),
        ("f16", "upstream matrix products", "upstream matrix products", "no type needs flash attention"),
    ],
)
def test_ways(cache: Any, decode: str, prefill: str, said: str) -> None:
    (way,) = attention_path(demo.MODEL_PATH, cache).paths
    assert (way.decode, way.prefill) == (decode, prefill) and said in way.reason and way.layers == (0, 1, 2, 3)


@pytest.mark.parametrize("cache", ["q8_0", ("q4_0", "f16"), ("f16", "q5_1")])
def test_stock_types_with_a_tail_take_another_way(cache: Any) -> None:
    path = attention_path(demo.MODEL_PATH, cache, tail=16)
    assert path.flash and path.obstacle is None and any("newest 16 tokens" in note for note in path.notes)
    (way,) = path.paths
    assert (way.decode, way.prefill) == ("tiled", "tiled") and "stock types with a tail" in way.reason


def test_layers_with_types_of_their_own() -> None:
    ways = attention_path(demo.MODEL_PATH, {"default": "pqo3", "layers": {"0": "q8_0", "-1": ("pqo4", "q8_0")}}).paths
    assert [(way.layers, way.decode) for way in ways] == [((0,), "upstream rows"), ((1, 2), "fused"), ((3,), "tiled")]


def test_more_query_heads_than_the_fused_kernels_take(random_model: Model) -> None:
    assert attention_path(random_model(n_head=8, n_head_kv=1), "pqo3").paths[0].decode == "fused"
    (way,) = attention_path(random_model(n_head=9, n_head_kv=1), "pqo3").paths
    assert way.decode == "tiled" and "9 query heads share a KV head" in way.reason


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gemma2", "softcap"),
        ("gpt-oss", "sinks"),
        ("deepseek2", "MLA"),
        ("gemma3", "window"),
        ("llama", "precise tail"),
    ],
)
def test_what_else_takes_part(architecture: Model, name: str, said: str) -> None:
    path = attention_path(architecture(name), "pqo4")
    assert path.obstacle is None and any(said in note for note in path.notes)
    assert not any("precise tail" in note for note in attention_path(architecture(name), "pqo4", tail=0).notes)


def test_what_cannot_be(random_model: Model, architecture: Model) -> None:
    for model, cache, said in (
        (random_model(head_dim=80), "pqo3", "head_dim of K is 80"),
        (architecture("mamba"), "pqo3", "no KV cache"),
        (architecture("deepseek2"), ("pqo4", "pqo3"), "MLA"),
    ):
        path = attention_path(model, cache)
        assert path.obstacle and said in path.obstacle and path.paths == ()
    with pytest.raises(ArgumentError, match="q9"):
        attention_path(demo.MODEL_PATH, "q9")
