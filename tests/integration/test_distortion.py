"""Distortions of a layer against attention computed apart, and what becomes of attention's outputs in a real graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from graph_hook import NamedTensors

import tqgguf
from tqgguf import reference
from tqgguf._native.ggml import round_trip
from tqgguf.cache.policy import resolve
from tqgguf.config import CACHE_TYPES
from tqgguf.demo import model as demo
from tqgguf.diagnostics.capture import capture_attention, loaded
from tqgguf.diagnostics.distortion import N_FIRST, distortions, storages
from tqgguf.model import reading

pytestmark = pytest.mark.model

Model = Callable[..., Path]
N = 256
WORDS = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 400).tolist()))


def one_layer(path: Path, text: str, layer: int) -> tuple[Any, Any]:
    info = tqgguf.read_model_info(path)
    inputs = capture_attention(path, text, [layer], n_ctx=N, n_threads=1)[layer]
    return inputs, info.layers[layer]


@pytest.mark.parametrize("tail", [0, 32])
def test_it_is_the_error_of_attention(tail: int) -> None:
    inputs, layer = one_layer(demo.MODEL_PATH, demo.chat_text(0, 40, reach=20), 1)
    stored = storages([resolve(name, 4) for name in ("pqo3", "q8_0")], False, tail)
    found = distortions(inputs, layer, stored)
    rows = np.arange(N // 2, N)  # as many as are sampled

    def attend(k: Any, v: Any, row: int) -> Any:
        mask = inputs.mask[row : row + 1]
        return reference.attention(inputs.q[row : row + 1], k, v, inputs.scale, mask=mask)

    for name in ("pqo3", "q8_0"):
        from_blocks = [round_trip(x, CACHE_TYPES[name]) for x in (inputs.k, inputs.v)]
        total = error_k = error_v = 0.0
        for row in rows:
            exact = attend(inputs.k, inputs.v, row)
            near_k, near_v = (x.copy() for x in from_blocks)
            if tail:  # the newest tokens of each query are exact, and the first ones
                for cells in (slice(row + 1 - tail, row + 1), slice(N_FIRST)):
                    near_k[cells], near_v[cells] = inputs.k[cells], inputs.v[cells]
            total += np.square(exact).sum()
            error_k += np.square(attend(near_k, inputs.v, row) - exact).sum()
            error_v += np.square(attend(inputs.k, near_v, row) - exact).sum()
        assert found["K", name] == pytest.approx(error_k / total, rel=2e-2)
        assert found["V", name] == pytest.approx(error_v / total, rel=2e-2)
    assert found["K", "q8_0"] < 0.05 * found["K", "pqo3"]


def test_calibration_and_rotation_are_those_of_the_cache(random_model: Model) -> None:
    path = random_model(arch="qwen2", key_bias=8.0, head_dim=64, n_head=1, n_head_kv=1)
    inputs, layer = one_layer(path, WORDS, 1)
    info = tqgguf.read_model_info(path)
    calibration = tqgguf.calibrate(path, n_threads=1)
    for name in ("pqo3", "q4_0"):
        plain = resolve(name, info.n_layer)
        calibrated = calibration.applied(plain, info)
        assert calibrated.rotates_k(layer)
        # What a cache of that policy holds, read back by llama.cpp's own graph, behind gain and rotation.
        k = (inputs.k - calibrated.k_means[1]) * calibrated.k_gains[1]
        (each,) = storages([calibrated], False, 0)
        error = each.error_k(inputs.k, layer) * calibrated.k_gains[1]
        matrix = np.array([[1 - 2 * (bin(i & j).count("1") % 2) for j in range(64)] for i in range(64)]) / 8
        if name == "pqo3":  # it rotates its blocks of 32 itself
            matrix = np.kron(np.array([[1, 1], [1, -1]]) / np.sqrt(2), np.eye(32))
        rotated = np.float32(k @ matrix)
        assert np.allclose(error @ matrix, round_trip(rotated, CACHE_TYPES[name]) - rotated, atol=1e-3)
        before, after = (distortions(inputs, layer, storages([policy], False, 0)) for policy in (plain, calibrated))
        assert after["K", name] < 0.5 * before["K", name] and after["V", name] == before["V", name]


def test_a_branch_is_what_is_added_to_the_stream(random_model: Model) -> None:
    path = random_model(head_dim=32, n_layer=3)
    model = tqgguf.Llama(path, cache="f16", n_ctx=256, verbose=False)
    tokens = model.tokenize(WORDS.encode())[:N]
    inputs = reading.read_attention(loaded(model), tokens, [0, 1, 2], lambda x: x, branches=True)
    without = reading.read_attention(loaded(model), tokens, [0, 1, 2], lambda x: x)
    hook: Any = NamedTensors("ffn_inp-", "l_out-")
    reading._decode(loaded(model), tokens, hook, "f32", (0,))
    model.close()
    weights = {x.name: gguf.dequantize(x.data, x.tensor_type) for x in gguf.GGUFReader(path).tensors}
    for layer, x in inputs.items():
        assert x.branch is not None and without[layer].branch is None
        assert np.array_equal(x.branch.matrix, weights[f"blk.{layer}.attn_output.weight"])
    before, behind = (hook.found[name].astype(np.float64) for name in ("l_out-0", "ffn_inp-1"))
    share = (np.square(behind - before).sum(axis=1) / np.square(behind).sum(axis=1)).mean()
    assert inputs[1].branch.share == pytest.approx(share, rel=1e-4)
    assert 0 < inputs[2].branch.share < 1  # of the one token that is left there
