"""The wheel that `make wheel` leaves in dist/, and a fresh virtual environment it is installed in.

    make wheel wheel-check
    make wheel-arm64 wheel-check-arm64      on another machine than an ARM64 one

or, for another wheel, TQGGUF_WHEEL=file.whl pytest tests/packaging. Without the variable these tests are left out: they
take minutes, and pip fetches the dependencies of the package.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., "subprocess.CompletedProcess[str]"]

OTHERS = ("PYTHONPATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "LLAMA_CPP_LIB_PATH")


@pytest.fixture(scope="session")
def environ() -> dict[str, str]:
    """Environment variables that show no way to this repository's package, or to another kernel, variant or library."""
    return {name: text for name, text in os.environ.items() if name not in OTHERS and not name.startswith("TQGGUF_")}


@pytest.fixture(scope="session")
def wheel() -> Path:
    """The wheel's file."""
    path = Path(os.environ["TQGGUF_WHEEL"]).resolve()
    assert path.is_file(), f"TQGGUF_WHEEL: there is no {path}"
    return path


@pytest.fixture(scope="session")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="session")
def environment(wheel: Path, environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and what it depends on: the first two of a user's three commands."""
    folder = tmp_path_factory.mktemp("fresh") / "env"
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(folder / "bin/pip"), "install", "-q", str(wheel)],
    ):
        subprocess.run(command, check=True, env=environ, cwd=folder.parent)
    return folder


@pytest.fixture
def run(environment: Path, environ: dict[str, str], tmp_path: Path) -> Command:
    """Runs a program of the environment, away from the repository; `before` goes in front of it, as qemu does."""

    def call(
        program: str, *args: str, before: tuple[str, ...] = (), env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*before, str(environment / "bin" / program), *args],
            env={**environ, "COLUMNS": "500", **(env or {})},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )

    return call
