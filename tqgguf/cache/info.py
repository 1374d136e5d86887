"""The figures of a loaded model's KV cache, from the tensors that llama.cpp made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from ..config import CACHE_TYPES
from .tensors import CacheTensor


@dataclass(frozen=True)
class LayerCacheInfo:
    """KV cache of one layer, in bytes.

    Attributes:
        layer: number of the layer.
        type_k: storage type of K.
        type_v: storage type of V.
        device: where it lies: "CPU", another device of llama.cpp's, or a worker, "host:port".
        cells: tokens it has room for.
        cells_used: tokens in it.
        bytes_per_token: K and V together.
        tail_bytes: allocated for its precise tail, the newest tokens in f16.
        bytes: allocated for all cells, and for the tail.
        f16_bytes: what f16 would take for as many cells.
        centred: whether keys are stored less their mean.
        calibrated: whether keys are stored less their mean, times a gain for each channel, or both.
    """

    layer: int
    type_k: str
    type_v: str
    device: str
    cells: int
    cells_used: int
    bytes_per_token: int
    tail_bytes: int
    bytes: int
    f16_bytes: int
    centred: bool
    calibrated: bool


@dataclass(frozen=True)
class CacheInfo:
    """KV cache of a loaded model, in bytes.

    Attributes:
        type_k: storage type of K; "mixed" where layers differ.
        type_v: storage type of V; likewise.
        n_ctx: context length in tokens.
        cells_used: tokens in the cache.
        bytes_per_token: K and V of all layers together.
        tail: newest tokens that are kept in f16 beside their blocks, in each stream of the cache; 0: none.
        tail_bytes: allocated for the tails of all layers.
        bytes: allocated for K and V of all layers, tails included.
        f16_bytes: what f16 would take for as many cells.
        layers: the same per layer; layers without a cache of their own do not appear.
        exact: False for an architecture whose cache tqgguf does not model: then the figures cover `layers` only.
    """

    type_k: str
    type_v: str
    n_ctx: int
    cells_used: int
    bytes_per_token: int
    tail: int
    tail_bytes: int
    bytes: int
    f16_bytes: int
    layers: tuple[LayerCacheInfo, ...]
    exact: bool

    @property
    def ratio(self) -> float:
        """Bytes as a fraction of what f16 would take."""
        return self.bytes / self.f16_bytes if self.f16_bytes else 1.0


_SUMS: Final = ("bytes_per_token", "tail_bytes", "bytes", "f16_bytes")


def cache_info(
    tensors: Sequence[CacheTensor],
    asked: tuple[Sequence[str], Sequence[str]],
    *,
    n_ctx: int,
    used: int,
    exact: bool,
    place: Callable[[str], str],
) -> CacheInfo:
    """The figures of a cache.

    Args:
        tensors: of the cache, as llama.cpp made them.
        asked: names of the types of K and of V by layer, which a cache without tensors is said to have.
        n_ctx: context length in tokens.
        used: tokens in the cache.
        exact: see `CacheInfo`.
        place: where a device of llama.cpp is.
    """
    numbers = sorted({tensor.layer for tensor in tensors})
    layers = [_layer([each for each in tensors if each.layer == number], used, place) for number in numbers]
    return CacheInfo(
        type_k=_shared_name([layer.type_k for layer in layers] or asked[0]),
        type_v=_shared_name([layer.type_v for layer in layers] or asked[1]),
        n_ctx=n_ctx,
        cells_used=used,
        tail=max((tensor.tail_recent for tensor in tensors), default=0),
        **{name: sum(getattr(layer, name) for layer in layers) for name in _SUMS},
        layers=tuple(layers),
        exact=exact,
    )


def _layer(tensors: Sequence[CacheTensor], used: int, place: Callable[[str], str]) -> LayerCacheInfo:
    cells = max(tensor.n_cells * tensor.n_stream for tensor in tensors)
    types = {tensor.side: tensor.type_name for tensor in tensors}
    tail_bytes = sum(tensor.tail_bytes for tensor in tensors)
    f16 = CACHE_TYPES["f16"]
    return LayerCacheInfo(
        layer=tensors[0].layer,
        type_k=types["K"],
        type_v=types.get("V", types["K"]),  # V of MLA is a part of K
        device=place(tensors[0].device),
        cells=cells,
        cells_used=min(used, cells),
        bytes_per_token=sum(CACHE_TYPES[tensor.type_name].row_bytes(tensor.n_embd) for tensor in tensors),
        tail_bytes=tail_bytes,
        bytes=sum(tensor.bytes for tensor in tensors) + tail_bytes,
        f16_bytes=sum(tensor.n_cells * tensor.n_stream * f16.row_bytes(tensor.n_embd) for tensor in tensors),
        centred=any(tensor.n_mean for tensor in tensors),
        calibrated=any(tensor.n_mean or tensor.n_gain for tensor in tensors),
    )


def _shared_name(names: Sequence[str]) -> str:
    """The name that all layers share, or "mixed"."""
    return names[0] if len(set(names)) == 1 else "mixed"
