"""What a cache type does to the residual stream behind a layer's attention, computed from one reading of a text.

K or V is encoded and decoded as the cache would do it, behind calibration and rotation, and attention is computed again
for some of the queries. The error of its outputs goes through the matrix behind them. A layer's distortion is the
squared error of what attention adds to the residual stream, relative to the squares of the stream: the stream grows
from layer to layer, so an error of the same size matters less in later ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from ..cache.policy import CachePolicy
from ..cache.tail import kept
from ..config import CacheType, cache_type
from ..gguf.info import KVLayer
from ..model.reading import AttentionInputs
from ..reference import BLOCK
from .attention import Floats, rotation_sizes, stored

F32 = npt.NDArray[np.float32]

N_QUERIES: Final = 128
"""Queries of each head, spread over the second half of the text, which is the half that is scored. With so many, the
figures take less time than the reading."""

N_FIRST: Final = 4
"""Tokens at the beginning of a text that a tail keeps, too."""


@dataclass(frozen=True)
class Storage:
    """How a type is stored where it is used.

    Attributes:
        kind: the type.
        policy: the type in all layers, calibrated if it will be.
        rotate: whether llama.cpp rotates stock types; it does so behind a calibration in any case.
        tail: newest tokens kept in f16.
    """

    kind: CacheType
    policy: CachePolicy
    rotate: bool
    tail: int

    def error_k(self, k: F32, layer: KVLayer) -> F32:
        """What is decoded less what was stored, of a layer's keys (n_tokens, n_head_kv, head_dim_k)."""
        mean = self.policy.k_means.get(layer.index, np.zeros(k.shape[1:], np.float32))
        gain = self.policy.k_gains.get(layer.index, np.ones(k.shape[1:], np.float32))
        size, n_block = 0, 1
        if self.policy.rotates_k(layer):
            size, n_block = layer.head_dim_k & -layer.head_dim_k, BLOCK if self.kind.ours else 1
        elif self.rotate and not self.policy.calibrated:
            size = rotation_sizes(self.kind, layer.head_dim_k, layer.head_dim_v)[0]
        x: F32 = (k - mean) * gain
        error: F32 = np.divide(stored(x, self.kind, size, n_block) - x, gain, dtype=np.float32)
        return error

    def error_v(self, v: F32, layer: KVLayer) -> F32:
        """The same of a layer's values (n_tokens, n_head_kv, head_dim_v)."""
        sizes = rotation_sizes(self.kind, layer.head_dim_k, layer.head_dim_v)
        return stored(v, self.kind, sizes[1] if self.rotate else 0) - v

    def from_blocks(self, rows: npt.NDArray[np.intp], n: int) -> F32:
        """1 where queries of the tokens `rows` read a key from its block, 0 where from the tail: (n_rows, n)."""
        token = np.arange(n)
        if not self.tail:
            return np.ones((len(rows), n), np.float32)
        flags = (token <= rows[:, None] - self.tail) & (token >= N_FIRST)
        return flags.astype(np.float32)


def storages(policies: Sequence[CachePolicy], rotate: bool, tail: int | None) -> list[Storage]:
    """How types are stored that stand side by side in one cache.

    Args:
        policies: each with one type in all layers.
        rotate: whether llama.cpp rotates stock types.
        tail: as for `Llama`.
    """
    kinds = [cache_type(policy.types_k[0]) for policy in policies]
    return [Storage(kind, policy, rotate, kept(kind, tail)) for kind, policy in zip(kinds, policies, strict=True)]


def distortions(inputs: AttentionInputs, layer: KVLayer, types: Sequence[Storage]) -> dict[tuple[str, str], float]:
    """The relative squared error of the residual stream by side ("K", "V") and type, with the other side exact.

    Args:
        inputs: of the layer, whose text was read as one batch. Without a branch the error is that of the outputs of
            attention, relative to them.
        layer: its sizes.
        types: how they are stored.
    """
    n, n_head, _ = inputs.q.shape
    group = n_head // layer.n_head_kv
    rows = np.linspace(n // 2, n - 1, min(N_QUERIES, n - n // 2)).astype(np.intp)
    blocks = [each.from_blocks(rows, n) for each in types]
    errors = [(each.error_k(inputs.k, layer), each.error_v(inputs.v, layer)) for each in types]
    exact: list[Floats] = []
    moved: dict[tuple[str, str], list[Floats]] = {(side, each.kind.name): [] for side in "KV" for each in types}
    for head in range(n_head):
        q, v, kv = inputs.q[rows, head], inputs.v[:, head // group], head // group
        dots = q @ inputs.k[:, kv].T
        p = inputs.weights(dots, head, rows)
        exact.append(p @ v)
        for each, flags, (error_k, error_v) in zip(types, blocks, errors, strict=True):
            near = inputs.weights(dots + (q @ error_k[:, kv].T) * flags, head, rows)
            moved["K", each.kind.name].append((near - p) @ v)
            moved["V", each.kind.name].append((p * flags) @ error_v[:, kv])
    total = _energy(exact, inputs) / (inputs.branch.share if inputs.branch else 1.0)
    return {part: _energy(error, inputs) / max(total, 1e-30) for part, error in moved.items()}


def _energy(outputs: Sequence[Floats], inputs: AttentionInputs) -> float:
    """The sum of squares of outputs, (n_rows, head_dim_v) of each head, behind the matrix that they go through."""
    x = np.concatenate(outputs, axis=1)
    if inputs.branch:
        x = x @ inputs.branch.matrix.T
    return float(np.vdot(x, x))
