"""Measures a cache policy: which type each layer stores K and V in, within a budget of bits or of divergence.

The text is cut into chunks as in `compare`. The first half, the tuning part, measures what each type costs if K or V of
one layer has that type and everything else is f16, and whether it costs less to store the keys of a layer less their
mean. `allocation` makes a policy of these figures. The second half, held out, compares the policy with single types.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from .._util import check_count
from ..cache.policy import CachePolicy, model_hash, refuse_impossible, resolve
from ..cache.tail import DEFAULT_TAIL, check_tail
from ..config import CacheType, cache_type
from ..errors import ArgumentError, TextError, UnsupportedError
from ..gguf.info import ModelInfo, read_model_info
from ..model.control import Progress
from ..model.llama import Llama
from .allocation import Option, allocate, allocations
from .capture import mean_keys
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
)
from .texts import DEFAULT_CHUNKS, chosen_text, text_chunks

CANDIDATE_TYPES: Final = ("pqt3", "pqt4", "q8_0")
"""The types that `tune` chooses from by default: the most precise ones at 3.5 and 4.5 bits, and one for parts that need
more. pqo3 and pqo4 take the same bytes and less time, but cost more divergence."""

BASELINE_TYPES: Final = ("pqo3", "pqo4")
"""Types that are always measured beside the policy, each in all layers."""

MEAN_TOKENS: Final = 2048
"""Tokens of the first chunk that mean keys are taken from at most: one batch, whose buffers grow with their number."""

Chunks = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]
Means = Mapping[int, F32]
"""By layer, (n_head_kv, head_dim_k)."""


@dataclass(frozen=True)
class Sensitivity:
    """What one type costs one part of the cache, on the tuning part of the text.

    Attributes:
        layer: number of the layer.
        side: "K" or "V".
        type: name of the type.
        centred: whether keys were stored less their mean.
        kld: mean KL divergence from f16 if only this part of the cache has this type, in nats.
    """

    layer: int
    side: str
    type: str
    centred: bool
    kld: float


@dataclass(frozen=True)
class Centring:
    """What centring does to the keys of one layer, with K of that layer alone in one type.

    Attributes:
        layer: number of the layer.
        type: name of the type: the smallest, and each other type in layers where centring helps the smallest.
        kld: mean KL divergence without centring, in nats.
        kld_centred: the same with it.
        error: standard error of the difference of the two, over tokens.
        helps: whether the difference exceeds twice its error; only then are the keys centred.
    """

    layer: int
    type: str
    kld: float
    kld_centred: float
    error: float
    helps: bool


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
        centring: measurements by layer and type; empty if centring was not wanted or is not possible.
        sensitivities: measurements of every part and type.
        predicted: mean KL divergence of the policy if the divergences in `sensitivities` add up, in nats.
        measured: mean KL divergence of the policy on the tuning part, in nats.
        rows: figures on the held-out part: f16, the reference; "policy"; and single types in all layers, smallest
            first.
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
    centring: tuple[Centring, ...]
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
    centre: bool | None = None,
    tail: int | None = None,
    n_ctx: int | None = None,
    n_chunks: int | None = None,
    n_batch: int = 512,
    n_threads: int | None = None,
    n_parallel: int = 8,
    progress: Progress | None = None,
) -> Tuning:
    """Measures a model's layers and makes a policy for its cache.

    With a budget, the result is the best of these on the tuning part: the policy made from sensitivities, the same
    policy without centring, and every single type within the budget. So it can be a single type; then a note says so.

    With max_kld, types grow from the smallest ones in the order of gain per byte, and bisection finds the first policy
    on this way whose divergence on the held-out part, which decides nothing else, is at most max_kld.

    The tuning part is read once for each part of the cache and type, 6 n times with n layers and three types; n times
    more to measure centring; and twice more for each further type of a layer that centring helps. Memory is that of
    `compare` with n_parallel + 1 caches.

    Args:
        path: a GGUF file.
        text: the text to read, as for `compare`; at least two chunks.
        budget: bits per value, averaged over the whole cache (`CachePolicy.bits`).
        max_kld: largest mean KL divergence from f16 on the held-out part, in nats. Give either this or a budget.
        types: names of at least two cache types to choose from.
        centre: whether keys may be stored less their mean where that helps. None: if the model allows it.
        tail: newest tokens kept in f16, as for `Llama`; the policy should be used with the same tail.
        n_ctx: tokens in a chunk, as for `compare`.
        n_chunks: chunks to read at most, both parts together; None means DEFAULT_CHUNKS.
        n_batch: tokens per call of llama.cpp.
        n_threads: threads; None means the number of processors.
        n_parallel: caches read at once, beside the reference. Fewer save memory; the reference is read more often.
        progress: called after every batch with the name of the step, tokens read and tokens in all, over all caches.

    Raises:
        ArgumentError: both or neither of budget and max_kld, or one that no policy reaches; fewer than two types, an
            unknown type, or a type given twice; centre=True with a model whose keys cannot be centred; a number out of
            its range; no text for a model that is not the demo model.
        TextError: the text is empty or has fewer than two chunks.
        CacheTypeError: the model cannot have one of the types.
        UnsupportedError: the model has no KV cache, or keeps V within K (MLA).
        TqggufError: as `compare`.
    """
    kinds = _kinds(types)
    for name, value, least in (("n_batch", n_batch, 1), ("n_parallel", n_parallel, 1), ("n_chunks", n_chunks, 2)):
        if value is not None:
            check_count(name, value, least)
    check_tail(tail)
    info = read_model_info(path)
    _refuse_untunable(info, kinds, centre)
    _check_goal(budget, max_kld, kinds, info)
    n_ctx, n_chunks = context_length(info, n_ctx), n_chunks or DEFAULT_CHUNKS
    own = text is None
    text = chosen_text(info, text, n_ctx, n_chunks)
    f16 = NamedCache("f16", resolve("f16", info.n_layer))
    with contextlib.closing(load(path, f16, n_ctx, n_threads, n_batch=n_batch, swa_full=False)) as model:
        halves = _halves(text_chunks(model, text, n_ctx, n_chunks, own))
        return _Tuner(_Bench(model, f16, *halves, tail, n_parallel, progress), kinds, centre).run(budget, max_kld)


def _refuse_untunable(info: ModelInfo, kinds: Sequence[CacheType], centre: bool | None) -> None:
    if not info.layers or info.mla:
        reason = "keeps V within K (MLA)" if info.mla else "has no KV cache"
        raise UnsupportedError(f"{info.path.name}: architecture {info.architecture} {reason}; nothing to tune")
    for kind in kinds:
        refuse_impossible(info, resolve(kind.name, info.n_layer))
    if centre and info.centring_obstacle:
        raise ArgumentError(f"{info.path.name}: {info.centring_obstacle}")


def _halves(chunks: Chunks) -> tuple[Chunks, Chunks]:
    """The tuning part and the held-out part of a text."""
    if len(chunks) < 2:
        raise TextError(
            f"the text has less than two chunks of {chunks.shape[1]:,} tokens, one to tune on and one held out: "
            f"give a longer text or a shorter context"
        )
    n_tuning = (len(chunks) + 1) // 2
    return chunks[:n_tuning], chunks[n_tuning:]


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
    """A loaded model and the two parts of the text, (n_chunks, n_ctx) tokens each."""

    model: Llama
    f16: NamedCache
    tuning: Chunks
    held_out: Chunks
    tail: int | None
    n_parallel: int
    progress: Progress | None

    def named(self, label: str, policy: CachePolicy) -> NamedCache:
        """A cache to measure, with the common tail."""
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

    def klds(self, title: str, policies: Sequence[CachePolicy], rotate: bool = True) -> list[Array]:
        """The divergence of every policy at each scored token of the tuning part, (n_scored)."""
        caches = [replace(self.named("policy", policy), rotate=rotate) for policy in policies]
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

    def __init__(self, bench: _Bench, kinds: Sequence[CacheType], centre: bool | None) -> None:
        self.bench = bench
        self.info = bench.model.model_info
        self.notes = [] if self.info.exact else [f"bits are of the layers known: {'; '.join(self.info.notes)}"]
        self.centre = centre is not False and self.info.centring_obstacle is None
        if centre is None and self.info.centring_obstacle:
            self.notes.append(f"{self.info.centring_obstacle}; tuned without")
        self.hash = model_hash(self.info)
        self.means: Means = {}
        self.helped: set[tuple[int, str]] = set()
        # Parts of the cache, in the order of `options`.
        self.parts = [(layer.index, side) for side in "KV" for layer in self.info.layers]
        self.names = tuple(kind.name for kind in kinds)
        # llama.cpp does not rotate stock types beside pqo and pqt types, so they are measured without rotation.
        self.rotate = not any(kind.ours for kind in kinds)
        fits = [name for name in BASELINE_TYPES if self.info.obstacle(cache_type(name), cache_type(name)) is None]
        names = [*self.names, *fits]
        self.uniform = [
            self.bench.named(name, resolve(name, self.info.n_layer))
            for name in sorted(dict.fromkeys(names), key=lambda name: cache_type(name).bits)
        ]

    def run(self, budget: float | None, max_kld: float | None) -> Tuning:
        single: list[TypeQuality] = []
        if max_kld is not None:  # a goal that cannot be reached is refused before hours are spent
            single = self.bench.qualities("single types", self.uniform)
            self._refuse_below_largest(single, max_kld)
        centring = self._centre()
        sensitivities = self._sensitivities(centring)
        options = self._options(sensitivities)
        if budget is not None:
            policy, measured = self._within(budget, options)
        else:
            assert max_kld is not None
            policy = self._smallest(max_kld, options, single)
            measured = float(self.bench.klds("policy on the tuning part", [policy])[0].mean())
        tail = DEFAULT_TAIL if self.bench.tail is None else self.bench.tail
        policy = replace(policy, model_hash=self.hash, tail=tail)
        measured_caches = [self.bench.named("policy", policy), *([] if single else self.uniform)]
        rows = self.bench.qualities("held-out part", measured_caches)
        rows += single[1:]
        line = self._judge(rows[1], rows[2:])
        if centring and not self.helped:
            self.notes.append("centring the keys helps no layer measurably; none is centred")
        return Tuning(
            model=self.info.path.name,
            policy=policy,
            budget=budget,
            max_kld=max_kld,
            types=self.names,
            tail=tail,
            n_ctx=self.bench.tuning.shape[1],
            n_tuning=len(self.bench.tuning),
            n_held_out=len(self.bench.held_out),
            centring=centring,
            sensitivities=sensitivities,
            predicted=self._predicted(policy, sensitivities, centring),
            measured=measured,
            rows=tuple(rows),
            line=line,
            notes=tuple(self.notes),
        )

    # ---- What parts cost ----

    def _centre(self) -> tuple[Centring, ...]:
        """Measures where centring helps; sets `means` and `helped`."""
        if not self.centre:
            return ()
        layers = [layer.index for layer in self.info.layers]
        means = mean_keys(self.bench.model, self.bench.tuning[0, :MEAN_TOKENS].tolist(), layers)
        found = self._compare_centring("centring", [(layer, self.names[0]) for layer in layers], means)
        # In the demo model's first layer it helped pqt3 by two standard errors, and pqt4 not at all.
        more = [(row.layer, name) for row in found if row.helps for name in self.names[1:]]
        found += self._compare_centring("centring, other types", more, means)
        self.means = means
        self.helped = {(row.layer, row.type) for row in found if row.helps}
        return tuple(found)

    def _compare_centring(self, title: str, keys: Sequence[tuple[int, str]], means: Means) -> list[Centring]:
        """Centring in every (layer, type) of `keys`."""
        alone = [self._alone(layer, "K", name) for layer, name in keys]
        centred = [replace(policy, k_means={key[0]: means[key[0]]}) for policy, key in zip(alone, keys, strict=True)]
        klds = self.bench.klds(title, alone + centred, self.rotate)
        found = []
        for (layer, name), a, b in zip(keys, klds[: len(keys)], klds[len(keys) :], strict=True):
            gain, error = float((a - b).mean()), standard_error(a - b)
            found.append(Centring(layer, name, float(a.mean()), float(b.mean()), error, gain > 2 * error))
        return found

    def _sensitivities(self, centring: Sequence[Centring]) -> tuple[Sensitivity, ...]:
        every = [(layer, side, name) for layer, side in self.parts for name in self.names]
        known = {(row.layer, "K", row.type): row.kld_centred if row.helps else row.kld for row in centring}
        wanted = [part for part in every if part not in known]
        klds = self.bench.klds("layers and sides", [self._alone(*part) for part in wanted], self.rotate)
        known |= {part: float(kld.mean()) for part, kld in zip(wanted, klds, strict=True)}
        return tuple(
            Sensitivity(layer, side, name, side == "K" and (layer, name) in self.helped, known[layer, side, name])
            for layer, side, name in every
        )

    def _options(self, sensitivities: Collection[Sensitivity]) -> list[list[Option]]:
        """The options of each part, in the order of `parts`, which is that of the sensitivities too."""
        sizes = {("K", x.index): x.n_head_kv * x.head_dim_k for x in self.info.layers}
        sizes |= {("V", x.index): x.n_head_kv * x.head_dim_v for x in self.info.layers}
        return [
            [Option(s.type, cache_type(s.type).row_bytes(sizes[s.side, s.layer]), s.kld) for s in group]
            for _, group in groupby(sensitivities, key=lambda s: (s.layer, s.side))
        ]

    # ---- The policy ----

    def _within(self, budget: float, options: Sequence[Sequence[Option]]) -> tuple[CachePolicy, float]:
        """The best policy within a budget of bits per value, and its mean divergence on the tuning part."""
        # Rounding must not take a byte away from a budget that is met exactly.
        n_bytes = math.floor(budget * self.info.values_per_token / 8 + 1e-6)
        policy = self._policy(allocate(options, n_bytes))
        others = [x for x in self.uniform if x.label in self.names and x.policy.bytes_per_token(self.info) <= n_bytes]
        candidates = [policy, *([replace(policy, k_means={})] if policy.k_means else [])]
        klds = [float(kld.mean()) for kld in self.bench.klds("policies", [*candidates, *(x.policy for x in others)])]
        best = int(np.argmin(klds))  # the policy is first, so it wins a tie
        if best >= len(candidates):
            name = others[best - len(candidates)].label
            self.notes.append(f"no mixture of types measured better than {name} in all layers, so that is the policy")
        elif best:
            self.notes.append("centring helped single layers, but not all of them together; none is centred")
        return [*candidates, *(x.policy for x in others)][best], klds[best]

    def _smallest(
        self,
        max_kld: float,
        options: Sequence[Sequence[Option]],
        single: Sequence[TypeQuality],
    ) -> CachePolicy:
        """The smallest policy whose divergence on the held-out part is at most max_kld.

        Args:
            single: figures of the reference and the single types on the held-out part; at least one single type must
                have a divergence of at most max_kld.
        """
        way = [self._policy(chosen) for chosen in allocations(options)]
        low, high = 0, len(way)  # way[high] is good, or beyond the end
        while low < high:
            middle = (low + high) // 2
            cache = self.bench.named("policy", way[middle])
            good = self.bench.qualities("policies", [cache])[1].kld.mean <= max_kld
            low, high = (low, middle) if good else (middle + 1, high)
        good_types = [row for row in single if row.type in self.names and row.kld.mean <= max_kld]
        smallest = min(good_types, key=lambda row: row.bytes_per_token)
        if high == len(way) or smallest.bytes_per_token < way[high].bytes_per_token(self.info):
            self.notes.append(f"no smaller mixture of types does it than {smallest.type} in all layers")
            return resolve(smallest.type, self.info.n_layer)
        return way[high]

    def _refuse_below_largest(self, single: Sequence[TypeQuality], max_kld: float) -> None:
        least = min((row for row in single if row.type in self.names), key=lambda row: row.kld.mean)
        if least.kld.mean > max_kld:
            raise ArgumentError(
                f"no policy of {', '.join(self.names)} has a mean KLD of {max_kld:g}: "
                f"{least.type} in all layers has {least.kld.mean:.3g}"
            )

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

    def _predicted(
        self, policy: CachePolicy, sensitivities: Collection[Sensitivity], centring: Collection[Centring]
    ) -> float:
        chosen = {"K": policy.types_k, "V": policy.types_v}
        plain = {(row.layer, row.type): row.kld for row in centring}
        return sum(
            plain[s.layer, s.type] if s.centred and s.layer not in policy.k_means else s.kld
            for s in sensitivities
            if chosen[s.side][s.layer] == s.type
        )

    def _policy(self, chosen: Sequence[Option]) -> CachePolicy:
        types = {side: [self.names[0]] * self.info.n_layer for side in "KV"}
        for (layer, side), option in zip(self.parts, chosen, strict=True):
            types[side][layer] = option.type
        means = {layer: mean for layer, mean in self.means.items() if (layer, types["K"][layer]) in self.helped}
        return CachePolicy(tuple(types["K"]), tuple(types["V"]), means)

    def _alone(self, layer: int, side: str, name: str) -> CachePolicy:
        """A policy with one part of the cache in a type and everything else in f16."""
        types = {other: ["f16"] * self.info.n_layer for other in "KV"}
        types[side][layer] = name
        return CachePolicy(tuple(types["K"]), tuple(types["V"]))
