"""The figures of a loaded model's KV cache."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CacheInfo", "LayerCacheInfo"]


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
