"""Finds a cache policy: which type each layer stores K and V in, within a budget of bits or of divergence.

The text is cut into chunks as in `compare`. The first half is the tuning part. One reading of its first chunk predicts
how much each type distorts the residual stream behind each layer's attention (`distortion`). What such an error does to
the model's predictions is measured by bands of layers: K or V of a band has the smallest type, and everything else is
f16. The divergence of a band is shared out among its layers and types in proportion to their distortion, and
`allocation` makes a policy of these figures. The second half, held out, compares the policy with single types.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from .._util import check_count
from ..cache.calibration import Calibration
from ..cache.policy import CachePolicy, model_hash, refuse_impossible, resolve
from ..cache.tail import DEFAULT_TAIL, check_tail
from ..config import CacheType, cache_type
from ..errors import ArgumentError, TextError, UnsupportedError
from ..gguf.info import ModelInfo, read_model_info
from ..model.calibrate import calibrated_by_default, chosen_calibration
from ..model.control import Progress
from ..model.llama import Llama
from ..model.reading import AttentionInputs, read_attention
from .allocation import Option, allocate, allocations
from .capture import loaded
from .compare import (
    Array,
    CountProgress,
    NamedCache,
    Reader,
    TypeQuality,
    context_length,
    further_context,
    load,
    read_chunks,
    standard_error,
    untrained_notes,
)
from .distortion import distortions, storages
from .texts import chosen_text, text_chunks

CANDIDATE_TYPES: Final = ("pqt3", "pqt4", "q8_0")
"""The types that `tune` chooses from by default: the most precise ones at 3.5 and 4.5 bits, and one for parts that need
more. pqo3 and pqo4 take the same bytes and less time, but cost more divergence."""

TUNING_CHUNKS: Final = 2
"""Chunks that are read by default, both parts together."""

READ_TOKENS: Final = 2048
"""Tokens of the first chunk that distortions are computed from at most: one batch, whose buffers grow with their
number."""

OTHER_UBATCH: Final = 60
"""Tokens at once of the f16 cache that says what any change costs. llama.cpp's flash attention rounds in another way
below 64 of them; 128 give what the reference's 512 give, or a hundredth of the divergence."""

BAND_ENDS: Final = (1 / 6, 1 / 2, 1)
"""Where the bands of layers end that are measured for each side, of all layers. Predictions are least sure of the first
layers, whose errors pass through all others, so these bands are smaller."""

N_TRIALS: Final = 5
"""Policies that are tried at most to find the smallest one of a divergence."""

Chunks = npt.NDArray[np.int32]
Distortions = Mapping[tuple[int, str, str], float]
"""By layer, side and type."""


@dataclass(frozen=True)
class Band:
    """What the smallest type costs K or V of some layers together, measured on the tuning part of the text.

    Attributes:
        side: "K" or "V".
        layers: numbers of the layers.
        type: name of the type.
        kld: mean KL divergence from f16 if only this part of the cache has this type, in nats, less `Tuning.floor`.
        error: its standard error, over tokens.
        distortion: sum of the distortions of its layers.
    """

    side: str
    layers: tuple[int, ...]
    type: str
    kld: float
    error: float
    distortion: float


@dataclass(frozen=True)
class Sensitivity:
    """What one type is predicted to cost one part of the cache.

    Attributes:
        layer: number of the layer.
        side: "K" or "V".
        type: name of the type.
        distortion: squared error of the residual stream behind the layer's attention, relative to its squares.
        kld: distortion times what a unit of it costs in the layer's band (`cost`): how much mean KL divergence this
            part of the cache adds if it has this type, in nats.
    """

    layer: int
    side: str
    type: str
    distortion: float
    kld: float


