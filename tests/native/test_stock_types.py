"""Stock cache types must not notice our patches: the same logits, bit for bit, from a stock and from the patched build.

Needs a stock libllama of the pinned release, built with the same compiler and flags: TQGGUF_STOCK_LIB names its
directory. `make conformance` builds one and sets the variable.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "tqgguf"
MODEL = PACKAGE / "demo" / "demo.gguf"
STOCK = os.environ.get("TQGGUF_STOCK_LIB")
TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_0": 6, "q5_1": 7, "q4_0": 2, "q4_1": 3, "iq4_nl": 20}

pytestmark = pytest.mark.stock

# (type of K, type of V, flash attention). Without flash attention V cannot be quantized, and K goes through mul_mat.
CASES = [
    *((name, name, True) for name in TYPES),
    *((name, "f16", False) for name in TYPES),
    ("q8_0", "q4_0", True),
    ("q4_0", "f16", True),
    ("f16", "q8_0", True),
]

# Runs in a process of its own, on the libraries that LLAMA_CPP_LIB_PATH names: prints one digest of logits per case.
PROGRAM = """
import ctypes, hashlib, json, sys
import numpy as np
import llama_cpp as api

N_PROMPT, N_DECODE = 300, 4
model_path, cases = sys.argv[1], json.loads(sys.argv[2])
silence = api.llama_log_callback(lambda level, text, data: None)
api.llama_log_set(silence, ctypes.c_void_p(0))
api.llama_backend_init()
model = api.llama_model_load_from_file(model_path.encode(), api.llama_model_default_params())
n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
tokens = np.random.default_rng(1).integers(3, n_vocab, N_PROMPT + N_DECODE).astype(np.int32)
digests = []
for type_k, type_v, flash in cases:
    params = api.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 512, 512, 256
    params.n_threads = params.n_threads_batch = 2
    params.type_k, params.type_v, params.flash_attn_type = type_k, type_v, int(flash)
    context = api.llama_init_from_model(model, params)
    assert context, "no context"
    digest = hashlib.sha256()
    begin = 0
    for size in [N_PROMPT] + [1] * N_DECODE:
        part = (ctypes.c_int32 * size)(*tokens[begin:begin + size].tolist())
        assert api.llama_decode(context, api.llama_batch_get_one(part, size)) == 0
        logits = np.ctypeslib.as_array(api.llama_get_logits_ith(context, -1), (n_vocab,))
        assert np.isfinite(logits).all() and logits.std() > 0
        digest.update(logits.tobytes())
        begin += size
    digests.append(digest.hexdigest())
    api.llama_free(context)
print(json.dumps(digests))
"""


def digests(libraries: Path) -> list[str]:
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(libraries), "PYTHONPATH": str(PACKAGE / "_bindings")}
    cases = [(TYPES[k], TYPES[v], flash) for k, v, flash in CASES]
    # Not from the repository's directory: its llama_cpp.py would come first and insist on our libraries.
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(MODEL), json.dumps(cases)],
        env=env,
        cwd=PACKAGE / "_bindings",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def stock() -> list[str]:
    assert STOCK
    return digests(Path(STOCK).resolve())


@pytest.fixture(scope="module")
def patched() -> list[str]:
    return digests((PACKAGE / "lib").resolve())


@pytest.mark.parametrize("i", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_logits_equal_stock_bit_for_bit(stock: list[str], patched: list[str], i: int) -> None:
    assert patched[i] == stock[i]


def test_the_comparison_can_tell_types_apart(stock: list[str]) -> None:
    assert len(set(stock)) > len(TYPES)
