"""The saved inputs of every fuzz target: a corpus that reaches what a fuzzer reached, and what was once a finding.

The targets in C are compiled for this with the machine's own compiler, against the installed library.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tqgguf._native import library_path

sys.path.insert(0, str(Path(__file__).parent))  # files.py is a program's module, too
import files

HERE = Path(__file__).parent
NATIVE = ("blocks", "encode", "trellis", "attention", "cache")


def inputs(target: str) -> list[Path]:
    found = [*HERE.glob(f"corpus/{target}/*"), *HERE.glob(f"regressions/{target}/*")]
    assert len(found) >= 10, f"the corpus of {target} is missing"
    return sorted(found)


def test_every_target_has_a_corpus_and_every_corpus_a_target() -> None:
    targets = {*NATIVE, *files.TARGETS}
    assert {folder.name for folder in HERE.glob("corpus/*")} == targets
    assert {folder.name for folder in HERE.glob("regressions/*")} <= targets


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which(os.environ.get("CC", "cc"))
    if found is None:
        pytest.skip("there is no C compiler to build the fuzz targets with")
    return found


@pytest.mark.parametrize("target", NATIVE)
def test_native(target: str, compiler: str, tmp_path: Path) -> None:
    program, lib = tmp_path / target, library_path()
    sources = [str(HERE / f"{target}.c"), str(HERE / "replay.c")]
    options = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{HERE.parents[1] / 'native/include'}"]
    link = [str(lib), f"-Wl,-rpath,{lib.resolve().parent}", "-lm", "-o", str(program)]
    built = subprocess.run([compiler, *options, *sources, *link], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    named = inputs(target)
    done = subprocess.run([program, *named], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1:]}: {done.stderr}"
    assert done.stdout.splitlines() == [*map(str, named), f"{len(named)} inputs"]


@pytest.mark.parametrize("target", files.TARGETS)
def test_files(target: str, tmp_path: Path) -> None:
    for path in inputs(target):
        try:
            files.TARGETS[target](path.read_bytes(), tmp_path / "input")
        except Exception as error:
            raise AssertionError(f"{path}: {error!r}") from error
