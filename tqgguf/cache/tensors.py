"""The tensors of a KV cache: what llama.cpp made (native/ggml/tq_ggml_cache.h), compared with what it was asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..config import CACHE_TYPES
from ..errors import CacheTypeError
from ..gguf.info import KVLayer, ModelInfo
from .policy import CachePolicy
from .tail import tail_rows, tail_width

_NAMES = {kind.number: kind.name for kind in CACHE_TYPES.values()}


@dataclass(frozen=True)
class CacheTensor:
    """K or V of one layer, as llama.cpp has it.

    Attributes:
        layer: number of the layer.
        side: "K" or "V"; whatever else llama.cpp may say is refused by `check_tensors`.
        type: ggml's number of the type.
        n_embd: values of a cell.
        n_cells: cells of a stream.
        n_stream: streams: 1, or one for each sequence.
        bytes: of the tensor, without its tail.
        n_mean: values that are subtracted from each key; 0: none are.
        n_gain: values that each key is multiplied by; 0: it is not.
        calibration_sum: of what the cache has as its mean and gain; see `calibration_sum`.
        tail_recent: rows of the tail for the newest cells of a stream.
        tail_first: rows of the tail for the first cells of a stream.
        tail_bytes: of the tail, in all streams.
        device: llama.cpp's name of the device it lies on.
        rotated: whether it is rotated by a Hadamard matrix before it is stored.
    """

    layer: int
    side: str
    type: int
    n_embd: int
    n_cells: int
    n_stream: int
    bytes: int
    n_mean: int
    n_gain: int
    calibration_sum: int
    tail_recent: int
    tail_first: int
    tail_bytes: int
    device: str
    rotated: bool

    @property
    def type_name(self) -> str:
        """Name of the type."""
        return _NAMES.get(self.type, f"type {self.type}")


@dataclass(frozen=True)
class CacheShape:
    """How a context lays out its cache.

    Attributes:
        n_ctx: tokens of all sequences together.
        n_ubatch: tokens computed at once.
        n_seq: sequences.
        unified: whether they share one stream, instead of a stream for each.
        swa_full: whether layers with a sliding window keep all tokens nevertheless.
        tail: newest tokens kept in f16, as for `Llama`.
        rotate: whether llama.cpp may rotate K and V.
        planned: whether its tensors have no memory, so that nothing stands in them.
    """

    n_ctx: int
    n_ubatch: int
    n_seq: int
    unified: bool
    swa_full: bool
    tail: int | None
    rotate: bool = True
    planned: bool = False

    @property
    def n_stream(self) -> int:
        """Streams of the cache."""
        return 1 if self.unified else self.n_seq

    def cells(self, layer: KVLayer) -> int:
        """Cells of a layer in each stream."""
        return layer.cells(self.n_ctx, self.n_ubatch, self.n_seq, self.unified, self.swa_full)


def check_tensors(made: Sequence[CacheTensor], info: ModelInfo, policy: CachePolicy, shape: CacheShape) -> None:
    """Compares every tensor that llama.cpp made with the one it was asked for.

    Of an architecture whose cache tqgguf does not model, the number of tensors and their sizes are not known, and an
    index beside the cache is rotated whatever its type (DeepSeek V3.2). There the type, the mean and the tail of the
    tensors that were made are compared.

    Raises:
        CacheTypeError: a tensor is missing, is one too many, or differs; the message names layer, side, what was asked
            for and what llama.cpp made.
    """
    layers = {layer.index: layer for layer in info.layers}
    wanted = [
        (layer.index, side)
        for layer in info.layers
        for side, width in (("K", layer.head_dim_k), ("V", layer.head_dim_v))
        if width
    ]
    found = [(tensor.layer, tensor.side) for tensor in made]
    where = "llama.cpp made another KV cache than it was asked for: layer"
    for layer, side in wanted:
        if (layer, side) not in found and (info.exact or not found):
            asked = policy.types(layer)["KV".index(side)].name
            raise CacheTypeError(f"{where} {layer}, {side}: asked for {asked}, got no {side}")
    if info.exact and (more := _surplus(found, wanted)):
        raise CacheTypeError(f"{where} {more[0]}, {more[1]}: asked for none, got one")
    for tensor in made:
        at = f"{where} {tensor.layer}, {tensor.side}"
        if not 0 <= tensor.layer < policy.n_layer or tensor.side not in ("K", "V"):
            raise CacheTypeError(f"{at}: the policy has K and V of {policy.n_layer} layers")
        differences = _differences(tensor, layers.get(tensor.layer) if info.exact else None, policy, shape)
        if info.exact and (rotated := _rotated(info, policy, tensor.layer, tensor.side)) is not None:
            differences = (*differences, ("rotation", rotated and shape.rotate, tensor.rotated))
        for what, want, got in differences:
            if want != got:
                raise CacheTypeError(f"{at}: asked for {what} {want}, got {got}")


def _surplus(found: Iterable[tuple[int, str]], wanted: Iterable[tuple[int, str]]) -> tuple[int, str] | None:
    left = list(wanted)
    for each in found:
        if each not in left:
            return each
        left.remove(each)
    return None


def _differences(
    tensor: CacheTensor, layer: KVLayer | None, policy: CachePolicy, shape: CacheShape
) -> Iterable[tuple[str, object, object]]:
    """What is compared: a word for it, what was asked for, what was made; layer: None if its sizes are not known."""
    kind = policy.types(tensor.layer)["KV".index(tensor.side)]
    yield "type", kind.name, tensor.type_name
    n_embd, cells = tensor.n_embd, tensor.n_cells
    if layer:
        n_embd = layer.n_head_kv * (layer.head_dim_k if tensor.side == "K" else layer.head_dim_v)
        cells = shape.cells(layer)
        yield "values of a token", n_embd, tensor.n_embd
        yield "cells", cells, tensor.n_cells
        yield "streams", shape.n_stream, tensor.n_stream
    yield "bytes", tensor.n_stream * cells * kind.row_bytes(n_embd), tensor.bytes
    mean, gain = (
        vectors.get(tensor.layer) if tensor.side == "K" else None for vectors in (policy.k_means, policy.k_gains)
    )
    yield "values of a mean key", 0 if mean is None else mean.size, tensor.n_mean
    yield "values of a key gain", 0 if gain is None else gain.size, tensor.n_gain
    if not shape.planned:
        yield "a calibration that sums up to", calibration_sum(mean, gain), tensor.calibration_sum
    rows = tail_rows(kind, shape.tail, cells)
    yield "rows of a tail", rows, (tensor.tail_recent, tensor.tail_first)
    yield "bytes of a tail", tensor.n_stream * sum(rows) * tail_width(n_embd), tensor.tail_bytes


def _rotated(info: ModelInfo, policy: CachePolicy, layer: int, side: str) -> bool | None:
    """Whether K or V of a layer is rotated, where it may be (`rotates` of native/ggml/tq_ggml_policy.c).

    llama.cpp rotates a side of all layers or of none. A policy that calibrates keys leaves those to each layer. None
    where heads differ in size: llama.cpp rotates each part of such a cache by itself.
    """
    if side == "K" and policy.calibrated:
        return next((policy.rotates_k(each) for each in info.layers if each.index == layer), None)
    types = [policy.types(layer)["KV".index(side)] for layer in range(policy.n_layer)]
    sizes = {layer.head_dim_k if side == "K" else layer.head_dim_v for layer in info.layers}
    if any(kind.ours for kind in types) or not any(kind.quantized for kind in types):
        return False
    return sizes.pop() % 64 == 0 if len(sizes) == 1 else None


def calibration_sum(*vectors: npt.NDArray[np.float32] | None) -> int:
    """The values of a mean and a gain as one number (`tq_ggml_calibration_sum`): a change of one value changes it."""
    values = [np.ascontiguousarray(x, np.float32).reshape(-1) for x in vectors if x is not None]
    bits = np.concatenate(values).view(np.uint32).astype(np.uint64) if values else np.zeros(0, np.uint64)
    return int((bits * (2 * np.arange(len(bits), dtype=np.uint64) + 1)).sum(dtype=np.uint64))
