"""The error bars of the formats, on a million Gaussian blocks."""

from __future__ import annotations

import numpy as np
import pytest

import tqgguf

BARS = {
    ("pqo3", "search"): 0.0240,
    ("pqo4", "search"): 0.0058,
    ("pqt2", "search"): 0.0700,
    ("pqt3", "search"): 0.0172,
    ("pqt4", "search"): 0.0041,
    ("pqt5", "search"): 0.0010,
    ("pqo3", "maxnorm"): 0.0320,
    ("pqo3", "l2norm"): 0.0325,
}


@pytest.mark.long
@pytest.mark.parametrize(("codec", "bar"), BARS.items())
def test_nmse_on_a_million_gaussian_blocks(codec: tuple[str, str], bar: float) -> None:
    rng = np.random.default_rng(0)
    error = energy = 0.0
    for _ in range(10):
        x = rng.standard_normal((100_000, 32), dtype=np.float32)
        decoded = tqgguf.dequantize(tqgguf.quantize(x, *codec), *codec)
        error += float(np.square(decoded - x).sum(dtype=np.float64))
        energy += float(np.square(x).sum(dtype=np.float64))
    assert 0.8 * bar < error / energy <= bar