@dataclass(frozen=True)
class Tuning:
    """A policy and how it was found.

    Attributes:
        model: name of the model's file.
        policy: the policy, tied to the model.
        budget: bits per value that the policy could use, or None.
        max_kld: limit of the mean KL divergence on the held-out part, in nats, or None.
        types: names of the types to choose from, smallest first.
        tail: newest tokens kept in f16 in all measurements, where a cache has a tail.
        n_ctx: tokens in a chunk.
        n_tuning: chunks of the tuning part, which are the first ones.
        n_held_out: chunks of the held-out part, which follow.
        floor: mean KL divergence of an f16 cache that computes other numbers of tokens at once, in nats: what any
            change costs, because rounding falls out differently.
        bands: measurements of K and V of some layers together.
        sensitivities: predictions for every part and type.
        predicted: mean KL divergence of the policy if the divergences in `sensitivities` and the floor add up, in nats.
        measured: mean KL divergence of the policy on the tuning part, in nats.
        rows: figures on the held-out part: f16, the reference; "policy"; and single types in all layers, calibrated if
            the policy is, smallest first; within a budget up to the first that is no smaller than the policy.
        line: mean KL divergence of single types at the policy's bits: of the best single type with the same bits, or
            on the line through the two nearest ones, in bits and the logarithm of divergence; None outside of them.
        notes: limits of the policy that a reader should know.
    """

    model: str
    policy: CachePolicy
    budget: float | None
    max_kld: float | None
    types: tuple[str, ...]
    tail: int
    n_ctx: int
    n_tuning: int
    n_held_out: int
    floor: float
    bands: tuple[Band, ...]
    sensitivities: tuple[Sensitivity, ...]
    predicted: float
    measured: float
    rows: tuple[TypeQuality, ...]
    line: float | None
    notes: tuple[str, ...]


def tune(
    path: str | Path,
    text: str | None = None,
    *,
    budget: float | None = None,
    max_kld: float | None = None,
    types: Sequence[str] = CANDIDATE_TYPES,
    tail: int | None = None,
    n_ctx: int | None = None,
    n_chunks: int | None = None,
    n_batch: int = 512,
    n_threads: int | None = None,
    n_parallel: int = 8,
    calibration: Calibration | str | Path | None = None,
    progress: Progress | None = None,
) -> Tuning:
    """Measures a model's layers and makes a policy for its cache.

    The keys of all quantized layers are calibrated first, so that the policy has means and gains of its own.

    With a budget, the result is the policy made from sensitivities, or the single type within the budget that is
    predicted to be best: what is better on the tuning part. If it is the single type, a note says so.

    With max_kld, types grow from the smallest ones in the order of gain per byte. The result is the smallest of at most
    five policies tried on this way whose divergence on the held-out part, which decides nothing else, is at most it.

    The tuning part is read 11 times, for any model (docs/quality.md says by which caches); with max_kld 10 times, and
    the held-out part twice for each policy tried. Memory is that of `compare` with n_parallel + 1 caches.

    Args:
        path: a GGUF file.
        text: the text to read, as for `compare`; at least two chunks.
        budget: bits per value, averaged over the whole cache (`CachePolicy.bits`).
        max_kld: largest mean KL divergence from f16 on the held-out part, in nats. Give either this or a budget.
        types: names of at least two cache types to choose from.
        tail: newest tokens kept in f16, as for `Llama`; the policy should be used with the same tail.
        n_ctx: tokens in a chunk, as for `compare`.
        n_chunks: chunks to read at most, both parts together; None means TUNING_CHUNKS.
        n_batch: tokens per call of llama.cpp.
        n_threads: threads; None means the number of processors.
        n_parallel: caches read at once, beside the reference; below 7 the reference is read more often.
        calibration: of the keys, as for `Llama`; "off" leaves them as they are.
        progress: called after every batch with the name of the step, tokens read and tokens in all, over all caches.

    Raises:
        ArgumentError: both or neither of budget and max_kld, or one that no policy reaches; fewer than two types, one
            unknown or given twice; a number out of its range; no text, but for the demo model.
        CalibrationError: as `Llama`.
        TextError: the text is empty or has fewer than two chunks.
        CacheTypeError: the model cannot have one of the types.
        UnsupportedError: the model has no KV cache, keeps V within K (MLA), or does not run flash attention.
        TqggufError: as `compare`.
    """
    kinds = _kinds(types)
    for name, value, least in (("n_batch", n_batch, 1), ("n_parallel", n_parallel, 1), ("n_chunks", n_chunks, 2)):
        if value is not None:
            check_count(name, value, least)
    check_tail(tail)
    info = read_model_info(path)
    _refuse_untunable(info, kinds)
    _check_goal(budget, max_kld, kinds, info)
    n_ctx, n_chunks = context_length(info, n_ctx), n_chunks or TUNING_CHUNKS
    own, text = text is None, chosen_text(info, text, n_ctx, n_chunks)
    calibration = _calibration(info, kinds, calibration, n_threads, progress)
    f16 = NamedCache("f16", resolve("f16", info.n_layer))
    with contextlib.closing(load(path, f16, n_ctx, n_threads, n_batch=n_batch, swa_full=False)) as model:
        halves = _halves(text_chunks(model, text, n_ctx, n_chunks, own))
        bench = _Bench(model, f16, *halves, calibration, tail, n_parallel, progress)
        return _Tuner(bench, [kind.name for kind in kinds]).run(budget, max_kld)


