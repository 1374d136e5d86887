"""What a GGUF file says about the KV cache that llama.cpp will allocate for it, layer by layer.

The rules (defaults of keys, sliding windows, layers without K and V) are those of llama.cpp's `load_hparams` and
`create_memory`. Where an architecture does something not modelled here, `notes` says so and `exact` is False.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..config import CacheType
from ..errors import ModelFileError
from .architectures import (
    HYBRID,
    INTERVAL,
    NO_CACHE,
    NOT_MODELLED,
    OWN_ATTENTION,
    RECURRENT,
    SWA_FROM_PATTERN,
    SWA_IGNORED,
    SWA_PERIOD,
    SWA_WINDOW,
)
from .header import GgufHeader, read_header

CELL_PADDING: Final = 256
"""llama.cpp rounds the number of KV cells up to a multiple of this."""

MOST_LAYERS: Final = 512
"""llama.cpp ends the process over a file with more (LLAMA_MAX_LAYERS)."""


@dataclass(frozen=True)
class KVLayer:
    """K and V of one layer, per token.

    Attributes:
        index: number of the layer.
        n_head_kv: KV heads.
        head_dim_k: values of K per head.
        head_dim_v: values of V per head; 0 where V is part of K (MLA).
        window: tokens of its sliding window; 0 if it attends to everything.
    """

    index: int
    n_head_kv: int
    head_dim_k: int
    head_dim_v: int
    window: int = 0

    def bytes_per_token(self, k: CacheType, v: CacheType) -> int:
        """Bytes that one token takes with K in the type k and V in the type v.

        Raises:
            ArgumentError: a type's block does not divide the values.
        """
        return k.row_bytes(self.n_head_kv * self.head_dim_k) + v.row_bytes(self.n_head_kv * self.head_dim_v)

    def cells(
        self, n_ctx: int, n_ubatch: int = 512, n_seq: int = 1, unified: bool = False, swa_full: bool = False
    ) -> int:
        """Cells llama.cpp allocates in each stream for a context of n_ctx tokens.

        Args:
            n_ctx: tokens of all sequences together.
            n_ubatch: tokens computed at once; a window has room for as many beside its own.
            n_seq: sequences (`n_seq_max`), each with a stream of its own.
            unified: whether all sequences share one stream instead (`kv_unified`).
            swa_full: whether a layer with a window keeps all tokens nevertheless, so that any prefix can be used again.
        """
        total = _padded(_padded(n_ctx) // (1 if unified else n_seq))
        if swa_full or not self.window:
            return total
        return min(total, _padded(min(total, self.window * (n_seq if unified else 1) + n_ubatch)))

    def obstacle(self, k: CacheType, v: CacheType) -> str | None:
        """Why K cannot have the type k, or V the type v, in this layer; None if they can."""
        for side, kind, head_dim in (("K", k, self.head_dim_k), ("V", v, self.head_dim_v)):
            if head_dim % kind.block:
                return (
                    f"layer {self.index}: head_dim of {side} is {head_dim}, "
                    f"not divisible by {kind.block}, the block of {kind.name}"
                )
        return None


@dataclass(frozen=True)
class ModelInfo:
    """What a GGUF file says about its model's KV cache.

    Attributes:
        path: the file.
        file_bytes: its size.
        header_bytes: where its list of tensors ends; padding and the weights follow.
        name: `general.name`, or the file's name.
        architecture: `general.architecture`.
        n_layer: layers, with and without a cache.
        n_ctx_train: context length it was trained for.
        n_embd: width of the residual stream.
        n_head: query heads of the first layer that has any.
        layers: those with a KV cache of their own.
        mla: whether K holds a compressed latent from which V is taken too.
        exact: whether `layers` is all that llama.cpp allocates for K and V.
        centring_obstacle: why its keys cannot be stored less their mean (softcap, sinks, MLA), or None if they can.
        gain_obstacle: why its keys cannot be stored times a gain (MLA), or None if they can.
        notes: what a reader should know: windows, recurrent layers, what is not modelled.
    """

    path: Path
    file_bytes: int
    header_bytes: int
    name: str
    architecture: str
    n_layer: int
    n_ctx_train: int
    n_embd: int
    n_head: int
    layers: tuple[KVLayer, ...]
    mla: bool
    exact: bool
    centring_obstacle: str | None
    gain_obstacle: str | None
    notes: tuple[str, ...]

    def obstacle(self, k: CacheType, v: CacheType) -> str | None:
        """Why K cannot have the type k, or V the type v, in this model, naming the layer; None if they can."""
        if not self.layers and self.exact and (k.quantized or v.quantized):
            return f"architecture {self.architecture} has no KV cache"
        if self.mla and k != v:
            return f"K and V share one latent in this model (MLA), so K as {k.name} and V as {v.name} cannot differ"
        if self.architecture == "t5" and v.quantized:
            return f"V as {v.name} needs flash attention, which has no place for the bias of T5's attention"
        return next((reason for layer in self.layers if (reason := layer.obstacle(k, v))), None)

    @property
    def values_per_token(self) -> int:
        """Values of K and V that one token takes in all layers together."""
        return sum(layer.n_head_kv * (layer.head_dim_k + layer.head_dim_v) for layer in self.layers)

    def bytes_per_token(self, k: CacheType, v: CacheType) -> int:
        """Bytes that one token takes in all layers together, K in the type k, V in the type v, inside every window."""
        return sum(layer.bytes_per_token(k, v) for layer in self.layers)

    def cache_bytes(self, n_ctx: int, k: CacheType, v: CacheType, n_ubatch: int = 512, *, swa_full: bool = True) -> int:
        """Bytes of K and V that llama.cpp allocates for one sequence, without a tail.

        Args:
            n_ctx: tokens of the context.
            k: type of K.
            v: type of V.
            n_ubatch: tokens computed at once; they add to the cells of layers that keep their sliding window alone.
            swa_full: whether layers with a sliding window keep all tokens nevertheless, as `Llama` has it by default.
        """
        return sum(x.cells(n_ctx, n_ubatch, swa_full=swa_full) * x.bytes_per_token(k, v) for x in self.layers)


def read_model_info(path: str | Path) -> ModelInfo:
    """Reads what a GGUF file says about its KV cache; loads no weights.

    Args:
        path: a GGUF file; of a model that is split, its first one.

    Raises:
        ModelNotFoundError: no such file.
        ModelFileError: not GGUF, truncated, or without the keys its architecture requires.
    """
    return _Keys(read_header(path)).info()


def centring_obstacle(header: GgufHeader) -> str | None:
    """Why subtracting a mean from the keys would change what a model computes, or None if it would not.

    Softmax ignores a constant that all scores of a query share; whatever stands between scores and softmax, or takes
    part in it beside them, does not.
    """
    arch = header.metadata.get("general.architecture")
    if header.metadata.get(f"{arch}.attn_logit_softcapping"):
        return "keys cannot be centred: this model caps its attention scores (softcap)"
    if any(".attn_sinks" in tensor.name for tensor in header.tensors):
        return "keys cannot be centred: this model has attention sinks, which take part in the softmax"
    reason = _other_use_of_keys(header)
    return f"keys cannot be centred: {reason}" if reason else None


def gain_obstacle(header: GgufHeader) -> str | None:
    """Why multiplying keys by a gain, and dividing queries by it, would change what a model computes, or None.

    Scores stay what they are, so that neither a softcap nor attention sinks matter, but whatever else reads keys does.
    """
    reason = _other_use_of_keys(header)
    return f"keys cannot have gains: {reason}" if reason else None


def _other_use_of_keys(header: GgufHeader) -> str | None:
    arch = header.metadata.get("general.architecture")
    if header.metadata.get(f"{arch}.attention.key_length_mla"):
        return "K and V share one latent in this model (MLA)"
    if arch in OWN_ATTENTION:
        return f"{arch} reads them otherwise than by llama.cpp's common attention"
    return None


class _Keys:
    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self.metadata = header.metadata
        number, count = (self.metadata.get(f"split.{key}", 0) for key in ("no", "count"))
        if isinstance(number, int) and isinstance(count, int) and number > 0:
            first = re.sub(r"-\d{5}-of-", "-00001-of-", header.path.name)
            raise self.error(f"it is part {number + 1} of {count} of a model: give its first part, {first}")
        arch = self.metadata.get("general.architecture")
        if not isinstance(arch, str) or not arch:
            raise self.error("key general.architecture is missing: this is no language model")
        if len(arch) > 64 or not arch.isprintable():
            raise self.error(f"key general.architecture is {arch!r:.80}, no name")
        self.arch: str = arch
        if arch in ("clip", "mmproj") or self.metadata.get("general.type") in ("mmproj", "adapter", "imatrix"):
            raise self.error(f"it holds a {self.metadata.get('general.type', arch)}, not a language model")

    def error(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self.header.path}: {what}")

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"{self.arch}.{key}", default)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if value is None:
            raise self.error(f"key {self.arch}.{key} is missing, which architecture {self.arch} requires")
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(f"key {self.arch}.{key} is {value!r}, must be a non-negative integer")
        return value

    def per_layer(self, key: str, n_layer: int, default: list[int] | None = None) -> list[int]:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, list):
            return [self.integer(key)] * n_layer
        if len(value) < n_layer or any(isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in value):
            raise self.error(f"key {self.arch}.{key} must have one non-negative integer for each of {n_layer} layers")
        return value[:n_layer]

    def info(self) -> ModelInfo:
        n_layer = self.integer("block_count")
        n_embd = self.integer("embedding_length")
        if not 0 < n_layer <= MOST_LAYERS:
            raise self.error(f"key {self.arch}.block_count is {n_layer}, must be between 1 and {MOST_LAYERS}")
        recurrent = self.arch in RECURRENT
        heads = self.per_layer("attention.head_count", n_layer, [0] * n_layer if recurrent else None)
        n_head = next((n for n in heads if n), 0)
        notes: list[str] = []
        mla = self.integer("attention.key_length_mla", 0) > 0  # llama.cpp writes 0 where there is none
        layers: tuple[KVLayer, ...] = ()
        exact = self.arch not in NOT_MODELLED
        if self.arch in NO_CACHE:
            notes.append(f"architecture {self.arch} has no KV cache")
        elif recurrent:
            notes.append(f"architecture {self.arch} is recurrent: it keeps a state of fixed size and no KV cache")
        else:
            if not n_head:
                raise self.error(f"key {self.arch}.attention.head_count is 0 in every layer")
            layers = self.layers(n_layer, n_embd, n_head, heads, mla, notes)
            if not exact:
                notes.append(f"not modelled for {self.arch}: {NOT_MODELLED[self.arch]}; figures are lower bounds")
            if self.get("attention.sliding_window", 0) and not self.swa_known():
                exact = False
                notes.append(f"the file names a sliding window, but how {self.arch} uses it is not modelled")
        n_files = self.metadata.get("split.count", 1)
        if isinstance(n_files, int) and n_files > 1:
            notes.append(f"the model is split over {n_files} files")
        name = self.metadata.get("general.name")
        return ModelInfo(
            path=self.header.path,
            file_bytes=self.header.file_bytes,
            header_bytes=self.header.header_bytes,
            name=_printable(name) if isinstance(name, str) and name else self.header.path.stem,
            architecture=self.arch,
            n_layer=n_layer,
            n_ctx_train=self.integer("context_length"),
            n_embd=n_embd,
            n_head=n_head,
            layers=layers,
            mla=mla,
            exact=exact,
            centring_obstacle=centring_obstacle(self.header),
            gain_obstacle=gain_obstacle(self.header),
            notes=tuple(notes),
        )

    def layers(
        self, n_layer: int, n_embd: int, n_head: int, heads: list[int], mla: bool, notes: list[str]
    ) -> tuple[KVLayer, ...]:
        heads_kv = self.per_layer("attention.head_count_kv", n_layer, heads)
        head_dim_k = self.integer("attention.key_length", n_embd // n_head)
        head_dim_v = self.integer("attention.value_length", n_embd // n_head)
        windows = self.windows(n_layer, heads_kv)
        swa_k = self.integer("attention.key_length_swa", head_dim_k)
        swa_v = self.integer("attention.value_length_swa", head_dim_v)
        has_kv = self.has_kv(n_layer, heads_kv, notes)
        if mla:
            notes.append("MLA: each layer keeps one latent per token as K, and V is taken from it")
        elif self.integer("attention.kv_lora_rank", 0):
            notes.append(
                "MLA model, but this file stores full K and V: conversion by a newer llama.cpp saves most of it"
            )
        if any(windows):
            dense = sum(1 for w, has in zip(windows, has_kv, strict=True) if has and not w)
            notes.append(f"sliding window of {max(windows)} tokens in all but {dense} layers")
        sizes = [(swa_k, swa_v) if window else (head_dim_k, head_dim_v) for window in windows]
        return tuple(
            KVLayer(i, heads_kv[i], k, 0 if mla else v, windows[i])
            for i, (k, v) in enumerate(sizes)
            if has_kv[i] and heads_kv[i]
        )

    def has_kv(self, n_layer: int, heads_kv: list[int], notes: list[str]) -> list[bool]:
        has = [n > 0 for n in heads_kv]
        if self.arch in INTERVAL:
            interval = self.integer("full_attention_interval", INTERVAL[self.arch]) or 1
            recurrent = self.get("attention.recurrent_layers", [(i + 1) % interval != 0 for i in range(n_layer)])
            if not isinstance(recurrent, list) or len(recurrent) < n_layer:
                raise self.error(f"key {self.arch}.attention.recurrent_layers has fewer than {n_layer} entries")
            has = [kv and not state for kv, state in zip(has, recurrent, strict=False)]
        if self.arch in ("nemotron_h", "nemotron_h_moe"):  # a layer with a feed-forward width is that and nothing else
            widths = self.per_layer("feed_forward_length", n_layer, [0] * n_layer)
            has = [kv and not width for kv, width in zip(has, widths, strict=True)]
        n_next = self.integer("nextn_predict_layers", 0)
        if 0 < n_next < n_layer:
            has = [kv and i < n_layer - n_next for i, kv in enumerate(has)]
            notes.append(f"the last {n_next} layers predict further tokens; they have a cache only when used for that")
        shared = self.integer("attention.shared_kv_layers", 0) if self.arch == "gemma4" else 0
        first_shared = 20 if self.arch == "gemma3n" else n_layer - shared
        if first_shared < n_layer:
            has = [kv and i < first_shared for i, kv in enumerate(has)]
            notes.append(f"layers {first_shared} to {n_layer - 1} read the cache of earlier layers")
        if self.arch in HYBRID:
            notes.append("hybrid: the other layers keep a recurrent state of fixed size, which is not compressed")
        elif not all(n > 0 for n in heads_kv):
            notes.append(f"{sum(1 for n in heads_kv if not n)} layers have no attention")
        return has

    def swa_known(self) -> bool:
        return self.arch in {*SWA_PERIOD, *SWA_FROM_PATTERN, *SWA_IGNORED, *NOT_MODELLED, "lfm2", "lfm2moe"}

    def windows(self, n_layer: int, heads_kv: list[int]) -> list[int]:
        window = self.integer("attention.sliding_window", SWA_WINDOW.get(self.arch, 0))
        if self.arch == "llama4" and window:
            window = 8192
        if not window or self.arch in SWA_IGNORED:
            return [0] * n_layer
        if self.arch in ("lfm2", "lfm2moe"):
            return [window if n else 0 for n in heads_kv]
        pattern = self.get("attention.sliding_window_pattern")
        if isinstance(pattern, list):
            if len(pattern) < n_layer:
                raise self.error(f"key {self.arch}.attention.sliding_window_pattern has fewer than {n_layer} entries")
            return [window if flag else 0 for flag in pattern[:n_layer]]
        if self.arch not in SWA_PERIOD:
            return [0] * n_layer
        period, dense_first = SWA_PERIOD[self.arch]
        period = pattern if isinstance(pattern, int) else period
        if period == 0:
            return [window] * n_layer
        dense_at = 0 if dense_first else period - 1
        return [0 if i % period == dense_at else window for i in range(n_layer)]


def _printable(name: str) -> str:
    """A name as it can be shown: what would move a terminal's cursor or colour it is replaced."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name[:256])


def _padded(n: int) -> int:
    return (n + CELL_PADDING - 1) // CELL_PADDING * CELL_PADDING
