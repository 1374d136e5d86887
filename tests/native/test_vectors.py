"""The committed vectors are what the oracle writes today, and every kernel agrees with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import program
import pytest

import tqgguf
from tqgguf import reference

HERE = Path(__file__).parent


@pytest.mark.filterwarnings("ignore:overflow")
def test_vectors_are_up_to_date() -> None:
    assert program.load("tests/native/vectors.py").text() == (HERE / "vectors.json").read_text()


def test_every_kernel_writes_the_vectors(kernel: str) -> None:
    vectors = json.loads((HERE / "vectors.json").read_text())
    x = np.frombuffer(bytes.fromhex("".join(vectors["inputs"])), dtype="<f4").reshape(-1, 32).astype(np.float32)
    for codec, blocks in vectors["blocks"].items():
        type, mode = codec.split("/")
        expected = np.frombuffer(bytes.fromhex("".join(blocks)), dtype=np.uint8).reshape(len(x), -1)
        np.testing.assert_array_equal(tqgguf.quantize(x, type, mode), expected)
        np.testing.assert_array_equal(tqgguf.dequantize(expected, type, mode), reference.decode(expected, type, mode))
