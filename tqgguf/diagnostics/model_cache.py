"""What a model's KV cache takes in each cache type, from its GGUF alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..cache.policy import resolve
from ..cache.tail import DEFAULT_TAIL, check_tail
from ..config import cache_type
from ..errors import ArgumentError
from ..gguf.info import ModelInfo, read_model_info

__all__ = ["COMPARED_TYPES", "CacheRow", "ModelCache", "model_cache"]

COMPARED_TYPES: Final = ("f16", "q8_0", "q4_0", "pqt4", "pqo4", "pqt3", "pqo3")


@dataclass(frozen=True)
class CacheRow:
    """One cache type's cost for a model.

    Attributes:
        type: name of the type, used for K and V both.
        bits: bits per value.
        bytes_per_token: K and V of all layers; None if the type cannot be used.
        bytes: in all, precise tail included, for each context length asked for; None if the type cannot be used.
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
        info: what the GGUF says.
        contexts: context lengths in tokens, the columns of `CacheRow.bytes`.
        rows: one for each type compared.
    """

    info: ModelInfo
    contexts: tuple[int, ...]
    rows: tuple[CacheRow, ...]


def model_cache(
    path: str | Path, contexts: Sequence[int] = (), types: Sequence[str] = COMPARED_TYPES, *, tail: int = DEFAULT_TAIL
) -> ModelCache:
    """Computes what each type would take, as `Llama` has llama.cpp allocate it for one sequence.

    Args:
        path: a GGUF file.
        contexts: context lengths in tokens; none means the length the model was trained for.
        types: names of cache types.
        tail: newest tokens kept in f16 where the type is ours.

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
    for name in types:
        kind = cache_type(name)
        obstacle = info.obstacle(kind, kind)
        usable = obstacle is None
        rows.append(
            CacheRow(
                type=kind.name,
                bits=kind.bits,
                bytes_per_token=info.bytes_per_token(kind, kind) if usable else None,
                bytes=tuple(resolve(kind.name, info.n_layer).bytes(info, n, tail) for n in lengths) if usable else None,
                obstacle=obstacle,
            )
        )
    return ModelCache(info, lengths, tuple(rows))
