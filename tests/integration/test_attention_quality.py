"""Q, K and V taken from llama.cpp: they are what its cache holds and what its attention computes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from graph_hook import NamedTensors

import tqgguf
from tqgguf import CACHE_TYPES, reference
from tqgguf._native.ggml import round_trip
from tqgguf.demo import model as demo
from tqgguf.diagnostics.attention import attention_error, attention_quality
from tqgguf.diagnostics.capture import capture_attention, loaded
from tqgguf.model import reading
from tqgguf.model.reading import AttentionInputs

pytestmark = pytest.mark.model

N = 160
TEXT = demo.recall_prompt(7, 64).prompt
WORDS = "some words " * 40


@pytest.fixture(scope="module")
def inputs() -> dict[int, AttentionInputs]:
    return capture_attention(demo.MODEL_PATH, TEXT, range(4), n_ctx=N)


def walsh(x: Any) -> Any:
    """x (..., 64) behind the rotation llama.cpp applies to heads of 64, which is its own inverse."""
    matrix = np.array([[(-1.0) ** (i & j).bit_count() for j in range(64)] for i in range(64)]) / 8
    return (x @ matrix).astype(np.float32)


def test_shapes_and_parameters(inputs: dict[int, AttentionInputs]) -> None:
    assert list(inputs) == [0, 1, 2, 3]
    for layer, found in inputs.items():
        assert found.layer == layer
        assert found.q.shape == (N, 4, 64) and found.k.shape == found.v.shape == (N, 2, 64)
        assert found.scale == 0.125 and found.softcap == found.max_bias == 0 and found.sinks is None
        assert np.array_equal(found.mask, np.where(np.tril(np.ones((N, N))), 0, -np.inf))


@pytest.mark.parametrize("name", [name for name, kind in CACHE_TYPES.items() if kind.ours])
def test_a_compressed_cache_holds_the_captured_keys_and_values(name: str, inputs: dict[int, AttentionInputs]) -> None:
    # Layer 0, whose K and V do not depend on the cache of layers before it: not a bit may differ.
    held = capture_attention(demo.MODEL_PATH, TEXT, [0], n_ctx=N, cache=name)[0]
    assert np.array_equal(held.q, inputs[0].q)
    for mine, cached in ((inputs[0].k, held.k), (inputs[0].v, held.v)):
        assert np.array_equal(tqgguf.dequantize(tqgguf.quantize(mine, name), name), cached)


@pytest.mark.parametrize("name", ["q8_0", "q5_0", "q4_0", "iq4_nl"])
def test_a_stock_cache_holds_them_rotated(name: str, inputs: dict[int, AttentionInputs]) -> None:
    # llama.cpp rotates in another order of sums, so that now and then a value falls to the level beside.
    held = capture_attention(demo.MODEL_PATH, TEXT, [0], n_ctx=N, cache=name)[0]
    assert np.allclose(walsh(inputs[0].q), held.q, atol=1e-3)
    for mine, cached in ((inputs[0].k, held.k), (inputs[0].v, held.v)):
        near = round_trip(walsh(mine), CACHE_TYPES[name])
        loss = np.square(near - walsh(mine)).sum()
        assert np.square(near - cached).sum() < 0.01 * loss
        assert np.mean(np.isclose(near, cached, rtol=1e-3, atol=1e-5)) > 0.999


@pytest.mark.parametrize(
    ("arch", "scale", "softcap", "max_bias", "seen"),
    [
        ("llama", 32**-0.5, 0.0, 0.0, [120, 120]),
        ("refact", 32**-0.5, 0.0, 8.0, [120, 120]),
        ("gemma2", 1.0, 2.0, 0.0, [48, 120]),  # it scales Q itself, after the last tensor named Qcur
    ],
)
def test_attention_on_them_is_the_models(
    random_model: Callable[..., Path], arch: str, scale: float, softcap: float, max_bias: float, seen: list[int]
) -> None:
    path = random_model(arch=arch, head_dim=32, n_head=4, n_head_kv=1, n_layer=2)
    inputs = capture_attention(path, WORDS, [0, 1], n_ctx=120)
    model = tqgguf.Llama(path, cache="f16", n_ctx=256, verbose=False)
    hook: Any = NamedTensors("kqv_out-")
    reading._decode(loaded(model), model.tokenize(WORDS.encode())[:120], hook, "f32", (0,))
    model.close()
    for layer, x in inputs.items():
        assert (x.scale, x.softcap, x.max_bias) == (pytest.approx(scale), softcap, max_bias)
        options = {"softcap": x.softcap, "max_bias": x.max_bias}
        exact = reference.attention(x.q, x.k, x.v, x.scale, mask=x.mask, **options).reshape(120, -1)
        assert np.linalg.norm(hook.found[f"kqv_out-{layer}"] - exact) < 2e-3 * np.linalg.norm(exact)
    assert [int(np.isfinite(x.mask[-1]).sum()) for x in inputs.values()] == seen


def test_keys_of_a_softcapped_layer_are_not_centred(random_model: Callable[..., Path]) -> None:
    path = random_model(arch="gemma2", head_dim=32, n_head=4, n_head_kv=1, n_layer=2)
    with pytest.raises(tqgguf.ArgumentError, match="cannot be centred in a layer with a softcap"):
        attention_quality(path, WORDS, n_ctx=64, centre=True)


def test_figures_of_the_demo_model(inputs: dict[int, AttentionInputs]) -> None:
    result = attention_quality(demo.MODEL_PATH, TEXT, types=["q4_0", "pqo4", "pqo3"], layers=[1, 3], n_ctx=N)
    assert [layer.layer for layer in result.layers] == [1, 3] and result.n_tokens == N
    for layer in result.layers:
        x = inputs[layer.layer]
        assert layer.errors == attention_error(x.q, x.k, x.v, ["q4_0", "pqo4", "pqo3"], 0.125)
        assert (layer.n_head, layer.head_dim_k, layer.head_dim_v) == (4, 64, 64)
        nmse = {name: np.mean([e.nmse_k for e in errors]) for name, errors in layer.errors.items()}
        assert 0.002 < nmse["pqo4"] < nmse["q4_0"] < 0.010 < nmse["pqo3"] < 0.030
    centred = attention_quality(demo.MODEL_PATH, TEXT, types=["pqo3"], layers=[3], n_ctx=N, centre=True).layers[0]
    for head, c, p in zip(centred.heads, centred.errors["pqo3"], result.layers[1].errors["pqo3"], strict=True):
        assert c.nmse_k / p.nmse_k == pytest.approx(1 - head.offset**2, abs=0.1)


def test_types_and_layers_by_default(random_model: Callable[..., Path]) -> None:
    # Heads of 80 hold no block of 32; five layers: the first, the middle and the last one.
    result = attention_quality(random_model(head_dim=80, n_layer=5), WORDS, n_ctx=32)
    assert [layer.layer for layer in result.layers] == [0, 2, 4]
    assert all(list(layer.errors) == ["f32", "f16", "bf16"] for layer in result.layers)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (
            {"layers": [0, 4]},
            tqgguf.ArgumentError,
            "layer 4 has no KV cache of its own; layers with one are 0-3",
        ),
        ({"layers": [-1]}, tqgguf.ArgumentError, "layer -1"),
        ({"n_ctx": 2000}, tqgguf.ArgumentError, r"the text has \d+ tokens, fewer than the 2000"),
        ({"text": ""}, tqgguf.ArgumentError, "the text has 1 tokens, fewer than the 512"),
        ({"n_ctx": 1}, tqgguf.ArgumentError, "at least 2 tokens"),
        ({"types": ["pqo9"]}, tqgguf.ArgumentError, "unknown cache type 'pqo9'"),
    ],
)
def test_bad_requests(options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        attention_quality(demo.MODEL_PATH, **{"text": TEXT, **options})


def test_a_type_the_model_cannot_have(random_model: Callable[..., Path]) -> None:
    with pytest.raises(tqgguf.CacheTypeError, match="layer 0: head_dim of K is 80"):
        attention_quality(random_model(head_dim=80), TEXT, types=["pqo3"])


@pytest.mark.parametrize(("arch", "said"), [("bert", "has no KV cache"), ("mamba", "has no KV cache")])
def test_a_model_without_a_cache(tmp_path: Path, arch: str, said: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", arch)
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_context_length(512)
    writer.add_head_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(tqgguf.UnsupportedError, match=f"architecture {arch} {said}"):
        attention_quality(tmp_path / "model.gguf", TEXT)


def test_a_graph_without_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "op_name", lambda node: "MUL_MAT")
    with pytest.raises(tqgguf.UnsupportedError, match=r"architecture llama runs no flash attention on .* layer 1-2;"):
        capture_attention(demo.MODEL_PATH, TEXT, [1, 2], n_ctx=32)


def test_an_error_within_the_callback_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensor: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(reading, "read_tensor", fail)
    with pytest.raises(MemoryError, match="no room"):
        capture_attention(demo.MODEL_PATH, TEXT, [0], n_ctx=32)
