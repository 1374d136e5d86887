"""Effects of compressed keys and values on attention: errors of K, V, scores, weights and outputs, head by head.

`attention_error` measures them on any arrays, `attention_quality` on Q, K and V of a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .. import reference
from .._native.ggml import round_trip
from ..config import CACHE_TYPES, CacheType, cache_type
from ..errors import ArgumentError, CacheTypeError
from ..gguf.info import ModelInfo, read_model_info
from ..model.reading import AttentionInputs
from .capture import capture_attention

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating[Any]]

OUTLIER_FACTOR: Final = 4.0
"""A channel is an outlier if its RMS is more than this many times the median channel's."""


@dataclass(frozen=True)
class HeadError:
    """The errors of one cache type in one KV head and in the query heads that read it.

    Attributes:
        head: number of the KV head.
        nmse_k: squared error of K relative to the squared values of K.
        nmse_v: the same of V.
        score: RMS error of q.k relative to the RMS of q.k, over all pairs of query and key that attention sees.
        kl: KL(exact weights || approximate weights) in nats, the mean over queries.
        output: L2 norm of the output's error relative to the L2 norm of the output.
    """

    head: int
    nmse_k: float
    nmse_v: float
    score: float
    kl: float
    output: float


@dataclass(frozen=True)
class HeadFacts:
    """Properties of one KV head's keys that make them hard to store.

    Attributes:
        head: number of the KV head.
        outliers: channels whose RMS is more than `OUTLIER_FACTOR` times the median channel's, ascending.
        offset: norm of the mean key relative to the RMS norm of the keys: 0 if keys point everywhere, 1 if all are
            equal. Centring removes the part offset^2 of their energy.
    """

    head: int
    outliers: tuple[int, ...]
    offset: float


@dataclass(frozen=True)
class LayerAttention:
    """One layer's figures.

    Attributes:
        layer: number of the layer.
        n_head: query heads.
        head_dim_k: values of K per head.
        head_dim_v: values of V per head.
        heads: facts of each KV head.
        errors: by cache type, the errors of each KV head.
    """

    layer: int
    n_head: int
    head_dim_k: int
    head_dim_v: int
    heads: tuple[HeadFacts, ...]
    errors: dict[str, tuple[HeadError, ...]]


@dataclass(frozen=True)
class AttentionQuality:
    """A model's figures.

    Attributes:
        info: the contents of the model's header.
        n_tokens: tokens of text that Q, K and V come from.
        centred: whether each head's mean key was subtracted before encoding.
        rotated: whether stock types were measured with llama.cpp's rotation, which it applies by default.
        layers: the layers measured.
    """

    info: ModelInfo
    n_tokens: int
    centred: bool
    rotated: bool
    layers: tuple[LayerAttention, ...]


