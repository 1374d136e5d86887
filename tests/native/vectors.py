"""Writes vectors.json: a few blocks, and their bytes in every type and mode, from the NumPy oracle.

Small enough to read, and enough to start an implementation in another language. These bytes never change: session
files and saved caches contain such blocks.

Usage: python tests/native/vectors.py > tests/native/vectors.json
"""

from __future__ import annotations

import json

import numpy as np

from tqgguf import reference


def inputs() -> np.ndarray:
    """(24, 32) float32 blocks, from integer arithmetic and powers of two alone, so that any machine makes the same."""
    i = np.arange(32)
    rows = [np.zeros(32), np.full(32, 1.0), i - 15.5, np.where(i == 7, -5.0, 0.0), np.where(i % 3, 65504.0, -65504.0)]
    rows += [
        np.full(32, 2.0**-24),
        np.where(i, 0.0, 2.0**-22),
        np.where(i % 2, np.inf, -1e38),
        np.where(i, 1.0, np.nan),
    ]
    state = 12345
    while len(rows) < 24:
        row = []
        for _ in range(32):
            parts = []
            for _ in range(4):
                state = (state * 1103515245 + 12345) % 2**31
                parts.append(state >> 15)
            row.append((sum(parts) - 2 * 65535) / 32768)
        rows.append(np.array(row) * 2.0 ** ((len(rows) % 5) * 6 - 12))
    return np.array(rows).astype(np.float32)


def text() -> str:
    """The text of vectors.json."""
    x = inputs()
    blocks = {
        f"{type}/{mode}": [row.tobytes().hex() for row in reference.encode(x, type, mode)]
        for type, mode in reference.CODECS
    }
    data = {
        "comment": "32 little-endian float32 each, and the block they encode to; written by vectors.py",
        "inputs": [row.astype("<f4").tobytes().hex() for row in x],
        "blocks": blocks,
    }
    return json.dumps(data, indent=1) + "\n"


if __name__ == "__main__":
    print(text(), end="")
