"""The committed digests of conformance.c are those of the oracle."""

from __future__ import annotations

import importlib.util
from pathlib import Path

HERE = Path(__file__).parent


def test_header_is_what_golden_py_writes() -> None:
    spec = importlib.util.spec_from_file_location("golden", HERE / "golden.py")
    assert spec is not None and spec.loader is not None
    golden = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(golden)
    assert golden.header() == (HERE / "conformance_golden.h").read_text()
