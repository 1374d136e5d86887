"""The size of a model's KV cache in each cache type, from its GGUF alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..cache.policy import resolve
from ..cache.tail import check_tail
from ..config import PREFERRED_TYPES, cache_type
from ..errors import ArgumentError
from ..gguf.info import ModelInfo, read_model_info


@dataclass(frozen=True)
class CacheRow:
    """The size of a model's KV cache in one type.

    Attributes:
        type: name of the type of K and V.
        bits: bits per value.
        bytes_per_token: bytes of K and V of all layers; None if the type cannot be used.
        bytes: bytes of the cache with its precise tail, for each context length; None if the type cannot be used.
        obstacle: why the type cannot be used, or None.
    """

    type: str
    bits: float
    bytes_per_token: int | None
    bytes: tuple[int, ...] | None
    obstacle: str | None


@dataclass(frozen=True)
class ModelCache:
    """A model's KV cache in several types.

    Attributes:
        info: the contents of the model's header.
        contexts: context lengths in tokens, the columns of `CacheRow.bytes`.
        rows: one for each type.
    """

    info: ModelInfo
    contexts: tuple[int, ...]
    rows: tuple[CacheRow, ...]


def model_cache(
    path: str | Path, contexts: Sequence[int] = (), types: Sequence[str] = PREFERRED_TYPES, *, tail: int | None = None
) -> ModelCache:
    """Computes the size of the cache that llama.cpp would allocate for `Llama` and one sequence, for each type.

    Args:
        path: a GGUF file.
        contexts: context lengths in tokens; without any, the context the model was trained for.
        types: names of cache types.
        tail: newest tokens kept in f16, as for `Llama`.

    Raises:
        ArgumentError: a context that is not positive, or an unknown type.
        ModelFileError: see `read_model_info`.
    """
    check_tail(tail)
    info = read_model_info(path)
    lengths = tuple(contexts) or (info.n_ctx_train,)
    for n_ctx in lengths:
        if n_ctx < 1:
            raise ArgumentError(f"a context must have at least 1 token, not {n_ctx}")
    rows = []
    for kind in map(cache_type, types):
        policy, obstacle = resolve(kind.name, info.n_layer), info.obstacle(kind, kind)
        row = CacheRow(kind.name, kind.bits, None, None, obstacle)
        if obstacle is None:
            sizes = tuple(policy.bytes(info, n, tail) for n in lengths)
            row = CacheRow(kind.name, kind.bits, policy.bytes_per_token(info), sizes, None)
        rows.append(row)
    return ModelCache(info, lengths, tuple(rows))
