"""`--memory`: what is a size, and what is not."""

from __future__ import annotations

import argparse

import pytest

from tqgguf.cli.options import memory_size


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("8G", 8 * 2**30),
        ("8GiB", 8 * 2**30),
        ("8 gib", 8 * 2**30),
        ("8GB", 8 * 10**9),
        ("512M", 512 * 2**20),
        ("1.5g", 3 * 2**29),
        ("64KiB", 2**16),
        ("2T", 2**41),
        ("1000", 1000),
        ("1000B", 1000),
    ],
)
def test_sizes(text: str, n_bytes: int) -> None:
    assert memory_size(text) == n_bytes


@pytest.mark.parametrize(
    "text", ["", "G", "0", "0G", "-1G", "8X", "8GG", "8iB", "1e9", "nan", "inf", "8G 4M", "9" * 16, "99999999T", "0.1"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be a size such as 8G"):
        memory_size(text)
