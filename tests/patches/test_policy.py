"""Policies inside libllama: types by layer, and keys stored less their mean and times a gain. The models are random and
tiny; each case runs in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
LIB = ROOT / "tqgguf" / "lib"

pytestmark = pytest.mark.skipif(not LIB.exists(), reason="the native libraries are not built")

# forget drops 64 tokens in the middle and closes the gap, which turns the keys behind it.
PROGRAM = """
import ctypes, json, sys
import numpy as np
import tqgguf, llama_cpp as api
from tqgguf._native.settings import policy_applied
from tqgguf.cache.policy import CachePolicy

model_path, types_k, types_v, means, gains, forget, flash = json.loads(sys.argv[1])
log = []
callback = api.llama_log_callback(lambda level, text, data: log.append(text.decode()))
api.llama_log_set(callback, ctypes.c_void_p(0))
api.llama_backend_init()
model = api.llama_model_load_from_file(model_path.encode(), api.llama_model_default_params())
assert model, "".join(log)
params = api.llama_context_default_params()
params.n_ctx = params.n_batch = 256
params.n_threads = params.n_threads_batch = 2
params.flash_attn_type = int(flash)
means, gains = ({int(i): np.array(x, np.float32) for i, x in each.items()} for each in (means, gains))
policy = CachePolicy(tuple(types_k), tuple(types_v), means, k_gains=gains)
params.type_k, params.type_v = (kind.number for kind in policy.types(0))
with policy_applied(policy):
    context = api.llama_init_from_model(model, params)
assert context, "".join(log)
def decode(tokens):
    part = (ctypes.c_int32 * len(tokens))(*tokens)
    assert api.llama_decode(context, api.llama_batch_get_one(part, len(tokens))) == 0
tokens = np.random.default_rng(1).integers(0, 64, 161).tolist()
decode(tokens[:160])
memory = api.llama_get_memory(context)
if forget:
    assert api.llama_memory_seq_rm(memory, 0, 64, 128)
    assert api.llama_memory_can_shift(memory)
    api.llama_memory_seq_add(memory, 0, 128, 160, -64)
