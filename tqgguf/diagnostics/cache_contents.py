"""The contents of a KV cache: norms, scales, code use, outliers and offsets of each head, and the gain of a fourth bit.

The values of a compressed cache are known only as decoded, so their error at 3 and 4 bits is an estimate. For a code
with the mean squared error D, the original of a block is near the decoded block plus independent Gaussian noise of
variance D (the test channel of rate distortion theory; Cover and Thomas, Elements of Information Theory, 10.3). Such
originals are drawn, encoded with 3 and with 4 bits, and decoded; the figures are the errors relative to these
originals. The channels of a block are permuted before: without that, decoded values lie on the very grid that encodes
them again, and their error comes out too small (0.017 for 0.023 with pqo3 on the demo model).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from .. import reference
from .._native import import_llama_cpp
from .._native.ggml import decode_rows, round_trip
from ..cache.policy import CachePolicy
from ..config import CACHE_TYPES, CacheType
from ..errors import ArgumentError
from ..gguf.info import ModelInfo, read_model_info
from ..model.llama import Llama
from ..session import file as session
from ..session.state import CacheState, StoredRows, parse_state, read_state
from .attention import hadamard_rotated, head_facts, rotation_sizes

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

DEFAULT_SAMPLE: Final = 1024
"""Cells to look at by default."""

_CALIBRATED: Final = (
    "keys are stored calibrated: norms, outliers and offsets are those of the keys themselves, the rest is of what is "
    "stored, D (k - m)"
)
_CALIBRATED_SESSION: Final = "keys are shown as stored: less a mean or times a gain, which the session does not hold"

_CODEC_NMSE: Final = {
    **{"pqo3": 0.0229, "pqo4": 0.0053, "pqt2": 0.0700, "pqt3": 0.0169, "pqt4": 0.0041, "pqt5": 0.0010},
    **{"q4_0": 0.0074, "iq4_nl": 0.0058},
}
"""Squared error on Gaussian blocks relative to their square (README, tests/native/test_quality.py); near 0 for types
not listed."""


@dataclass(frozen=True)
class HeadContents:
    """K or V of one KV head.

    Attributes:
        head: number of the KV head.
        norm: mean L2 norm of the vectors.
        norm_spread: standard deviation of the norms, relative to `norm`.
        scale: median magnitude of the blocks' scales; None for a stock type.
        codes: fraction of values that use each index of the codebook; empty for a stock type.
        entropy: entropy of `codes` in bits; None for a stock type.
        outliers: channels whose RMS is more than 4 times the median channel's.
        offset: norm of the mean vector relative to the RMS norm: 0 if vectors point everywhere, 1 if all are equal.
        nmse_3: estimated squared error at 3 bits (pqo3; pqt3 for a trellis type), relative to the squared values.
        nmse_4: the same at 4 bits.
        mean: norm of the mean that is subtracted from keys before they are stored, relative to their RMS norm; 0 for
            none.
        gain: smallest and largest factor that a channel of the keys is multiplied by; (1, 1) for none.
    """

    head: int
    norm: float
    norm_spread: float
    scale: float | None
    codes: tuple[float, ...]
    entropy: float | None
    outliers: tuple[int, ...]
    offset: float
    nmse_3: float
    nmse_4: float
    mean: float
    gain: tuple[float, float]

    @property
    def bit_gain(self) -> float:
        """The squared error at 3 bits divided by that at 4 bits; 1 if there is no error."""
        return self.nmse_3 / self.nmse_4 if self.nmse_4 else 1.0


@dataclass(frozen=True)
class TensorContents:
    """K or V of one layer.

    Attributes:
        layer: number of the layer.
        side: "K" or "V".
        type: storage type.
        head_dim: values of a head.
        bytes: bytes of the cells with tokens, without tails.
        heads: one for each KV head.
    """

    layer: int
    side: str
    type: str
    head_dim: int
    bytes: int
    heads: tuple[HeadContents, ...]


@dataclass(frozen=True)
class CacheContents:
    """The contents of a KV cache.

    Attributes:
        info: the contents of the model's header.
        source: "context" for a loaded model, or the path of a file.
        n_cells: cells that hold tokens, of the cache that has the most.
        n_sampled: cells looked at in each tensor, evenly spaced; fewer in a tensor with fewer cells.
        n_stream: streams of the cache.
        bytes: bytes of the cells with tokens, without tails.
        tensors: K and V of each layer, by layer.
        notes: limits of the figures that a reader should know.
    """

    info: ModelInfo
    source: str
    n_cells: int
    n_sampled: int
    n_stream: int
    bytes: int
    tensors: tuple[TensorContents, ...]
    notes: tuple[str, ...]

    def side(self, side: str) -> tuple[TensorContents, ...]:
        """The tensors of one side.

        Args:
            side: "K" or "V".
        """
        return tuple(tensor for tensor in self.tensors if tensor.side == side)


def inspect_cache(model: Llama, *, sample: int = DEFAULT_SAMPLE) -> CacheContents:
    """Looks at the KV cache of a loaded model and changes nothing.

    It looks at the blocks, not at the precise tail, and copies the filled part of the cache once.

    Args:
        model: a model that has read at least one token.
        sample: cells to look at, at most.

    Raises:
        ArgumentError: the cache is empty, or sample is less than 1.
        CacheClosedError: the model was closed.
        UnsupportedError: the model has no KV cache, or one that is not modelled.
    """
    info, state = model.cache_info(), _state_of(model)
    notes = [_CALIBRATED] if model.cache_policy.calibrated else []
    if info.tail:
        notes.append(f"the newest {info.tail} tokens are read from the precise tail, not from the blocks shown here")
    return _contents(model.model_info, "context", state, sample, notes, model.cache_policy)


def k_scales(model: Llama) -> dict[int, float]:
    """The mean absolute scale of the blocks of K, by layer; nothing for layers whose K has no blocks or no cells.

    Scales are the steps of the quantizer, to which its error is proportional. Nothing is decoded.

    Raises:
        UnsupportedError: the model has no KV cache, or one whose layout is not known here.
    """
    return {
        stored.layer.index: float(np.abs(_block_scales(stored.rows, stored.type)).mean())
        for stored in sorted(_state_of(model).tensors if model.n_tokens else (), key=lambda stored: stored.layer.index)
        if stored.side == "K" and stored.type.quantized and stored.rows.size
    }


def _state_of(model: Llama) -> CacheState:
    """What the cache of a loaded model holds: a copy of its used part."""
    llama_cpp = import_llama_cpp()
    size = llama_cpp.llama_state_get_size(model.ctx)
    data = (ctypes.c_uint8 * size)()
    written = llama_cpp.llama_state_get_data(model.ctx, data, size)
    return parse_state(memoryview(data).cast("B")[:written], model.model_info)


def inspect_session(path: str | Path, model: str | Path, *, sample: int = DEFAULT_SAMPLE) -> CacheContents:
    """Looks at the KV cache in a saved session; loads no weights.

    Args:
        path: a file of `Llama.save_session`, `llama_state_save_file` or `llama_state_seq_save_file`.
        model: the GGUF file of the model it was saved from.
        sample: cells to look at, at most.

    Raises:
        StateFileError, SessionError: the file is no session, is damaged, or is of another version or model.
        ArgumentError: the cache in it is empty, or sample is less than 1.
        UnsupportedError: the model has no KV cache, or one that is not modelled.
        ModelFileError: see `read_model_info`.
    """
    info = read_model_info(model)
    try:
        of_tqgguf = session.is_session(path)
    except OSError:
        of_tqgguf = False  # `read_state` raises an error that says why
    if not of_tqgguf:
        notes = ["a saved state does not tell whether keys are less a mean or times a gain"]
        return _contents(info, str(path), read_state(path, info), sample, notes)
    saved, data = session.read_body(path, info)
    notes = [_CALIBRATED_SESSION] if saved.k_means else []
    return _contents(info, str(path), parse_state(data, info, str(path), sequence=True, tail=saved.tail), sample, notes)


def _contents(
    info: ModelInfo, source: str, state: CacheState, sample: int, notes: list[str], policy: CachePolicy | None = None
) -> CacheContents:
    if isinstance(sample, bool) or not isinstance(sample, int) or sample < 1:
        raise ArgumentError(f"sample is {sample!r}, must be a positive number of cells to look at")
    if not state.n_cells:
        raise ArgumentError(f"the cache of {source} is empty: nothing has been read into it yet")
    sizes = {(layer.head_dim_k, layer.head_dim_v) for layer in info.layers}
    notes = list(notes)
    tensors = [_tensor(stored, sample, len(sizes) == 1, notes, policy) for stored in state.tensors]
    tensors.sort(key=lambda tensor: (tensor.layer, tensor.side))
    if any(not CACHE_TYPES[tensor.type].ours for tensor in tensors):
        notes.append("scales and code use are shown for types of tqgguf")
    if any(layer.window for layer in info.layers):
        notes.append("layers with a sliding window may hold fewer cells")
    return CacheContents(
        info=info,
        source=source,
        n_cells=state.n_cells,
        n_sampled=min(sample, state.n_cells),
        n_stream=state.n_stream,
        bytes=sum(tensor.bytes for tensor in tensors),
        tensors=tuple(tensors),
        notes=tuple(notes),
    )


def _tensor(
    stored: StoredRows, sample: int, rotated: bool, notes: list[str], policy: CachePolicy | None
) -> TensorContents:
    n_cells = len(stored.rows)
    chosen = np.unique(np.linspace(0, n_cells - 1, min(sample, n_cells)).round().astype(np.intp))
    rows, kind, n_head = stored.rows[chosen], stored.type, stored.layer.n_head_kv
    values = decode_rows(kind, rows).reshape(len(rows), n_head, stored.head_dim)
    if n_bad := int((~np.isfinite(values)).sum()):
        notes.append(
            f"layer {stored.layer.index}: {n_bad} of the sampled values of {stored.side} are not finite and count as 0"
        )
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    mean, gain, turned = _calibration(stored, policy)
    if rotated and not turned:
        sizes = rotation_sizes(kind, stored.layer.head_dim_k, stored.layer.head_dim_v)
        values = hadamard_rotated(values, sizes[stored.side == "V"])
    nmse = _bit_errors(values, kind)
    if turned:
        values = hadamard_rotated(values, stored.head_dim & -stored.head_dim, reference.BLOCK if kind.ours else 1)
    values = values / gain + mean
    scales, codes = _codes(rows, kind, n_head) if kind.ours else (None, None)
    norms = np.linalg.norm(values.astype(np.float64), axis=2)
    root = np.sqrt(np.square(norms).mean(axis=0))
    heads = []
    for facts in head_facts(values):
        h = facts.head
        use = np.bincount(codes[h].ravel(), minlength=_n_codes(kind)) / codes[h].size if codes is not None else None
        heads.append(
            HeadContents(
                head=h,
                norm=float(norms[:, h].mean()),
                norm_spread=float(norms[:, h].std() / norms[:, h].mean()) if norms[:, h].any() else 0.0,
                scale=float(np.median(np.abs(scales[h]))) if scales is not None else None,
                codes=() if use is None else tuple(use.tolist()),
                entropy=None if use is None else _entropy(use),
                outliers=facts.outliers,
                offset=facts.offset,
                nmse_3=float(nmse[0, h]),
                nmse_4=float(nmse[1, h]),
                mean=float(np.linalg.norm(mean[h]) / root[h]) if root[h] else 0.0,
                gain=(float(gain[h].min()), float(gain[h].max())),
            )
        )
    return TensorContents(stored.layer.index, stored.side, kind.name, stored.head_dim, stored.rows.size, tuple(heads))


def _calibration(stored: StoredRows, policy: CachePolicy | None) -> tuple[F32, F32, bool]:
    """Mean and gain of what is stored, (n_head_kv, head_dim) each, and whether it is rotated behind them."""
    shape = (stored.layer.n_head_kv, stored.head_dim)
    mean, gain = np.zeros(shape, np.float32), np.ones(shape, np.float32)
    if policy is None or stored.side == "V":
        return mean, gain, False
    layer = stored.layer
    return policy.k_means.get(layer.index, mean), policy.k_gains.get(layer.index, gain), policy.rotates_k(layer)


def _n_codes(kind: CacheType) -> int:
    return len(reference.codebook(kind.name).levels)


def _codes(rows: U8, kind: CacheType, n_head: int) -> tuple[F32, U8]:
    """Scales (n_head, n) and indices (n_head, n, 32) of rows (n_cells, bytes) of a type of tqgguf."""
    blocks = np.ascontiguousarray(rows.reshape(len(rows), n_head, -1).transpose(1, 0, 2)).reshape(-1, kind.bytes)
    bits = 8 * (kind.bytes - 2) // kind.block
    unpack = reference.unpack_trellis if kind.name in reference.TRELLIS_TYPES else reference.unpack
    codes = unpack(blocks[:, 2:], bits)
    return _block_scales(blocks, kind).reshape(n_head, -1), codes.reshape(n_head, -1, kind.block)


def _block_scales(rows: U8, kind: CacheType) -> F32:
    """The scale of each block in rows of a quantized type: the f16 that every block begins with."""
    halves: npt.NDArray[np.float16] = rows.reshape(-1, kind.bytes)[:, :2].copy().view("<f2")
    return halves.ravel().astype(np.float32)


def _entropy(use: npt.NDArray[np.float64]) -> float:
    used = use[use > 0]
    return float(-(used * np.log2(used)).sum())


def _bit_errors(values: F32, kind: CacheType) -> npt.NDArray[np.float64]:
    """Estimated NMSE of each head at 3 and 4 bits, (2, n_head); zeros if the head size is not a multiple of 32."""
    n, n_head, head_dim = values.shape
    if head_dim % reference.BLOCK:
        return np.zeros((2, n_head))
    original = values
    if noise := _CODEC_NMSE.get(kind.name, 0.0):
        blocks = values.reshape(n, n_head, -1, reference.BLOCK)
        # The decoded block has the part 1 - D of the original's energy, and the noise the part D.
        deviation = np.sqrt(noise / (1 - noise) * np.square(blocks).mean(axis=-1, keepdims=True))
        rng = np.random.default_rng(0)
        drawn = blocks + deviation * rng.standard_normal(blocks.shape, dtype=np.float32)
        original = drawn[..., rng.permutation(reference.BLOCK)].reshape(values.shape)
    energy = np.square(original, dtype=np.float64).sum(axis=(0, 2))
    family = "pqt" if kind.name in reference.TRELLIS_TYPES else "pqo"
    errors = []
    for bits in (3, 4):
        lost = original - round_trip(original, CACHE_TYPES[f"{family}{bits}"])
        squared = np.square(lost, dtype=np.float64).sum(axis=(0, 2))
        errors.append(np.divide(squared, energy, out=np.zeros(n_head), where=energy > 0))
    return np.stack(errors)
