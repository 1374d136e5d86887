"""Which code computes attention for a model and a cache: libtqgguf's two ways, or upstream's three, layer by layer.

The rules are those of `llm_graph_context::build_attn_mha` (flash attention or not), of
`ggml_compute_forward_flash_attn_ext_f16` of the CPU backend, which gives nodes with a type of tqgguf to native/ggml,
and of `tqi_plan_make` in native/src/attention_plan.c (fused or tiled). llama.cpp plans the context, so that a cache
which it refuses is reported with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Final

from ..cache.policy import CachePolicy, PolicySpec, needs_flash, resolve
from ..cache.tail import kept
from ..config import CacheType
from ..errors import TqggufError
from ..gguf.header import read_header
from ..gguf.info import ModelInfo, read_model_info
from .plan import Setup, planned_model

MAX_FUSED: Final = 8
"""TQI_MAX_FUSED of native/src/kernels.h, which no function of libtqgguf gives: query vectors that the fused kernels
take at once."""

_NO_FLASH: Final = {"grok"}
"""Architectures that llama.cpp excludes from flash attention."""


@dataclass(frozen=True)
class LayerPath:
    """Layers whose attention is computed by the same code.

    Attributes:
        layers: their numbers.
        type_k: type of K.
        type_v: type of V.
        decode: the code that computes one token: "fused", "tiled", "upstream split", "upstream rows" or "upstream
            matrix products".
        prefill: the same for many tokens: "tiled", "upstream tiled", "upstream rows" or "upstream matrix products".
        reason: the reason, in words.
    """

    layers: tuple[int, ...]
    type_k: str
    type_v: str
    decode: str
    prefill: str
    reason: str


@dataclass(frozen=True)
class AttentionPath:
    """The code that computes attention with one cache.

    Attributes:
        info: the contents of the model's header.
        cache: the cache, in words.
        obstacle: why the model cannot have the cache, or None.
        flash: whether flash attention is on.
        paths: groups of layers with the same code, by layer; empty if there is an obstacle.
        notes: other parts of attention: softcap, sinks, windows, the tail, centred keys.
    """

    info: ModelInfo
    cache: str
    obstacle: str | None
    flash: bool
    paths: tuple[LayerPath, ...]
    notes: tuple[str, ...]


def attention_path(path: str | Path, cache: PolicySpec = "pqo3", *, tail: int | None = None) -> AttentionPath:
    """The code that would compute attention on the CPU with the settings of `Llama`. Loads no weights.

    Args:
        path: a GGUF file.
        cache: as for `Llama`.
        tail: as for `Llama`.

    Raises:
        ArgumentError: unknown cache type.
        ModelFileError: see `read_model_info`.
    """
    info = read_model_info(path)
    policy = resolve(cache, info.n_layer)
    flash = needs_flash(policy, tail)
    obstacle = _obstacle(info, policy, flash, tail)
    paths = () if obstacle else tuple(_paths(info, policy, flash, tail))
    return AttentionPath(info, policy.words or str(cache), obstacle, flash, paths, tuple(_notes(info, policy, tail)))


def _obstacle(info: ModelInfo, policy: CachePolicy, flash: bool, tail: int | None) -> str | None:
    if flash and info.architecture in _NO_FLASH:
        return f"llama.cpp excludes architecture {info.architecture} from flash attention, which this cache needs"
    try:
        with planned_model(info.path) as model:
            model.context(policy, 512, Setup(tail))
    except TqggufError as error:
        return str(error)
    return None


def _paths(info: ModelInfo, policy: CachePolicy, flash: bool, tail: int | None) -> Iterator[LayerPath]:
    keyed = [
        (_way(info, layer.n_head_kv, *policy.types(layer.index), flash, tail), policy.types(layer.index), layer.index)
        for layer in info.layers
    ]
    for (way, (k, v)), group in groupby(keyed, key=lambda item: item[:2]):
        yield LayerPath(tuple(index for *_, index in group), k.name, v.name, *way)


def _way(
    info: ModelInfo, n_head_kv: int, k: CacheType, v: CacheType, flash: bool, tail: int | None
) -> tuple[str, str, str]:
    """The code for one token, the code for many, and the reason."""
    if not flash:
        products = "upstream matrix products"
        return products, products, "no type needs flash attention, and Llama leaves it off where it is not needed"
    group = info.n_head // n_head_kv
    both = "K and V are" if k.ours and v.ours else "K is" if k.ours else "V is"
    if k.ours or v.ours:
        if not (k.ours and v.ours):
            return "tiled", "tiled", f"only {both} of a type of tqgguf: the other is decoded a tile at a time"
        if group > MAX_FUSED:
            return "tiled", "tiled", f"{group} query heads share a KV head, the fused kernels take {MAX_FUSED}"
        why = f"{both} of types of tqgguf, and {group} query heads share a KV head (fused takes {MAX_FUSED})"
        return "fused", "tiled", why
    if kept(k, tail) or kept(v, tail):
        return "tiled", "tiled", "stock types with a tail: tokens are decoded a tile at a time, from blocks or rows"
    if k.name == v.name and k.name in ("f16", "f32"):
        return "upstream split", "upstream tiled", "K and V are of one float type"
    return "upstream rows", "upstream rows", "stock types: quantized, or not the same for K and V, go row by row"


def _notes(info: ModelInfo, policy: CachePolicy, tail: int | None) -> Iterator[str]:
    header = read_header(info.path)
    softcap = header.metadata.get(f"{info.architecture}.attn_logit_softcapping")
    if isinstance(softcap, float) and softcap:
        yield f"scores are capped at {softcap:g} (softcap); every path applies it"
    if any(".attn_sinks" in tensor.name for tensor in header.tensors):
        yield "attention sinks take part in the softmax; every path applies them"
    if info.mla:
        yield "MLA: all query heads share one latent, and V is read from K"
    if any(layer.window for layer in info.layers):
        yield "layers with a sliding window skip the keys outside of it"
    if recent := policy.kept(tail):
        yield f"the newest {recent} tokens and the first four are read in f16 (precise tail)"
    if policy.k_means:
        yield f"keys of {len(policy.k_means)} layers are stored less a mean"
    if policy.k_gains:
        yield f"keys of {len(policy.k_gains)} layers are stored times a gain"
