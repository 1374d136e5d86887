"""The committed digests of conformance.c are those of the oracle."""

from __future__ import annotations

from pathlib import Path

import program

HERE = Path(__file__).parent


def test_header_is_what_golden_py_writes() -> None:
    assert program.load("tests/native/golden.py").header() == (HERE / "conformance_golden.h").read_text()