def _calibration(
    info: ModelInfo,
    kinds: Sequence[CacheType],
    choice: Calibration | str | Path | None,
    n_threads: int | None,
    progress: Progress | None,
) -> Calibration | None:
    """The calibration that was chosen, or that a cache of one of the types has by default."""
    if choice is None and not any(calibrated_by_default(info, resolve(kind.name, info.n_layer)) for kind in kinds):
        return None
    report = partial(progress, "calibrating") if progress else None
    return chosen_calibration(info, choice, n_threads=n_threads, progress=report)


def _refuse_untunable(info: ModelInfo, kinds: Sequence[CacheType]) -> None:
    if not info.layers or info.mla:
        reason = "keeps V within K (MLA)" if info.mla else "has no KV cache"
        raise UnsupportedError(f"{info.path.name}: architecture {info.architecture} {reason}; nothing to tune")
    for kind in kinds:
        refuse_impossible(info, resolve(kind.name, info.n_layer))


def _halves(chunks: Chunks) -> tuple[Chunks, Chunks]:
    """The tuning part and the held-out part of a text."""
    if len(chunks) < 2:
        raise TextError(
            f"the text has less than two chunks of {chunks.shape[1]:,} tokens, one to tune on and one held out: "
            f"give a longer text or a shorter context"
        )
    n_tuning = (len(chunks) + 1) // 2
    return chunks[:n_tuning], chunks[n_tuning:]


def cost(band: Band, bands: Collection[Band]) -> float:
    """The divergence for each unit of distortion in a band.

    Beside a tail of f16 a band may cost less than the error of its measurement. Its figure is weighed against that of
    all bands together, from which bands are taken to differ by as much as it is; it is no less than its error.
    """
    unit = max(sum(each.distortion for each in bands), 1e-30)
    common = max(sum(each.kld for each in bands), band.error) / unit
    own, error = (value / max(band.distortion, 1e-30) for value in (band.kld, band.error))
    weight = common**2 / max(common**2 + error**2, 1e-30)
    return max(weight * own + (1 - weight) * common, min(error, common))


def log_line(a: tuple[float, float], b: tuple[float, float], bits: float) -> float:
    """Divergence at `bits` on the line through a and b, each (bits, divergence), in bits and log divergence."""
    share = (bits - a[0]) / (b[0] - a[0])
    return math.exp((1 - share) * math.log(a[1]) + share * math.log(b[1]))


