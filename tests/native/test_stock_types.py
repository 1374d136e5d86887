"""Stock cache types must not notice our patches: the same logits, bit for bit, from a stock and from the patched build.

Needs a stock libllama of the pinned release, built with the same compiler and flags: TQGGUF_STOCK_LIB names its
directory. `make conformance` builds one and sets the variable.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "tqgguf"
MODEL = PACKAGE / "models" / "demo.gguf"
STOCK = os.environ.get("TQGGUF_STOCK_LIB")
TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_0": 6, "q5_1": 7, "q4_0": 2, "q4_1": 3, "iq4_nl": 20}
N_PROMPT, N_DECODE = 600, 8

pytestmark = pytest.mark.skipif(not STOCK, reason="TQGGUF_STOCK_LIB names no stock build (make conformance makes one)")

# Runs in a process of its own, on the libraries that LLAMA_CPP_LIB_PATH names: prints a digest of every logit.
PROGRAM = """
import ctypes, hashlib, sys
import numpy as np
import llama_cpp as api

model_path, type_k, type_v, flash, n_prompt, n_decode = sys.argv[1], *map(int, sys.argv[2:])
api.llama_log_set(api.llama_log_callback(lambda *a: None), ctypes.c_void_p(0))
api.llama_backend_init()
model = api.llama_model_load_from_file(model_path.encode(), api.llama_model_default_params())
params = api.llama_context_default_params()
params.n_ctx, params.n_batch, params.n_ubatch = 1024, 512, 256
params.n_threads = params.n_threads_batch = 2
params.type_k, params.type_v, params.flash_attn_type = type_k, type_v, flash
context = api.llama_init_from_model(model, params)
assert context, "no context"
n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
tokens = np.random.default_rng(1).integers(3, n_vocab, n_prompt + n_decode).astype(np.int32)
digest = hashlib.sha256()
begin = 0
sizes = [512] * (n_prompt // 512) + [n_prompt % 512] + [1] * n_decode
for size in filter(None, sizes):
    part = (ctypes.c_int32 * size)(*tokens[begin:begin + size].tolist())
    assert api.llama_decode(context, api.llama_batch_get_one(part, size)) == 0
    logits = np.ctypeslib.as_array(api.llama_get_logits_ith(context, -1), (n_vocab,))
    assert np.isfinite(logits).all() and logits.std() > 0
    digest.update(logits.tobytes())
    begin += size
print(digest.hexdigest())
"""


def digest(libraries: Path, type_k: str, type_v: str, flash: bool) -> str:
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(libraries), "PYTHONPATH": str(PACKAGE / "_bindings")}
    arguments = [str(MODEL), *map(str, (TYPES[type_k], TYPES[type_v], int(flash), N_PROMPT, N_DECODE))]
    # Not from the repository's directory: its llama_cpp.py would come first and insist on our libraries.
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=env,
        cwd=PACKAGE / "_bindings",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def cases() -> list[tuple[str, str, bool]]:
    same = [(name, name, True) for name in TYPES]
    # Without flash attention V cannot be quantized; K goes through mul_mat.
    plain = [(name, "f16", False) for name in TYPES]
    mixed = [("q8_0", "q4_0", True), ("q4_0", "f16", True), ("f16", "q8_0", True)]
    return same + plain + mixed


@pytest.mark.parametrize(("type_k", "type_v", "flash"), cases())
def test_logits_equal_stock_bit_for_bit(type_k: str, type_v: str, flash: bool) -> None:
    assert STOCK
    stock = digest(Path(STOCK).resolve(), type_k, type_v, flash)
    assert digest((PACKAGE / "lib").resolve(), type_k, type_v, flash) == stock


def test_the_comparison_can_tell_types_apart() -> None:
    assert STOCK
    found = {digest(Path(STOCK).resolve(), name, name, True) for name in ("f16", "q8_0", "q4_0")}
    assert len(found) == 3
    assert all(len(value) == hashlib.sha256().digest_size * 2 for value in found)