def attention_quality(
    path: str | Path,
    text: str,
    *,
    types: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    n_ctx: int = 512,
    centre: bool = False,
    rotate: bool = True,
    n_threads: int | None = None,
) -> AttentionQuality:
    """Measures the errors of cache types in attention, on a model's own Q, K and V.

    Every layer gets exact inputs, from an f32 cache. So errors of earlier layers do not add up as in perplexity or KLD.

    Args:
        path: a GGUF file.
        text: any text of at least n_ctx tokens; best is one like the model's real input.
        types: cache types; None for all that fit the model's head sizes.
        layers: numbers of layers; None for the first, the middle and the last one with a cache.
        n_ctx: tokens; memory and time grow with its square.
        centre: subtract each head's mean key, over this very text, before encoding.
        rotate: see `attention_error`.
        n_threads: threads of llama.cpp; None for half of the processors.

    Raises:
        CacheTypeError: a type that the head sizes do not allow (the message names layer and value).
        ArgumentError, UnsupportedError, TqggufError: see `attention_error` and `capture_attention`.
    """
    info = read_model_info(path)
    if types is None:
        kinds = [kind for kind in CACHE_TYPES.values() if info.obstacle(kind, kind) is None]
    else:
        kinds = [cache_type(name) for name in types]
        for kind in kinds:
            obstacle = info.obstacle(kind, kind)
            if obstacle:
                raise CacheTypeError(f"{info.path.name} cannot have a {kind.name} KV cache: {obstacle}")
    if layers is None:
        own = [layer.index for layer in info.layers]
        layers = sorted({own[0], own[len(own) // 2], own[-1]}) if own else []
    inputs = capture_attention(path, text, layers, n_ctx=n_ctx, n_threads=n_threads)
    names = [kind.name for kind in kinds]
    measured = tuple(_layer(found, names, centre, rotate) for found in inputs.values())
    return AttentionQuality(info, n_ctx, centre, rotate, measured)


def _layer(inputs: AttentionInputs, types: Sequence[str], centre: bool, rotate: bool) -> LayerAttention:
    given = {name: getattr(inputs, name) for name in ("mask", "sinks", "softcap", "max_bias")}
    offset = inputs.k.mean(axis=0) if centre else None
    arrays = (inputs.q, inputs.k, inputs.v)
    errors = attention_error(*arrays, types, inputs.scale, **given, offset=offset, rotate=rotate)
    _, n_head, head_dim_k = inputs.q.shape
    return LayerAttention(inputs.layer, n_head, head_dim_k, inputs.v.shape[2], head_facts(inputs.k), errors)


def head_facts(k: Floats) -> tuple[HeadFacts, ...]:
    """Outlier channels and constant offset of each KV head's keys.

    Args:
        k: (n_tokens, n_head_kv, head_dim).
    """
    k64 = k.astype(np.float64)
    rms = np.sqrt(np.square(k64).mean(axis=0))
    outlier = rms > OUTLIER_FACTOR * np.median(rms, axis=1, keepdims=True)
    mean = np.linalg.norm(k64.mean(axis=0), axis=1)
    norm = np.linalg.norm(rms, axis=1)
    return tuple(
        HeadFacts(h, tuple(np.flatnonzero(outlier[h]).tolist()), float(mean[h] / norm[h]) if norm[h] else 0.0)
        for h in range(k.shape[1])
    )


def attention_error(
    q: Floats,
    k: Floats,
    v: Floats,
    types: Sequence[str],
    scale: float,
    *,
    mask: Floats | None = None,
    sinks: Floats | None = None,
    softcap: float = 0.0,
    max_bias: float = 0.0,
    offset: Floats | None = None,
    rotate: bool = True,
) -> dict[str, tuple[HeadError, ...]]:
    """Errors of attention on stored K and V, relative to attention on the K and V given, by cache type.

    Attention is that of `reference.attention`, in float64. So every difference comes from the stored bytes; a real
    kernel adds its own rounding. The code that encodes and decodes K and V is the one llama.cpp uses for its cache.

    Args:
        q: (n_q, n_head, head_dim_k) queries.
        k: (n_kv, n_head_kv, head_dim_k) keys; query head h reads KV head h // (n_head // n_head_kv).
        v: (n_kv, n_head_kv, head_dim_v) values.
        types: names of cache types, for K and V both.
        scale: factor on the dot products, 1 / sqrt(head_dim) as a rule.
        mask: (n_q, n_kv), added to the scores (times the ALiBi slope), -inf where a query does not see a key. None is
            the causal mask: the queries belong to the last n_q keys, and each sees its own key and those before.
        sinks: (n_head,) logits that join each softmax, or None.
        softcap: c of c tanh(score / c); 0 for none.
        max_bias: ALiBi's largest bias; 0 for none.
        offset: (n_head_kv, head_dim_k), subtracted from the keys before encoding and added after decoding, or None.
            Softmax ignores what q scores on it, so a cache need not store it.
        rotate: whether stock quantized types get the Hadamard rotation that llama.cpp's graph applies by default to
            head sizes that are a multiple of 64: K by the largest power of two that divides its head size, V by 64
            (`build_input_k_rot` and `build_input_v_rot` of llama-kv-cache.cpp). llama.cpp does not rotate a cache
            whose layers differ in head size; the caller must take care of that.

    Returns:
        The errors of each KV head, by type.

    Raises:
        ArgumentError: an unknown type; shapes that do not fit each other or the type's block; a query that sees no
            key; or an offset together with sinks or softcap, which would change the result.
    """
    kinds = [cache_type(name) for name in types]
    added = _check(q, k, v, mask, sinks, softcap, offset)
    (_, n_head, head_dim_k), (_, n_head_kv, head_dim_v) = q.shape, v.shape
    base = np.float32(0.0) if offset is None else offset.astype(np.float32)
    found = {}
    for kind in kinds:
        size_k, size_v = rotation_sizes(kind, head_dim_k, head_dim_v) if rotate else (0, 0)
        near_k = stored(k.astype(np.float32) - base, kind, size_k) + base
        found[kind.name] = near_k, stored(v.astype(np.float32), kind, size_v)
    slopes = reference.alibi_slopes(n_head, max_bias)
    errors: dict[str, list[HeadError]] = {kind.name: [] for kind in kinds}
    # Head by head, because scores take more memory than all keys and values.
    for h, heads in enumerate(np.arange(n_head).reshape(n_head_kv, -1)):
        group = _Group(
            q=q[:, heads].transpose(1, 0, 2).astype(np.float64),
            scale=scale,
            bias=slopes[heads, None, None] * added,
            sinks=None if sinks is None else sinks[heads].astype(np.float64),
            softcap=softcap,
        )
        exact = group.attend(k[:, h], v[:, h])
        for name, (near_k, near_v) in found.items():
            errors[name].append(_head_error(h, (k[:, h], near_k[:, h]), (v[:, h], near_v[:, h]), exact, group))
    return {name: tuple(found) for name, found in errors.items()}


@dataclass(frozen=True)
class _Attention:
    """The results of the query heads of one KV head.

    Attributes:
        scores: (group, n_q, n_kv), before softcap and mask.
        weights: (group, n_q, n_kv), or n_kv + 1 with the sink's weight last.
        log_weights: their logarithms.
        outputs: (group, n_q, head_dim_v).
    """

    scores: F64
    weights: F64
    log_weights: F64
    outputs: F64


@dataclass(frozen=True)
class _Group:
    """The query heads that read one KV head, and the parameters of their attention.

    Attributes:
        q: (group, n_q, head_dim_k).
        scale: factor on the dot products.
        bias: (group, n_q, n_kv), -inf where a query does not see a key.
        sinks: (group,) logits, or None.
        softcap: c of c tanh(score / c); 0 for none.
    """

    q: F64
    scale: float
    bias: F64
    sinks: F64 | None
    softcap: float

    def attend(self, k: Floats, v: Floats) -> _Attention:
        """Attention on one head's keys (n_kv, head_dim_k) and values (n_kv, head_dim_v)."""
        raw = self.scale * (self.q @ k.astype(np.float64).T)
        scores = (self.softcap * np.tanh(raw / self.softcap) if self.softcap > 0 else raw) + self.bias
        if self.sinks is not None:
            column = np.broadcast_to(self.sinks[:, None, None], (*scores.shape[:2], 1))
            scores = np.concatenate((scores, column), axis=-1)
        scores = scores - scores.max(axis=-1, keepdims=True)
        weights = np.exp(scores)
        total = weights.sum(axis=-1, keepdims=True)
        weights /= total
        return _Attention(raw, weights, scores - np.log(total), weights[..., : len(v)] @ v.astype(np.float64))


def _head_error(
    head: int, k: tuple[Floats, Floats], v: tuple[Floats, Floats], exact: _Attention, group: _Group
) -> HeadError:
    """Errors of one KV head; k and v are (exact, stored)."""
    near = group.attend(k[1], v[1])
    seen = np.isfinite(group.bias)
    with np.errstate(invalid="ignore"):  # -inf - -inf, where the weight is 0
        divergence = np.where(exact.weights > 0, exact.weights * (exact.log_weights - near.log_weights), 0.0)
    return HeadError(
        head=head,
        nmse_k=_relative(*k) ** 2,
        nmse_v=_relative(*v) ** 2,
        score=_relative(exact.scores[seen], near.scores[seen]),
        kl=float(divergence.sum(axis=-1).mean()),
        output=_relative(exact.outputs, near.outputs),
    )


def _relative(exact: Floats, near: Floats) -> float:
    """The L2 norm of the difference relative to that of the exact values; 0 if there is no difference."""
    error, size = (float(np.linalg.norm(x.astype(np.float64))) for x in (near - exact, exact))
    return error / size if error else 0.0


def _check(
    q: Floats,
    k: Floats,
    v: Floats,
    mask: Floats | None,
    sinks: Floats | None,
    softcap: float,
    offset: Floats | None,
) -> F64:
    """The mask (n_q, n_kv) to add to scores; raises the errors of `attention_error` that concern its arrays."""
    shapes = q.shape, k.shape, v.shape
    fit = all(len(shape) == 3 and shape[1] for shape in shapes)
    if not fit or q.shape[2] != k.shape[2] or k.shape[:2] != v.shape[:2] or q.shape[1] % k.shape[1]:
        raise ArgumentError(
            f"q {q.shape}, k {k.shape} and v {v.shape} do not fit: they must be (n_q, n_head, head_dim_k), "
            f"(n_kv, n_head_kv, head_dim_k) and (n_kv, n_head_kv, head_dim_v), n_head a multiple of n_head_kv"
        )
    for name, given, axes, shape in (
        ("mask", mask, "(n_q, n_kv)", (len(q), len(k))),
        ("sinks", sinks, "(n_head,)", q.shape[1:2]),
        ("offset", offset, "(n_head_kv, head_dim_k)", k.shape[1:]),
    ):
        if given is not None and given.shape != shape:
            raise ArgumentError(f"{name} must be {axes} = {shape}, not {given.shape}")
    if offset is not None and (softcap > 0 or sinks is not None):
        reason = "a softcap" if softcap > 0 else "attention sinks"
        raise ArgumentError(f"keys cannot be centred in a layer with {reason}: it would change the result")
    added = _causal(len(q), len(k)) if mask is None else mask.astype(np.float64)
    if not len(q) or not np.isfinite(added).any(axis=1).all():
        raise ArgumentError("every query must see a key")
    return added


def _causal(n_q: int, n_kv: int) -> F64:
    """The mask of queries that belong to the last n_q of n_kv keys."""
    position = np.arange(n_kv - n_q, n_kv)[:, None]
    return np.where(np.arange(n_kv) <= position, 0.0, -np.inf)


def rotation_sizes(kind: CacheType, head_dim_k: int, head_dim_v: int) -> tuple[int, int]:
    """The sizes of the Hadamard matrices that llama.cpp's graph applies to K and V of a type; 0 for none."""
    if not kind.quantized or kind.ours:
        return 0, 0
    largest = head_dim_k & -head_dim_k  # the largest power of two that divides it
    return largest if head_dim_k % 64 == 0 else 0, 64 if head_dim_v % 64 == 0 else 0


def stored(x: F32, kind: CacheType, rotation_size: int, n_block: int = 1) -> F32:
    """x (n, n_head_kv, head_dim) after encoding and decoding between two rotations (`hadamard_rotated`)."""
    return hadamard_rotated(round_trip(hadamard_rotated(x, rotation_size, n_block), kind), rotation_size, n_block)


def hadamard_rotated(values: F32, size: int, n_block: int = 1) -> F32:
    """Values (..., a multiple of size) as the graph rotates them before it stores them, which is its own inverse.

    Args:
        values: any values.
        size: of the Hadamard matrix; 0 for none.
        n_block: above 1 it mixes blocks of so many values (`set_rotation` in native/ggml/tq_ggml_calibration.c).
    """
    if not size:
        return values
    blocks = values.reshape(-1, size // n_block, n_block)
    found: F32 = np.matmul(hadamard(size // n_block), blocks).reshape(values.shape)
    return found


def hadamard(n: int) -> F32:
    """The orthonormal Walsh-Hadamard matrix of size n, a power of two; its own inverse (Sylvester's construction)."""
    matrix: F32 = np.full((1, 1), 1 / np.sqrt(n), dtype=np.float32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
