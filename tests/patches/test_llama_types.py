"""The PQO types inside libllama: no graph rotation, context shift, and head sizes that 32 does not divide.

The models are random and tiny, of an architecture (StableLM) that turns only a part of each head by RoPE. Each case
runs in a process of its own: what it checks would end in a crash if it failed.
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

import tqgguf
from tqgguf._native import LIB_DIR

# The package that is tested, which may be an installed one: children import the same.
PACKAGES = Path(tqgguf.__file__).parents[1]

pytestmark = pytest.mark.skipif(not LIB_DIR.exists(), reason="the native libraries are not built")

TYPES = {"f16": 1, "q8_0": 8, "pqo3": 300, "pqo4": 301, "pqt3": 302, "pqt4": 303, "pqt2": 304, "pqt5": 305}
N_VOCAB = 64

# forget = 1: drops 64 tokens in the middle and leaves a gap in the positions; forget = 2: closes the gap, too, which
# turns the keys behind it.
PROGRAM = """
import ctypes, json, sys
import numpy as np
import tqgguf, llama_cpp as api

model_path, type_k, type_v, flash, forget = sys.argv[1], *map(int, sys.argv[2:])
log = []
callback = api.llama_log_callback(lambda level, text, data: log.append(text.decode()))
api.llama_log_set(callback, ctypes.c_void_p(0))
api.llama_backend_init()
model = api.llama_model_load_from_file(model_path.encode(), api.llama_model_default_params())
assert model, "".join(log)
params = api.llama_context_default_params()
params.n_ctx = params.n_batch = 256
params.n_threads = params.n_threads_batch = 2
params.type_k, params.type_v, params.flash_attn_type = type_k, type_v, flash
context = api.llama_init_from_model(model, params)
logits = None
if context:
    def decode(tokens):
        part = (ctypes.c_int32 * len(tokens))(*tokens)
        assert api.llama_decode(context, api.llama_batch_get_one(part, len(tokens))) == 0
    tokens = np.random.default_rng(1).integers(0, 64, 161).tolist()
    decode(tokens[:160])
    memory = api.llama_get_memory(context)
    if forget:
        assert api.llama_memory_seq_rm(memory, 0, 64, 128)
    if forget == 2:
        assert api.llama_memory_can_shift(memory)
        api.llama_memory_seq_add(memory, 0, 128, 160, -64)
    position = 96 if forget == 2 else 160
    batch = api.llama_batch_init(1, 0, 1)
    batch.n_tokens, batch.token[0], batch.pos[0], batch.n_seq_id[0] = 1, tokens[160], position, 1
    batch.seq_id[0][0], batch.logits[0] = 0, 1
    assert api.llama_decode(context, batch) == 0
    logits = np.ctypeslib.as_array(api.llama_get_logits_ith(context, -1), (64,)).tolist()
