"""The programs that load the server and the model for long, in short."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.model

REPOSITORY = Path(__file__).parents[2]


def benchmark(folder: Path, name: str, *args: str) -> tuple[int, dict[str, Any], str]:
    """Status, result and errors of a program of benchmarks/."""
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / name), *args, "--output", "-"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def test_under_load_nothing_is_lost(tmp_path: Path) -> None:
    status, result, said = benchmark(tmp_path, "endurance/serve_load.py", "--requests", "100", "--clients", "16")
    assert status == 0, said
    assert (result["answered"], result["wrong"]) == (100, 0) and 5 < result["left"] < 40


def test_a_soak_sees_a_leak_and_nothing_else(tmp_path: Path) -> None:
    options = ("--minutes", "0.12", "--leak", "5000000", "--max-slope", "100")
    status, result, said = benchmark(tmp_path, "endurance/soak.py", *options)
    assert status == 1 and len(result["failures"]) == 1, said
    assert result["failures"][0].startswith("memory grows by ") and result["slope_mib_per_1000_requests"] > 100
    kinds = {"whole", "stream", "long", "story", "session", "too long", "leave", "abort"}
    assert result["requests"].keys() == kinds and result["wrong"] == 0
