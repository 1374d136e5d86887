"""benchmarks/speed/cuda.py from end to end: on the emulated kernels, and where there is no GPU."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = str(Path(__file__).parents[2] / "benchmarks" / "speed" / "cuda.py")


def test_a_rehearsal_measures_everything_and_claims_nothing(
    cuda_build: Any, python: Callable[..., Any], tmp_path: Path
) -> None:
    if not cuda_build.emulated:
        pytest.skip("the rehearsal is for machines without a GPU")
    done = python(SCRIPT, "--emulate", str(cuda_build.path), "--output", "out.json")
    assert done.returncode == 0, done.stderr
    assert "THESE TIMES MEAN NOTHING" in done.stdout and "THESE TIMES MEAN NOTHING" in done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert "MEAN NOTHING" in found["warning"] and found["gpu"]["gpu"] == "emulated" and "aims" not in found
    types = ["pqo3", "pqo4", "pqt3", "pqt4", "pqt2", "pqt5"]
    assert [(f["step"], f["type"]) for f in found["rows"]] == [(s, t) for s in ("encode", "decode") for t in types]
    # 8 tokens of 8 heads of 128: f32 and blocks of 14 bytes, over the time, beside the copy
    first = found["rows"][0]
    n_bytes = 8 * 1024 * 4 + 8 * 32 * 14
    assert first["gb_per_s"] == pytest.approx(n_bytes / first["us"] / 1e3, abs=0.06)
    for shape in {(f["n_kv"], f["group"], f["batch"], f["head_dim"]) for f in found["attention"]}:
        mine = [f for f in found["attention"] if (f["n_kv"], f["group"], f["batch"], f["head_dim"]) == shape]
        names = [f["contender"] for f in mine]
        assert set(names) == {*types, "pqo4/pqo3", *(f"ggml {t}" for t in types), "f16"}
        for f in mine:
            assert len(f["rounds"]) == 2 and f["us"] > 0
            if f["predicted_us"] is None:
                assert f["contender"].removeprefix("ggml ") in ("pqt2", "pqt5")
            else:
                assert f["predicted_us"][0] <= f["predicted_us"][1]
            assert f["speedup"] == 1.0 if f["contender"] == "f16" else f["speedup"] > 0
            n_bytes = f["gb_per_s"] * f["us"] * 1e3  # a row of pqo4 has 18 bytes for every 32 values, one of pqo3 14
            if f["contender"] == "pqo4/pqo3":
                assert n_bytes == pytest.approx(shape[0] * shape[2] * 8 * shape[3] / 32 * (18 + 14), rel=0.05)
    assert len(found["attention"]) == 28


def test_a_rehearsal_is_no_result(python: Callable[..., Any]) -> None:
    done = python(SCRIPT, "--emulate", "any.so")
    assert done.returncode == 2 and "--emulate needs --output" in done.stderr


def test_without_a_gpu_it_says_so_and_stops(python: Callable[..., Any], tmp_path: Path) -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        done = python(SCRIPT)
        assert done.returncode == 1 and "no NVIDIA GPU can be used here" in done.stderr
        assert "Nothing was built, checked or timed" in done.stderr and done.stdout == ""
    else:
        pytest.skip("this machine has the driver")
