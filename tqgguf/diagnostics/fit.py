"""The longest context that fits a memory, beside weights, recurrent states and compute buffers.

Nothing is loaded. The size of the KV cache is computed from the header, compute buffers come from llama.cpp's own plan
(`plan`), and the plan of every context is checked against the computed size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache as cache_results
from pathlib import Path
from typing import Any, Final

from .._native import library_path
from ..cache.calibration import default_choice
from ..cache.policy import CachePolicy, PolicySpec, resolve
from ..cache.tail import check_tail
from ..config import FIT_CACHES
from ..errors import ArgumentError, TqggufError
from ..gguf.header import read_header
from ..gguf.info import CELL_PADDING, ModelInfo
from ..model.calibrate import calibrated_by_default
from .plan import ContextPlan, PlannedModel, Setup, planned_model

MAX_SEQUENCES: Final = 256
"""LLAMA_MAX_SEQ of llama.cpp."""

FIRST_LOOK: Final = 2**18
"""Tokens of the first context to plan, unless fewer are wanted."""

_MEASURED: Final = Path(__file__).with_name("measured.json")
"""Written by `benchmarks/real_models.py tables`."""

KEPT_ON_CPU: Final = "this build has no CUDA backend, so caches of tqgguf's types are counted in main memory"
STOCK_TAIL: Final = "the tail of stock types is for the CPU, so caches that have one are counted in main memory"


@dataclass(frozen=True)
class FitRow:
    """One cache and its longest context. Sizes in bytes, at that context.

    Attributes:
        cache: name of the type, "K/V" for a pair, or the policy file.
        obstacle: why the model cannot have this cache, or None.
        n_ctx: tokens of the longest context, over all sequences; 0 if none fits.
        plan: KV cache, recurrent states and compute buffers; of the shortest context if none fits; None if there is an
            obstacle.
        n_gpu_layers: layers in video memory, including the output layer; 0 without video memory.
        memory: bytes of main memory used, weights included.
        vram: bytes of video memory used.
        kld: median KL divergence from f16, in nats, on each model of `Fit.measured`, with tail and calibration as
            `Llama` gives them; None if that was not measured.
    """

    cache: str
    obstacle: str | None
    n_ctx: int
    plan: ContextPlan | None
    n_gpu_layers: int
    memory: int
    vram: int
    kld: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Measured:
    """What the divergences of caches were measured on.

    Attributes:
        models: names of the models.
        text: name of the text.
        n_ctx: tokens of a chunk.
    """

    models: tuple[str, ...]
    text: str
    n_ctx: int


@dataclass(frozen=True)
class Fit:
    """The contexts that fit a memory.

    Attributes:
        info: the contents of the model's header.
        weights: bytes of all weights.
        memory: bytes of main memory that may be used.
        vram: bytes of video memory that may be used; 0 for none.
        n_ctx: tokens wanted; by default the trained context, once for each sequence.
        setup: layout of the cache.
        rows: one for each cache, in the order of preference.
        recommended: the first row whose context is as long as wanted; if there is none, the row with the longest
            context; None if nothing fits.
        reason: the reason of the recommendation, in words.
        measured: what the rows' `kld` was measured on: not on this model.
        notes: limits of the figures that a reader should know.
    """

    info: ModelInfo
    weights: int
    memory: int
    vram: int
    n_ctx: int
    setup: Setup
    rows: tuple[FitRow, ...]
    recommended: FitRow | None
    reason: str
    measured: Measured
    notes: tuple[str, ...]


def fit(
    path: str | Path,
    memory: int,
    *,
    vram: int = 0,
    n_ctx: int | None = None,
    n_seq: int = 1,
    unified: bool = False,
    swa_full: bool = True,
    caches: Sequence[PolicySpec] = FIT_CACHES,
    tail: int | None = None,
) -> Fit:
    """Finds the longest context that fits for each cache, with the settings of `tqgguf.Llama`.

    A context is never longer than wanted. Not counted are the program itself (50 to 100 MB) and copies of weights that
    llama.cpp rearranges for a CPU while the file stays mapped.

    Args:
        path: a GGUF file.
        memory: bytes of main memory.
        vram: bytes of video memory. As many layers as fit go there, weights and KV cache, the last ones first, as with
            `n_gpu_layers`; a KV cache of tqgguf's types only if this build has a CUDA backend, and one of stock types
            with a tail not at all. Compute buffers are counted on both sides. No GPU is asked: these figures are an
            estimate.
        n_ctx: tokens wanted, over all sequences; None means the trained context for each sequence.
        n_seq: sequences.
        unified: whether the sequences share one cache, instead of a part for each.
        swa_full: whether layers with a sliding window keep all tokens, which is the default of `Llama`.
        caches: as for `Llama`, in the order of preference.
        tail: as for `Llama`.

    Raises:
        ArgumentError: the weights alone exceed the memory, or a number is out of its range.
        CacheTypeError: none of the caches can be used with this model.
        ModelFileError: the file is not GGUF, is truncated, or lacks keys that its architecture requires.
        OutOfMemoryError: the context has more cells (52 bytes each) than this machine can list.
        TqggufError: llama.cpp could not open the model or plan a context; the message carries its errors.
    """
    check_tail(tail)
    if isinstance(caches, str) or not isinstance(caches, Sequence):
        raise ArgumentError(f"caches is {caches!r}, must be a list")
    for name, value, low, high in (
        ("memory", memory, 1, 2**63 - 1),
        ("vram", vram, 0, 2**63 - 1),
        ("n_seq", n_seq, 1, MAX_SEQUENCES),
        ("n_ctx", n_seq if n_ctx is None else n_ctx, n_seq, 2**31 - CELL_PADDING),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ArgumentError(f"{name} is {value!r}, must be an integer between {low} and {high}")
    setup = Setup(tail, n_seq, unified, swa_full)
    with planned_model(path) as model:
        info = model.info
        if model.weights > memory + vram:
            raise ArgumentError(
                f"the weights of {info.path.name} alone take {model.weights:,} bytes, more than the {memory + vram:,} "
                f"bytes given: give more memory, or take a smaller quantization of this model"
            )
        trained = min(info.n_ctx_train * n_seq, 2**31 - CELL_PADDING)
        wanted = trained if n_ctx is None else n_ctx
        fitter = _Fitter(model, setup, memory, vram, wanted)
        data = json.loads(_MEASURED.read_text(encoding="utf-8"))
        measured = Measured(tuple(data["models"]), data["text"], data["n_ctx"])
        rows = tuple(replace(fitter.row(cache), kld=_kld(info, cache, tail, data)) for cache in caches)
        recommended, reason = _recommend(rows, wanted)
        notes = tuple(sorted(fitter.notes))
        return Fit(info, model.weights, memory, vram, wanted, setup, rows, recommended, reason, measured, notes)


def _kld(info: ModelInfo, cache: PolicySpec, tail: int | None, data: Any) -> tuple[float, ...] | None:
    """What was measured of a cache, with tail and calibration as `Llama` gives them; None if nothing was."""
    policy = resolve(cache, info.n_layer)
    kept = policy.kept(tail)
    calibrated = default_choice() == "auto" and calibrated_by_default(info, policy)
    label = policy.words + (f"+{kept}" if kept else "") + (" calibrated" if calibrated else "")
    found = data["median_kld"].get(label)
    return None if found is None else tuple(found)


def _recommend(rows: Sequence[FitRow], wanted: int) -> tuple[FitRow | None, str]:
    usable = [row for row in rows if row.n_ctx]
    if not usable:
        return None, "no cache fits, not even with the shortest context"
    for row in usable:
        if row.n_ctx >= wanted:
            return row, f"the first in this order with which {wanted:,} tokens fit"
    return max(usable, key=lambda row: row.n_ctx), f"{wanted:,} tokens fit with none; this one has the longest context"


class _Fitter:
    def __init__(self, model: PlannedModel, setup: Setup, memory: int, vram: int, most: int) -> None:
        self.model, self.info, self.setup = model, model.info, setup
        self.memory, self.vram, self.most = memory, vram, most
        self.notes: set[str] = set()
        self.layers, self.copied = _layer_weights(model.info, model.weights) if vram else ([], 0)

    def row(self, cache: PolicySpec) -> FitRow:
        policy = resolve(cache, self.info.n_layer)
        name = policy.words or str(cache)
        same = None if policy.ranges else policy.uniform
        obstacle = self.info.obstacle(*same) if same else policy.obstacle(self.info)
        if obstacle:
            return FitRow(name, obstacle, 0, None, 0, 0, 0)
        placed = cache_results(lambda n: self.place(name, policy, n))
        n_ctx = _longest(self.most, lambda n: placed(n).memory - self.memory)
        return replace(placed(n_ctx or max(CELL_PADDING, self.setup.n_seq)), n_ctx=n_ctx)

    def place(self, name: str, policy: CachePolicy, n_ctx: int) -> FitRow:
        """The output and then as many of the last layers as fit go into video memory."""
        plan = self.model.context(policy, n_ctx, self.setup)
        everything = self.model.weights + plan.bytes
        if not self.vram:
            return FitRow(name, None, n_ctx, plan, 0, everything, 0)
        caches = dict.fromkeys(range(len(self.layers)), 0)
        if policy.kept_by_stock(self.setup.tail):
            self.notes.add(STOCK_TAIL)
        elif policy.ours and not library_path("ggml-cuda").is_file():
            self.notes.add(KEPT_ON_CPU)
        else:
            for layer in self.info.layers:
                one = replace(self.info, layers=(layer,))
                caches[layer.index] = self.setup.cache_bytes(one, policy, n_ctx)
        moved, count = 0, 0
        for index in reversed(caches):
            if plan.compute + moved + self.layers[index] + caches[index] > self.vram:
                break
            moved, count = moved + self.layers[index] + caches[index], count + 1
        if not count:
            return FitRow(name, None, n_ctx, plan, 0, everything, 0)
        return FitRow(name, None, n_ctx, plan, count, everything - moved + self.copied, plan.compute + moved)


def _longest(most: int, over: Callable[[int], int]) -> int:
    """The longest context, `most` or a multiple of CELL_PADDING, that is not over the budget; 0 if there is none.

    Contexts that are much longer than the budget allows are not planned, because llama.cpp lists all cells of a plan.

    Args:
        most: tokens of the longest context wanted.
        over: bytes over the budget for a number of tokens; they grow nearly in proportion.
    """

    def at(unit: int) -> tuple[int, int]:
        return unit, over(min(unit * CELL_PADDING, most))

    last = -(-most // CELL_PADDING)
    first = min(last, FIRST_LOOK // CELL_PADDING)
    old = new = at(first)
    if new[1] <= 0 and first == last:
        return most
    if first > 1:
        old = at(1)
    if old[1] > 0:
        return 0
    low, high = (1, first) if new[1] > 0 else (first, last + 1)
    turn = 0
    while high - low > 1:
        # The next guess is where a straight line through the last two crosses the budget, but at most four times a
        # context that fits. Every fourth guess is the middle, in case the bytes do not grow in a straight line.
        turn += 1
        guess, rise = (low + high) // 2, new[1] - old[1]
        if turn % 4 and rise:
            guess = old[0] - old[1] * (new[0] - old[0]) // rise
        old, new = new, at(max(min(guess, max(4 * low, first), high - 1), low + 1))
        low, high = (new[0], high) if new[1] <= 0 else (low, new[0])
    return min(low * CELL_PADDING, most)


# ---- Video memory ----


def _layer_weights(info: ModelInfo, total: int) -> tuple[list[int], int]:
    """Bytes of weights of each layer, those of the output last; and bytes of the output that are in both memories.

    The token embedding stays in main memory. If the output is the token embedding, video memory gets a copy.
    """
    header = read_header(info.path)
    if sum(tensor.bytes for tensor in header.tensors) < 0.9 * total:
        raise TqggufError(f"{info.path.name} is split over several files, or of types unknown here: leave --vram out")
    sizes = [0] * (info.n_layer + 1)
    copied = 0
    names = {tensor.name for tensor in header.tensors}
    for tensor in header.tensors:
        name, size = tensor.name, tensor.bytes
        kind, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        if kind == "blk" and number.isdecimal() and len(number) < 5 and int(number) < info.n_layer:
            sizes[int(number)] += size
        elif name.startswith("output"):
            sizes[-1] += size
        elif name == "token_embd.weight" and "output.weight" not in names:
            copied = size
    sizes[-1] += copied
    return sizes, copied
