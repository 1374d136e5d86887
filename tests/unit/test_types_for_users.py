"""What a user's type checker sees: the package's own types, since it says that it has them (py.typed)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tqgguf

pytest.importorskip("mypy", reason="mypy is not installed: pip install -r requirements-dev.txt")

PROGRAM = """
import tqgguf
from tqgguf.config import CacheType

model = tqgguf.Llama("model.gguf", cache=("pqo4", "pqo3"), tail=64)
reveal_type(model.cache_info().bytes)
reveal_type(model.cache_info().layers[0].type_k)
reveal_type(model.save_session("file"))
reveal_type(tqgguf.CACHE_TYPES["pqo3"])
reveal_type(tqgguf.fit("model.gguf", 2**30).rows)
with tqgguf.PqoCache(tqgguf.CacheConfig(bits=4)) as cache:
    reveal_type(cache.seq_len())
try:
    tqgguf.read_policy(7)
except tqgguf.TqggufError as error:
    reveal_type(error)
tqgguf.nothing
"""

EXPECTED = [
    'note: Revealed type is "int"',
    'note: Revealed type is "str"',
    'note: Revealed type is "tqgguf.session.file.Session"',
    'note: Revealed type is "tqgguf.config.CacheType"',
    'note: Revealed type is "tuple[tqgguf.diagnostics.fit.FitRow, ...]"',
    'note: Revealed type is "int"',
    'error: Argument 1 to "read_policy" has incompatible type "int"; expected "str | Path"  [arg-type]',
    'note: Revealed type is "tqgguf.errors.TqggufError"',
    'error: Module has no attribute "nothing"  [attr-defined]',
]


def checked(folder: Path, *, typed: bool) -> list[str]:
    """What mypy says to a program beside an environment in which the package is installed, with py.typed or without."""
    (folder / "program.py").write_text(PROGRAM)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    (site,) = folder.glob("env/lib/python*/site-packages")
    left_out = ["_bindings", "lib", "include", "__pycache__", *([] if typed else ["py.typed"])]
    shutil.copytree(Path(tqgguf.__file__).parent, site / "tqgguf", ignore=shutil.ignore_patterns(*left_out))
    options = ["--no-incremental", "--config-file=", f"--python-executable={folder / 'env/bin/python'}"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "program.py"], cwd=folder, capture_output=True, text=True, check=False
    )
    return [line.split(": ", 1)[1] for line in done.stdout.splitlines() if line.startswith("program.py")]


def test_a_user_sees_the_types(tmp_path: Path) -> None:
    assert checked(tmp_path, typed=True) == EXPECTED


def test_without_the_marker_there_are_none(tmp_path: Path) -> None:
    said = checked(tmp_path, typed=False)
    assert "missing library stubs or py.typed marker" in said[0] and 'Revealed type is "Any"' in said[3]
