"""A llama.cpp that makes another cache than it is asked for is found out, whatever it prints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tqgguf._native import library_path

ROOT = Path(__file__).parents[2]
UPSTREAM = ROOT / "build" / "upstream" / "llama.cpp"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is read on Linux")

PROGRAM = """
import numpy as np
import tqgguf
from tqgguf.demo import model as demo
one = np.ones((2, 64), np.float32)
policy = tqgguf.CachePolicy(("pqo4", "pqo3", "pqo3", "pqo3"), ("pqo3",) * 4, {3: one}, k_gains={2: 2 * one})
print(tqgguf.Llama(demo.MODEL_PATH, cache=policy, n_ctx=256, n_threads=1, verbose=False).cache_info().type_v)
"""


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None or not UPSTREAM.exists():
        pytest.skip("needs a C compiler and the upstream source that the build unpacks")
    path = tmp_path_factory.mktemp("lies") / "lying.so"
    folders = (f"-I{ROOT / 'native' / 'ggml'}", f"-I{UPSTREAM / 'ggml' / 'include'}")
    source = Path(__file__).with_name("lying_preload.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", *folders, "-o", path, source], check=True)
    return path


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        ("none", None),
        ("type", "layer 2, K: asked for type pqo3, got pqt3"),
        ("layers", "layer 0, K: asked for type pqo4, got pqo3"),
        ("mean", "layer 3, K: asked for values of a mean key 128, got 0"),
        ("gain", "layer 2, K: asked for values of a key gain 128, got 0"),
        ("values", f"layer 2, K: asked for a calibration that sums up to {128**2 * 0x40000000}, got 0"),
        ("tail", "layer 0, K: asked for rows of a tail (128, 4), got (0, 0)"),
        ("list", "layer 0, K: asked for pqo4, got no K"),
    ],
)
def test_what_llama_cpp_made_is_what_counts(
    python: Callable[..., subprocess.CompletedProcess[str]], preload: Path, lie: str, said: str | None
) -> None:
    before = os.environ.get("LD_PRELOAD")
    libraries = f"{preload}:{before}" if before else str(preload)
    path = library_path("ggml-base").resolve()
    done = python("-c", PROGRAM, env={"LD_PRELOAD": libraries, "TQGGUF_LIE": lie, "TQGGUF_LIE_OF": str(path)})
    if said is None:
        assert (done.returncode, done.stdout) == (0, "pqo3\n"), done.stderr
    else:
        last = done.stderr.splitlines()[-1]
        where = "llama.cpp made another KV cache than it was asked for: "
        assert (done.returncode, last) == (1, f"tqgguf.errors.CacheTypeError: {where}{said}")