decode(tokens[160:])
logits = np.ctypeslib.as_array(api.llama_get_logits_ith(context, -1), (64,)).tolist()
params.type_k = params.type_v = 1
again = api.llama_init_from_model(model, params)  # the policy has ended
print(json.dumps([logits, "".join(log)]))
"""


def write_model(path: Path, key_bias: float, head_dim: int = 64, hot: float = 1.0) -> Path:
    """A Qwen2 of 3 layers, whose keys have a constant added: N(0, key_bias) a channel, before RoPE.

    hot: what channels 5 and 37 of each head, which RoPE turns together, are multiplied by in keys, and queries divided.
    """
    random = np.random.default_rng(0)
    n_head, n_head_kv, n_layer, n_ff = 4, 2, 3, 64
    width = n_head * head_dim
    writer = gguf.GGUFWriter(str(path), "qwen2")
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    # slow enough that 161 positions turn no key far from its neighbour's: its mean after RoPE is then a constant, too
    writer.add_rope_freq_base(1e30)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("no_vocab")

    def matrix(name: str, n_out: int, n_in: int, scale: float = 1.0, times: float = 1.0) -> None:
        x = random.standard_normal((n_out, n_in), dtype=np.float32) * np.float32(scale / np.sqrt(n_in))
        if times != 1.0:
            x.reshape(-1, head_dim, n_in)[:, [5, 37]] *= np.float32(times)
        writer.add_tensor(name + ".weight", x)

    matrix("token_embd", 64, width)
    writer.add_tensor("output_norm.weight", np.ones(width, dtype=np.float32))
    matrix("output", 64, width)
    for i in range(n_layer):
        writer.add_tensor(f"blk.{i}.attn_norm.weight", np.ones(width, dtype=np.float32))
        writer.add_tensor(f"blk.{i}.ffn_norm.weight", np.ones(width, dtype=np.float32))
        for side, heads in (("q", n_head), ("k", n_head_kv), ("v", n_head_kv)):
            times = {"q": 1 / hot, "k": hot, "v": 1.0}[side]
            matrix(f"blk.{i}.attn_{side}", heads * head_dim, width, 4.0 if side == "v" else 1.0, times)
            bias = random.standard_normal(heads * head_dim, dtype=np.float32) * (key_bias if side == "k" else 0.0)
            writer.add_tensor(f"blk.{i}.attn_{side}.bias", bias.astype(np.float32))
        matrix(f"blk.{i}.attn_output", width, width)
        matrix(f"blk.{i}.ffn_gate", n_ff, width)
        matrix(f"blk.{i}.ffn_up", n_ff, width)
        matrix(f"blk.{i}.ffn_down", width, n_ff)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def run(
    model: Path,
    types_k: str,
    types_v: str = "f16 f16 f16",
    means: Any = None,
    forget: bool = False,
    flash: bool = True,
    gains: Any = None,
) -> tuple[Any, str]:
    arguments = json.dumps([str(model), types_k.split(), types_v.split(), means or {}, gains or {}, forget, flash])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    logits, log = json.loads(done.stdout)
    return np.array(logits), log


def distance(a: Any, b: Any) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def means(scale: float) -> dict[int, Any]:
    """Mean keys of all layers, (2, 64) each, of any values: softmax must not notice which."""
    random = np.random.default_rng(2)
    return {i: (scale * random.standard_normal((2, 64))).tolist() for i in range(3)}


def biases(model: Path) -> dict[int, Any]:
    """What the model adds to its keys."""
    tensors = {t.name: np.array(t.data) for t in gguf.GGUFReader(model).tensors}
    return {i: tensors[f"blk.{i}.attn_k.bias"].reshape(2, 64).tolist() for i in range(3)}


def test_each_layer_has_its_own_types(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", 0.0)
    exact, _ = run(model, "f16 f16 f16")
    mixed, log = run(model, "q8_0 pqo4 pqo3", "pqo3 f16 pqo4")
    assert 0 < distance(mixed, exact) < 0.3
    # 128 values a token and layer, 256 cells: 8.5 + 4.5 + 3.5 bits of K, 3.5 + 16 + 4.5 of V
    k, v = (256 * 128 * bits / 8 / 2**20 for bits in (8.5 + 4.5 + 3.5, 3.5 + 16 + 4.5))
    assert f"{k:7.2f} MiB" in log.split("K (")[1] and f"{v:7.2f} MiB" in log.split("V (")[1]
    assert "attn_rot_k = 0" in log.split("again")[0]
    # the context made after the policy has ended is stock
    assert log.count("size =    0.38 MiB") == 1


def test_the_graph_rotates_only_where_every_layer_gains(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", 0.0)
    for types_k, rotates in (("q8_0 q8_0 f16", 1), ("q8_0 q8_0 pqo4", 0), ("f16 f16 f16", 0)):
        assert f"attn_rot_k = {rotates}" in run(model, types_k)[1]


def test_softmax_does_not_notice_a_mean(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", 0.0)
    # Without flash attention llama.cpp computes on an f32 cache as it is: what is left is f32 rounding, by which
    # logits move by 2.3e-7. Keys rounded to f16 move them by 1.5e-4.
    exact = run(model, "f32 f32 f32", "f32 f32 f32", flash=False)[0]
    centred = run(model, "f32 f32 f32", "f32 f32 f32", means=means(1.0), flash=False)[0]
    assert 0 < distance(centred, exact) < 1e-5


def test_centring_an_f16_cache_moves_logits_by_f16_rounding_alone(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", 0.0)
    exact = run(model, "f32 f32 f32", "f32 f32 f32", flash=False)[0]
    plain = distance(run(model, "f16 f16 f16", "f32 f32 f32", flash=False)[0], exact)
    centred = distance(run(model, "f16 f16 f16", "f32 f32 f32", means=means(1.0), flash=False)[0], exact)
    # Keys less a mean of their own size have twice their variance, so 1.4 times their rounding error.
    assert 0 < centred < 2 * plain < 4e-3, (centred, plain)
    flash = distance(run(model, "f16 f16 f16", means=means(1.0))[0], run(model, "f16 f16 f16")[0])
    assert 0 < flash < 2e-3


def test_centring_makes_up_for_a_constant_in_the_keys(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", 8.0)
    exact = run(model, "f32 f32 f32")[0]
    plain, centred = (distance(run(model, "pqo3 pqo3 pqo3", means=m)[0], exact) for m in (None, biases(model)))
    assert centred < 0.65 * plain, (centred, plain)  # 0.48 with each kernel; 1 without means


@pytest.mark.parametrize(("kind", "forget"), [("pqt4", False), ("pqo3", True), ("q4_0", True)])
def test_a_gain_makes_up_for_hot_channels(tmp_path: Path, kind: str, forget: bool) -> None:
    # Powers of two: keys times the gain are those of the model without hot channels, bit by bit, and so are queries.
    cold, hot = (write_model(tmp_path / f"{h:g}.gguf", 0.0, hot=h) for h in (1.0, 16.0))
    gain = np.ones((2, 64))
    gain[:, [5, 37]] = 1 / 16
    types = f"{kind} {kind} {kind}"
    ones = {i: np.ones((2, 64)).tolist() for i in range(3)}  # with which the blocks of a head are mixed, too
    expected = run(cold, types, forget=forget, gains=ones)[0]
    np.testing.assert_array_equal(
        run(hot, types, forget=forget, gains={i: gain.tolist() for i in range(3)})[0], expected
    )
    exact = run(cold, "f32 f32 f32", forget=forget)[0]
    assert distance(run(hot, types, forget=forget)[0], exact) > 1.5 * distance(expected, exact)


@pytest.mark.parametrize("types", ["f16 f16 f16", "pqo4 pqo4 pqo4"])
def test_context_shift_of_centred_keys(tmp_path: Path, types: str) -> None:
    model = write_model(tmp_path / "model.gguf", 1.0)
    closed = run(model, "f32 f32 f32", forget=True)[0]
    plain, centred = (distance(run(model, types, means=m, forget=True)[0], closed) for m in (None, biases(model)))
    assert centred < 1.5 * plain + 1e-3, (centred, plain)