print(json.dumps([logits, "".join(log)]))
"""


def write_model(path: Path, head_dim: int, n_rot: int, weights: gguf.GGMLQuantizationType | None = None) -> Path:
    random = np.random.default_rng(0)
    n_head, n_layer, n_ff = 4, 2, 64
    width = n_head * head_dim
    writer = gguf.GGUFWriter(str(path), "stablelm")
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(n_rot)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model("no_vocab")

    def matrix(name: str, n_out: int, n_in: int, scale: float = 1.0) -> None:
        x = random.standard_normal((n_out, n_in), dtype=np.float32) * np.float32(scale / np.sqrt(n_in))
        writer.add_tensor(name + ".weight", gguf.quants.quantize(x, weights) if weights else x, raw_dtype=weights)

    def norm(name: str) -> None:
        writer.add_tensor(name + ".weight", np.ones(width, dtype=np.float32))
        writer.add_tensor(name + ".bias", np.zeros(width, dtype=np.float32))

    matrix("token_embd", N_VOCAB, width)
    norm("output_norm")
    matrix("output", N_VOCAB, width)
    for i in range(n_layer):
        norm(f"blk.{i}.attn_norm")
        matrix(f"blk.{i}.attn_q", width, width)
        matrix(f"blk.{i}.attn_k", 2 * head_dim, width)
        matrix(f"blk.{i}.attn_v", 2 * head_dim, width, 4.0)
        matrix(f"blk.{i}.attn_output", width, width)
        norm(f"blk.{i}.ffn_norm")
        matrix(f"blk.{i}.ffn_gate", n_ff, width)
        matrix(f"blk.{i}.ffn_up", n_ff, width)
        matrix(f"blk.{i}.ffn_down", width, n_ff)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def run(model: Path, type_k: str, type_v: str, flash: bool = True, forget: int = 0) -> tuple[Any, str]:
    arguments = [str(model), *map(str, (TYPES[type_k], TYPES[type_v], int(flash), forget))]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], cwd=PACKAGES, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    logits, log = json.loads(done.stdout)
    return (None if logits is None else np.array(logits)), log


def distance(a: Any, b: Any) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("n_rot", [64, 32, 16])
def test_context_shift_equals_that_of_an_f16_cache(tmp_path: Path, n_rot: int) -> None:
    model = write_model(tmp_path / "model.gguf", 64, n_rot)
    whole, gap, closed = (run(model, "f16", "f16", forget=forget)[0] for forget in (0, 1, 2))
    for type_k in ("pqo4", "pqo3", "pqt4", "pqt5"):
        once = distance(run(model, type_k, "f16")[0], whole)
        twice = distance(run(model, type_k, "f16", forget=2)[0], closed)
        # Encoding the turned keys once more adds about as much error as encoding them the first time did,
        assert twice < 1.5 * 2**0.5 * once
        # and less than forgetting to turn them would.
        assert twice < 0.75 * distance(gap, closed), (once, twice, distance(gap, closed))


@pytest.mark.parametrize(
    ("type_k", "type_v", "flags"),
    [
        ("pqo3", "pqo4", "00"),
        ("q8_0", "q8_0", "11"),
        ("pqo4", "q8_0", "01"),
        ("pqt3", "pqt4", "00"),
        ("pqt5", "pqt2", "00"),
    ],
)
def test_the_graph_rotates_stock_types_and_leaves_ours_alone(
    tmp_path: Path, type_k: str, type_v: str, flags: str
) -> None:
    _, log = run(write_model(tmp_path / "model.gguf", 64, 32), type_k, type_v)
    assert f"attn_rot_k = {flags[0]}" in log
    assert f"attn_rot_v = {flags[1]}" in log


def test_without_flash_attention_k_goes_through_mul_mat(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", 64, 32)
    with_flash, without = (run(model, "pqo4", "f16", flash=flash)[0] for flash in (True, False))
    assert 0 < distance(without, with_flash) < 5e-3


def test_a_prompt_through_quantized_weights(tmp_path: Path) -> None:
    # On processors with AMX these go a way of their own, which fixes/0001-amx mends; the prompt has 160 tokens.
    plain = run(write_model(tmp_path / "f32.gguf", 64, 32), "pqo4", "pqo4")[0]
    quantized = run(write_model(tmp_path / "q8_0.gguf", 64, 32, gguf.GGMLQuantizationType.Q8_0), "pqo4", "pqo4")[0]
    assert 0 < distance(quantized, plain) < 0.1


@pytest.mark.parametrize(
    ("type_k", "type_v", "flash", "message"),
    [
        ("pqo3", "f16", True, "K cache type pqo3 with block size 32 does not divide n_embd_head_k=48 of layer 0"),
        ("pqo3", "f16", False, "K cache type pqo3 with block size 32 does not divide n_embd_head_k=48 of layer 0"),
        ("f16", "pqo4", True, "V cache type pqo4 with block size 32 does not divide n_embd_head_v=48 of layer 0"),
    ],
)
def test_a_head_size_that_32_does_not_divide_is_an_error_naming_the_layer(
    tmp_path: Path, type_k: str, type_v: str, flash: bool, message: str
) -> None:
    logits, log = run(write_model(tmp_path / "model.gguf", 48, 32), type_k, type_v, flash)
    assert logits is None
    assert message in log
