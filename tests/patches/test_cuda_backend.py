"""Upstream's test-backend-ops on a CUDA device with our types: the results against the CPU backend's.

Needs a GPU and a build with it: make install conformance-programs CUDA=1, then make cuda-test.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "build" / "cmake" / "bin" / "test-backend-ops"
REFUSED = re.compile(r"type_[KV]=bf16")
"""What docs/cuda.md says is refused on CUDA. Cards with little shared memory refuse large heads besides."""

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not PROGRAM.exists(), reason="make conformance-programs CUDA=1 has not been run"),
    pytest.mark.skipif(not PROGRAM.with_name("libggml-cuda.so").exists(), reason="the build has no CUDA backend"),
]


def run(op: str, pattern: str) -> tuple[list[str], list[str], list[str]]:
    """The cases that passed, that were refused, and that failed."""
    command = [str(PROGRAM), "test", "-b", "CUDA0", "-o", op, "-p", pattern]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if "CUDA0" not in done.stdout:
        pytest.skip("there is no CUDA device")
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in (done.stdout + done.stderr).splitlines()]
    refused = [line for line in lines if "not supported" in line]
    failed = [line for line in lines if "FAIL" in line]
    passed = [line for line in lines if re.match(r"[A-Z_]+\(.*: OK$", line)]
    assert done.returncode == 0 or failed, "\n".join(lines[-20:])
    return passed, refused, failed


@pytest.mark.parametrize("op", ["SET_ROWS", "GET_ROWS", "CPY"])
def test_rows(op: str) -> None:
    passed, refused, failed = run(op, "pq[ot]")
    assert not failed
    assert not refused
    assert passed


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 160, 192, 256, 320, 512, 576])
def test_attention(head_dim: int) -> None:
    """Fused, and with upstream's kernels on decoded K and V (nb = 75), and fused where upstream has none."""
    passed, refused, failed = run("FLASH_ATTN_EXT", rf"hsk={head_dim},.*pq[ot]")
    assert not failed
    assert all(REFUSED.search(case) for case in refused)
    assert passed