def _kinds(names: Sequence[str]) -> tuple[CacheType, ...]:
    """The types to choose from, smallest first."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ArgumentError(f"types is {names!r}, must be a list of cache types")
    kinds = tuple(cache_type(name) for name in names)
    twice = sorted({kind.name for kind in kinds if kinds.count(kind) > 1})
    if twice:
        raise ArgumentError(f"cache type {', '.join(twice)} is given twice")
    if len(kinds) < 2:
        raise ArgumentError("tuning needs at least two cache types to choose from")
    return tuple(sorted(kinds, key=lambda kind: kind.bits))


def _check_goal(budget: float | None, max_kld: float | None, kinds: Sequence[CacheType], info: ModelInfo) -> None:
    if (budget is None) == (max_kld is None):
        raise ArgumentError(
            "give a budget in bits per value or a largest mean KLD, "
            + ("not both" if budget is not None else "one of the two")
        )
    for name, value in (("budget", budget), ("max_kld", max_kld)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ArgumentError(f"{name} is {value!r}, must be a positive number")
    least = resolve(kinds[0].name, info.n_layer).bits(info)
    if budget is not None and budget < least:
        raise ArgumentError(
            f"no policy has {budget:g} bits per value: {kinds[0].name}, "
            f"the smallest of {', '.join(kind.name for kind in kinds)}, has {least:g}"
        )


@dataclass(frozen=True)
class _Bench:
    """A loaded model, the two parts of the text, (n_chunks, n_ctx) tokens each, and what all caches have in common."""

    model: Llama
    f16: NamedCache
    tuning: Chunks
    held_out: Chunks
    calibration: Calibration | None
    tail: int | None
    n_parallel: int
    progress: Progress | None

    def named(self, label: str, policy: CachePolicy) -> NamedCache:
        """A cache to measure, calibrated and with the common tail."""
        if self.calibration:
            policy = self.calibration.applied(policy, self.model.model_info)
        return NamedCache(label, policy, self.tail)

    def read(self, title: str, caches: Sequence[NamedCache], chunks: Chunks) -> list[Reader]:
        """The readers of the reference and of every cache, after they have read the chunks."""
        done: list[Reader] = []
        groups = [caches[i : i + self.n_parallel] for i in range(0, len(caches), self.n_parallel)]
        total = chunks.size * (len(groups) + len(caches))
        before = 0
        for group in groups:
            with contextlib.ExitStack() as stack:
                readers = [Reader(self.f16, self.model.ctx)]
                readers += [Reader(cache, stack.enter_context(further_context(self.model, cache))) for cache in group]
                read_chunks(self.model, readers, chunks, self._from(title, before, total))
            before += chunks.size * len(readers)
            done += readers[1:] if done else readers
        return done

    def klds(self, title: str, caches: Sequence[NamedCache]) -> list[Array]:
        """The divergence of every cache at each scored token of the tuning part, (n_scored)."""
        return [np.concatenate(reader.kld) for reader in self.read(title, caches, self.tuning)[1:]]

    def qualities(self, title: str, caches: Sequence[NamedCache]) -> list[TypeQuality]:
        """The figures of the reference and of every cache on the held-out part."""
        readers = self.read(title, caches, self.held_out)
        return [reader.quality(self.model.model_info, self.held_out.shape[1], self.held_out.size) for reader in readers]

    def _from(self, title: str, before: int, total: int) -> CountProgress | None:
        report = self.progress
        return (lambda done, _: report(title, before + done, total)) if report else None


class _Tuner:
    """The steps of `tune`, on one bench."""

    def __init__(self, bench: _Bench, names: Sequence[str]) -> None:
        self.bench = bench
        self.info = bench.model.model_info
        self.notes = untrained_notes(self.info, bench.tuning.shape[1])
        if not self.info.exact:
            self.notes.append(f"bits are of the layers known: {'; '.join(self.info.notes)}")
        self.hash = model_hash(self.info)
        self.names = tuple(names)
        self.single = [bench.named(name, resolve(name, self.info.n_layer)) for name in names]
        # llama.cpp rotates V of stock types unless a layer has a type of tqgguf; K, too, unless it is calibrated.
        self.rotate = not any(cache.policy.ours for cache in self.single)
        # Parts of the cache, in the order of `options`.
        self.parts = [(layer.index, side) for layer in self.info.layers for side in "KV"]

    def run(self, budget: float | None, max_kld: float | None) -> Tuning:
        single: list[TypeQuality] = []
        if max_kld is not None:  # a goal that cannot be reached is refused before minutes are spent
            single = self.bench.qualities("single types", self.single)
            self._refuse_below_largest(single, max_kld)
        distortion = self._distortions()
        floor, bands = self._bands(distortion)
        sensitivities = self._sensitivities(distortion, bands)
        options = self._options(sensitivities)
        if budget is not None:
            policy, measured = self._within(budget, options, sensitivities)
        else:
            assert max_kld is not None
            policy = self._smallest(max_kld, options, floor, single)
            measured = self._klds("policy on the tuning part", [policy])[0]
        tail = DEFAULT_TAIL if self.bench.tail is None else self.bench.tail
        policy = replace(policy, policy=replace(policy.policy, model_hash=self.hash, tail=tail))
        rows = self.bench.qualities("held-out part", [policy, *([] if single else self._beside(policy))])
        rows += single[1:]
        line = self._judge(rows[1], rows[2:])
        return Tuning(
            model=self.info.path.name,
            policy=policy.policy,
            budget=budget,
            max_kld=max_kld,
            types=self.names,
            tail=tail,
            n_ctx=self.bench.tuning.shape[1],
            n_tuning=len(self.bench.tuning),
            n_held_out=len(self.bench.held_out),
            floor=floor,
            bands=bands,
            sensitivities=sensitivities,
            predicted=floor + self._predicted(policy.policy, sensitivities),
            measured=measured,
            rows=tuple(rows),
            line=line,
            notes=tuple(self.notes),
        )

    # ---- What parts cost ----

    def _distortions(self) -> Distortions:
        """The distortion of every part in every type, from one reading of the first chunk."""
        layers = {layer.index: layer for layer in self.info.layers}
        stored = storages([cache.policy for cache in self.single], self.rotate, self.bench.tail)
        done = 0

        def read(inputs: AttentionInputs) -> dict[tuple[str, str], float]:
            nonlocal done
            found = distortions(inputs, layers[inputs.layer], stored)
            done += 1
            if self.bench.progress:
                self.bench.progress("distortion of layers", done, len(layers))
            return found

        tokens = self.bench.tuning[0, :READ_TOKENS].tolist()
        found = read_attention(loaded(self.bench.model), tokens, list(layers), read, cache="f16", branches=True)
        return {(layer, *part): value for layer, of_layer in found.items() for part, value in of_layer.items()}

    def _bands(self, distortion: Distortions) -> tuple[float, tuple[Band, ...]]:
        """The divergence of any change at all, and of K and V of bands of layers in the smallest type."""
        smallest, layers = self.names[0], np.array([layer.index for layer in self.info.layers])
        parts = np.split(layers, [max(1, round(end * len(layers))) for end in BAND_ENDS[:-1]])
        groups = [(side, tuple(part.tolist())) for side in "KV" for part in parts if len(part)]
        caches = [replace(self.bench.f16, n_ubatch=OTHER_UBATCH)]
        for side, group in groups:
            cache = self._cache({(layer, side): smallest for layer in group}, rest="f16")
            # Behind a calibration K is rotated by layer, as it will be in the policy.
            caches.append(replace(cache, rotate=self.rotate or cache.policy.calibrated))
        floor, *klds = self.bench.klds("bands of layers", caches)
        bands = []
        for (side, group), kld in zip(groups, klds, strict=True):
            total = sum(distortion[layer, side, smallest] for layer in group)
            bands.append(Band(side, group, smallest, float((kld - floor).mean()), standard_error(kld - floor), total))
        return float(floor.mean()), tuple(bands)

    def _sensitivities(self, distortion: Distortions, bands: Collection[Band]) -> tuple[Sensitivity, ...]:
        costs = {(layer, band.side): cost(band, bands) for band in bands for layer in band.layers}
        every = [(layer, side, name) for layer, side in self.parts for name in self.names]
        return tuple(Sensitivity(*part, distortion[part], costs[part[:2]] * distortion[part]) for part in every)

    def _options(self, sensitivities: Collection[Sensitivity]) -> list[list[Option]]:
        """The options of each part, in the order of `parts`, which is that of the sensitivities too."""
        sizes = {("K", x.index): x.n_head_kv * x.head_dim_k for x in self.info.layers}
        sizes |= {("V", x.index): x.n_head_kv * x.head_dim_v for x in self.info.layers}
        return [
            [Option(s.type, cache_type(s.type).row_bytes(sizes[s.side, s.layer]), s.kld) for s in group]
            for _, group in groupby(sensitivities, key=lambda s: (s.layer, s.side))
        ]

    # ---- The policy ----

    def _within(
        self, budget: float, options: Sequence[Sequence[Option]], sensitivities: Collection[Sensitivity]
    ) -> tuple[NamedCache, float]:
        """The best policy within a budget of bits per value, and its mean divergence on the tuning part."""
        # Rounding must not take a byte away from a budget that is met exactly.
        n_bytes = math.floor(budget * self.info.values_per_token / 8 + 1e-6)
        fits = [cache for cache in self.single if cache.policy.bytes_per_token(self.info) <= n_bytes]
        single = min(fits, key=lambda cache: self._predicted(cache.policy, sensitivities))
        cache = self._chosen(allocate(options, n_bytes))
        of_policy, of_single = self._klds("policies", [cache, single])
        if of_policy <= of_single:
            return cache, of_policy
        found = f"no mixture of types measured better than {single.label} in all layers, so that is the policy"
        self.notes.append(found)
        return replace(single, label="policy"), of_single

    def _smallest(
        self, max_kld: float, options: Sequence[Sequence[Option]], floor: float, single: Sequence[TypeQuality]
    ) -> NamedCache:
        """The smallest policy found whose divergence on the held-out part is at most max_kld.

        Args:
            single: figures of the reference and the single types on the held-out part; at least one single type must
                have a divergence of at most max_kld.
        """
        way = list(allocations(options))
        predicted = [floor + sum(option.kld for option in chosen) for chosen in way]
        low, high = -1, len(way)  # way[high] is good, or beyond the end
        factor = single[1].kld.mean / predicted[0]  # what is measured for each nat that is predicted
        for _ in range(N_TRIALS):
            if high - low < 2:
                break
            expected = next((i for i, kld in enumerate(predicted) if factor * kld <= max_kld), len(way))
            trial = min(max(expected, low + 1), high - 1)
            kld = self.bench.qualities("policies", [self._chosen(way[trial])])[1].kld.mean
            factor = kld / predicted[trial]
            low, high = (low, trial) if kld <= max_kld else (trial, high)
        good_types = [row for row in single if row.type in self.names and row.kld.mean <= max_kld]
        smallest = min(good_types, key=lambda row: row.bytes_per_token)
        if high < len(way):
            found = self._chosen(way[high])
            if found.policy.bytes_per_token(self.info) <= smallest.bytes_per_token:
                return found
        self.notes.append(f"no smaller mixture of types does it than {smallest.type} in all layers")
        return replace(next(cache for cache in self.single if cache.label == smallest.type), label="policy")

    def _refuse_below_largest(self, single: Sequence[TypeQuality], max_kld: float) -> None:
        least = min((row for row in single if row.type in self.names), key=lambda row: row.kld.mean)
        if least.kld.mean > max_kld:
            raise ArgumentError(
                f"no policy of {', '.join(self.names)} has a mean KLD of {max_kld:g}: "
                f"{least.type} in all layers has {least.kld.mean:.3g}"
            )

    def _beside(self, policy: NamedCache) -> list[NamedCache]:
        """The single types that a policy is compared with: those that are smaller, and the next."""
        bits = [cache.policy.bits(self.info) for cache in self.single]
        most = min((each for each in bits if each >= policy.policy.bits(self.info)), default=math.inf)
        return [cache for cache, each in zip(self.single, bits, strict=True) if each <= most]

    def _judge(self, policy: TypeQuality, single: Sequence[TypeQuality]) -> float | None:
        """Returns `Tuning.line` and notes how the policy compares with it."""
        same = [row for row in single if row.bits <= policy.bits and row.kld.mean < policy.kld.mean]
        if same:
            self.notes.append(
                f"on the held-out part {same[0].type} in all layers is better and not larger: use that instead"
            )
        best = {row.bits: row.kld.mean for row in sorted(single, key=lambda row: -row.kld.mean)}
        if policy.bits in best:
            return best[policy.bits]
        below = max((bits for bits in best if bits < policy.bits), default=None)
        above = min((bits for bits in best if bits > policy.bits), default=None)
        if below is None or above is None or not min(best[below], best[above]) > 0:
            return None
        line = log_line((below, best[below]), (above, best[above]), policy.bits)
        if policy.kld.mean > line:
            self.notes.append(
                f"the policy lies above the line between single types of {below:g} and {above:g} bits: "
                f"by layers there is little to gain in this model"
            )
        return line

    def _predicted(self, policy: CachePolicy, sensitivities: Collection[Sensitivity]) -> float:
        """The sum of the divergences of a policy's parts."""
        chosen = {"K": policy.types_k, "V": policy.types_v}
        return sum(s.kld for s in sensitivities if chosen[s.side][s.layer] == s.type)

    def _klds(self, title: str, caches: Sequence[NamedCache]) -> list[float]:
        """The mean divergence of every cache on the tuning part."""
        return [float(kld.mean()) for kld in self.bench.klds(title, caches)]

    def _chosen(self, options: Sequence[Option]) -> NamedCache:
        """The policy with an option for each part."""
        return self._cache({part: option.type for part, option in zip(self.parts, options, strict=True)}, self.names[0])

    def _cache(self, types: Mapping[tuple[int, str], str], rest: str) -> NamedCache:
        """A policy with the types of some parts (layer, side), and one type everywhere else."""
        k, v = (tuple(types.get((i, side), rest) for i in range(self.info.n_layer)) for side in "KV")
        return self.bench.named("policy", CachePolicy(k, v))
