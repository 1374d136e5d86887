"""The precise tail: the newest tokens, and the first few, kept in f16 beside the blocks of a compressed cache.

Each quantized K or V can have a ring of f16 rows (native/ggml/tq_ggml_tail.h): a token that is written also takes a
row, and attention reads that row as long as no later token has taken it. A context shift turns the rows of keys.

A tail is asked for as a number of tokens, or as None: then types of tqgguf have one of DEFAULT_TAIL, and stock types
have none, so that llama.cpp computes with them as it always does.
"""

from __future__ import annotations

from typing import Any, Final

from .._util import warn
from ..config import CACHE_TYPES, CacheType
from ..errors import ArgumentError
from ..gguf.info import KVLayer

DEFAULT_TAIL: Final = 128
"""Newest tokens kept in f16 beside a type of tqgguf unless told otherwise."""

MAX_TAIL: Final = 2**20

READ_IN_PART: Final = frozenset({"deepseek4", "minimax-m3"})
"""Architectures whose sparse layers gather their keys before they attend, and so read blocks where a row is kept."""

_FIRST: Final = 4
"""As TQ_GGML_TAIL_FIRST."""


def check_tail(n: Any) -> int | None:
    """The number of newest tokens to keep in f16, or None.

    Raises:
        ArgumentError: neither None nor an integer from 0 to MAX_TAIL.
    """
    if n is None:
        return None
    if isinstance(n, bool) or not hasattr(n, "__index__") or not 0 <= n <= MAX_TAIL:
        raise ArgumentError(
            f"tail is {n!r}, must be an integer between 0 and {MAX_TAIL}: the newest tokens kept in f16"
        )
    return int(n.__index__())


def kept(kind: CacheType, n: int | None) -> int:
    """The newest tokens that K or V of a type keeps in f16, where a tail of n was asked for."""
    if not kind.quantized:
        return 0
    return (DEFAULT_TAIL if kind.ours else 0) if n is None else n


def tails(n: int | None) -> tuple[int, int]:
    """What types of tqgguf, and what stock quantized types keep in f16, where a tail of n was asked for."""
    return kept(CACHE_TYPES["pqo3"], n), kept(CACHE_TYPES["q8_0"], n)


def warn_unread(n: int, architecture: str) -> None:
    """Warns if a tail of n tokens is kept for a model that reads it in a part of its layers only, or not at all."""
    if n and architecture == "t5":
        warn("T5's attention has a bias, and does not read the precise tail: tail=0 saves its memory")
    if n and architecture in READ_IN_PART:
        warn(
            f"layers with sparse attention do not read the precise tail, and {architecture} has them: "
            f"tail=0 saves its memory"
        )


def tail_batch(n: int, most: int) -> int:
    """Tokens of a prompt to compute at once, at most `most`, with a cache on CUDA where n are kept.

    There a batch reads the tail as it is behind the batch (native/ggml/tq_ggml_cuda.c), so in one longer than the tail
    most tokens no longer find their neighbours there. Batches below 128 cost speed: the weights are read for each.
    """
    return min(most, max(n, 128)) if n else most


def tail_rows(kind: CacheType, n: int | None, cells: int) -> tuple[int, int]:
    """Rows of the tail of a K or V in a stream of so many cells: for the newest tokens, and for the first ones."""
    recent = kept(kind, n)
    return (min(recent, cells), min(_FIRST, cells)) if recent else (0, 0)


def tail_width(n_embd: int) -> int:
    """Bytes of a row of a tail: n_embd values in f16, and four bytes for the row's owner."""
    return CACHE_TYPES["f16"].row_bytes(n_embd) + 4


def tail_bytes(layer: KVLayer, k: CacheType, v: CacheType, n: int | None, cells: int) -> int:
    """Bytes of one layer's tails in a stream of so many cells."""
    return sum(
        sum(tail_rows(kind, n, cells)) * tail_width(layer.n_head_kv * width)
        for kind, width in ((k, layer.head_dim_k), (v, layer.head_dim_v))
        if width
    )
