"""Compares docs/formats.md with the library: its decoder on random bytes, its tables, its numbers."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

import tqgguf
from tqgguf import CACHE_TYPES, CachePolicy, reference
from tqgguf._native import abi_version_expected
from tqgguf.cache.policy import POLICY_VERSION, model_hash
from tqgguf.demo import model as demo
from tqgguf.session.file import CODEC, SESSION_VERSION

PAGE: Final = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
DECODER: Final = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]


def table(name: str) -> list[float]:
    """The numbers in the page's table of a codebook."""
    rows = re.search(rf"^\| {name} (?:\| )+\|\n\|[-|]+\|\n((?:\|.*\|\n)+)", PAGE, re.M)
    assert rows
    return [float(number) for number in re.findall(r"-?[\d.]+", rows[1])]


@pytest.fixture(scope="module")
def decode() -> Callable[[bytes, str], list[float]]:
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(DECODER, names)
    assert len(DECODER.splitlines()) < 45
    return lambda block, type: names["decode"](block, names[f"levels_{type}"])


@pytest.mark.parametrize("type", ["pqo3", "pqt3"])
def test_the_decoder_of_the_page_decodes_any_bytes(decode: Callable[..., list[float]], type: str) -> None:
    blocks = np.random.default_rng(0).integers(0, 256, (300, 14), dtype=np.uint8)
    scales = blocks[:, :2].copy().view("<f2")[:, 0]
    blocks = blocks[np.isfinite(scales)]
    found = np.array([decode(block.tobytes(), type) for block in blocks])
    expected = tqgguf.dequantize(blocks, type)
    size = np.linalg.norm(expected, axis=1, keepdims=True)
    assert len(blocks) > 250 and (np.abs(found - expected) / size).max() < 1e-6


def test_the_blocks_of_the_page_are_what_the_encoder_makes() -> None:
    x = (np.arange(32) % 5).astype(np.float32)
    x[7] = 20
    for type in ("pqo3", "pqt3"):
        assert f'(levels_{type}, "{tqgguf.quantize(x, type).tobytes().hex()}")' in DECODER


def test_tables_and_signs() -> None:
    for type in ("pqo3", "pqo4"):
        np.testing.assert_allclose(table(type), reference.codebook(type).levels, rtol=1e-6)
    for type in reference.TRELLIS_TYPES:
        np.testing.assert_array_equal(table(type), 64 * reference.codebook(type).levels)
    signs = re.search(r"^s = ([+-]{32})$", PAGE, re.M)
    assert signs and [1 if sign == "+" else -1 for sign in signs[1]] == reference.SIGNS.tolist()
    for type, factors in reference.SEARCH_FACTORS.items():
        numbers = [f"{factor:.3f}".removesuffix("0") for factor in factors]
        assert f"{type}: {', '.join(numbers)}." in " ".join(PAGE.split())
    row = re.search(r"^\| `maxnorm` \|.*\| ([\d., ]+) \|", PAGE, re.M)
    assert row
    levels = [float(level) for level in row[1].split(",")]
    np.testing.assert_allclose(levels, reference.codebook("pqo3", "maxnorm").levels[4:])


def test_numbers_of_types_and_versions() -> None:
    rows = re.findall(r"^\| (pq[ot]\d) \| (\d+) \| (\d+) \| ([\d.]+) \| (\d+) \|", PAGE, re.M)
    assert [row[0] for row in rows] == list(reference.TYPES)
    for name, number, n_bytes, bits, n_levels in rows:
        kind = CACHE_TYPES[name]
        assert (int(number), int(n_bytes), float(bits)) == (kind.number, kind.bytes, kind.bits)
        assert int(n_levels) == len(reference.codebook(name).levels)
    assert f"| codec of sessions | {CODEC} |" in PAGE and f"| `TQ_ABI_VERSION` | {abi_version_expected()} |" in PAGE
    assert f"| session layout | {SESSION_VERSION} |" in PAGE and f"| policy layout | {POLICY_VERSION} |" in PAGE


def test_the_layout_of_the_trellis_in_words() -> None:
    rng = np.random.default_rng(1)
    t = rng.integers(0, 2**32, 50, dtype=np.uint32)
    bits = [[int(word) >> i & 1 for i in range(32)] for word in t]
    expected = [[2 * (b[i] ^ b[i - 1] ^ b[i - 3]) + b[i - 2] for i in range(32)] for b in bits]
    np.testing.assert_array_equal(reference.subsets(t), expected)
    assert "subset[i] = 2 * (t[i] ^ t[i-1] ^ t[i-3]) + t[i-2]" in PAGE


@pytest.mark.model
def test_a_policy_file_is_as_the_page_says(tmp_path: Path) -> None:
    import gguf

    mean = np.arange(128, dtype=np.float32).reshape(2, 64)
    policy = CachePolicy(("pqo4",) * 4, ("pqo3",) * 4, {2: mean}, model_hash(demo.MODEL_PATH), k_gains={1: mean + 1})
    policy.write(tmp_path / "p.gguf")
    reader = gguf.GGUFReader(tmp_path / "p.gguf")
    for key in ("version", "model_hash", "types_k", "types_v"):
        assert f"tqgguf-policy.{key}" in reader.fields and f".{key}`" in PAGE
    for tensor, name, values in zip(reader.tensors, ("2.k_mean", "1.k_gain"), (mean, mean + 1), strict=True):
        assert tensor.name == f"blk.{name}" and f"`blk.N.{name[2:]}`" in PAGE
        np.testing.assert_array_equal(tensor.data, values)
    assert "1/1024 to 1024" in PAGE
    for value in (1 / 1024, 1024.0):
        CachePolicy(("f16",), ("f16",), k_gains={0: np.full((1, 32), value, np.float32)})
    # The hash, from the words of the page alone.
    data = demo.MODEL_PATH.read_bytes()
    last = gguf.GGUFReader(demo.MODEL_PATH).tensors[-1].field
    end = last.offset + sum(part.nbytes for part in last.parts)
    by_hand = hashlib.sha256(data[: end + 1_048_576] + struct.pack("<Q", len(data))).hexdigest()
    assert by_hand == model_hash(demo.MODEL_PATH)
