"""The source distribution: all that a build needs, and nothing that was built here."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEFT_OUT = (".ci/", "benchmarks/results/")


def test_a_source_distribution_is_what_is_tracked(tmp_path: Path) -> None:
    pytest.importorskip("scikit_build_core", reason="needs scikit-build-core, which builds it")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("needs git, which knows what belongs to the source")
    code = f"from scikit_build_core.build import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("tqgguf-*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.split("/", 1)[1] for name in file.getnames()}
    tracked = {name for name in listed.stdout.split("\n") if name and (ROOT / name).is_file()}
    assert {name for name in tracked if not name.startswith(LEFT_OUT)} <= names
    built = ("tqgguf/lib", "tqgguf/include", "tqgguf/_bindings", "build/", "dist/", ".venv/", *LEFT_OUT)
    assert not [name for name in names if name.startswith(built) or name.endswith((".so", ".o", ".pyc", ".whl"))]
