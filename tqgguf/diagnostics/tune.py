"""Measures a cache policy: which type each layer stores K and V in, within a budget of bits or of divergence.

The text is cut into chunks as `compare` cuts it. Its first half, the tuning part, says what each type costs when only K
or only V of one layer is stored so and all else as f16, and whether keys stored less their mean cost less. From that
`allocation` makes a policy. The second half, held out, says what the policy is worth beside the same type everywhere.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from ..cache.policy import CachePolicy, model_hash, resolve
from ..cache.tail import DEFAULT_TAIL, check_tail
from ..config import CacheType, cache_type
from ..count import check_count
from ..errors import ArgumentError, TextError, UnsupportedError
from ..gguf.info import ModelInfo, read_model_info
from ..model.llama import Llama, refuse_impossible
from .allocation import Option, allocate, allocations
from .capture import mean_keys
from .compare import (
    Array,
    NamedCache,
    Reader,
    TypeQuality,
    context_length,
    further_context,
    load,
    own_text,
    read_chunks,
    refuse_short,
    standard_error,
    text_chunks,
)

__all__ = [
    "DEFAULT_CHUNKS",
    "TUNED_TYPES",
    "UNIFORM_TYPES",
    "Centring",
    "Sensitivity",
    "Tuning",
    "log_line",
    "tune",
]

TUNED_TYPES: Final = ("pqt3", "pqt4", "q8_0")
"""What `tune` chooses from unless told otherwise: the most precise at 3.5 and 4.5 bits, and one for parts that need
more. pqo3 and pqo4 take the same bytes and cost more divergence, but less time."""

UNIFORM_TYPES: Final = ("pqo3", "pqo4")
"""Measured beside the policy in any case, each in all layers."""

DEFAULT_CHUNKS: Final = 8
MEAN_TOKENS: Final = 2048
"""Of the first chunk at most, for mean keys: they are read as one batch, whose buffers grow with it."""

Chunks = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]
Means = Mapping[int, F32]
"""By layer, (n_head_kv, head_dim_k)."""

Progress = Callable[[str, int, int], None]
"""Called with what is being measured, tokens read and tokens in all for that, counted once for each cache."""


@dataclass(frozen=True)
class Sensitivity:
    """What one type costs one part of the cache, on the tuning part of the text.

    Attributes:
        layer: number of the layer.
        side: "K" or "V".
        type: name of the type.
        centred: whether keys were stored less their mean.
        kld: mean KL divergence from f16 with only this part of the cache stored so, in nats.
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
        type: name of the type: the smallest, and where centring helps that, also the others.
        kld: mean KL divergence without centring, in nats.
        kld_centred: the same with it.
        error: standard error of the difference of the two, from its values at single tokens.
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
        budget: bits per value that it could spend, or None.
        max_kld: mean KL divergence that it had to keep to on the held-out part, in nats, or None.
        types: names of the types it could choose from, smallest first.
        tail: newest tokens kept in f16 in all measurements.
        n_ctx: tokens in a chunk.
        n_tuning: chunks of the tuning part: the first ones.
        n_held_out: chunks held out: those after them.
        centring: by layer and type; empty if centring was not wanted or is not possible.
        sensitivities: of every part and type.
        predicted: mean KL divergence of the policy's types if what `sensitivities` says of parts adds up, in nats.
        measured: what it is on the tuning part.
        rows: on the held-out part: f16, the reference; "policy"; and single types in all layers, smallest first.
        line: mean KL divergence that single types give at the policy's bits: that of the best one of so many bits, or
            on the line through the nearest two, in bits and the logarithm of divergence; None outside of them.
        notes: what a reader should know before trusting the policy.
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
    types: Sequence[str] = TUNED_TYPES,
    centre: bool | None = None,
    tail: int = DEFAULT_TAIL,
    n_ctx: int | None = None,
    n_chunks: int | None = None,
    n_batch: int = 512,
    n_threads: int | None = None,
    n_parallel: int = 8,
    progress: Progress | None = None,
) -> Tuning:
    """Measures a model's layers and makes a policy for its cache.

    With a budget, what comes back is the best on the tuning part of: the policy by sensitivities, the same without
    centring, and every single type that fits the budget. So it can be one type everywhere; a note says so.

    With max_kld it is the smallest on the way from the smallest types to the largest ones, in the order of gain per
    byte, whose divergence on the held-out part is at most max_kld, found by bisection. The order of steps does not
    know the held-out part, the place where they end does.

    It reads the tuning part once for each part of the cache and type, and a little more: of n layers and three types,
    6 n times, and n times more to see whether centring helps; where it does, twice for each further type. Memory is
    that of `compare` with n_parallel + 1 caches.

    Args:
        path: a GGUF file.
        text: what to read, as for `compare`; at least two chunks.
        budget: bits per value, averaged over the whole cache (`CachePolicy.bits`).
        max_kld: mean KL divergence from f16 on the held-out part, in nats. Give this or a budget.
        types: names of at least two cache types to choose from.
        centre: whether keys may be stored less their mean, where that helps. None: if the model allows it.
        tail: newest tokens kept in f16, as the policy will be used.
        n_ctx: tokens in a chunk, as for `compare`.
        n_chunks: chunks to read at most, both parts together; None means DEFAULT_CHUNKS.
        n_batch: tokens llama.cpp is given at once.
        n_threads: threads; None means as many as there are processors.
        n_parallel: caches read at once, beside the reference. Fewer save memory; the reference is read more often.
        progress: called after every batch.

    Raises:
        ArgumentError: budget and max_kld both or neither; a budget below the smallest type; a max_kld below what the
            largest gives; fewer than two types, one given twice or unknown; centre=True with a model whose keys
            cannot be centred; a number out of its range; no text for a model that is not the demo model.
        TextError: the text is empty or has fewer than two chunks.
        CacheTypeError: the model cannot have one of the types.
        UnsupportedError: the model has no KV cache, or keeps V within K (MLA).
        TqggufError: as `compare`.
    """
    kinds = _kinds(types)
    for name, value in (("n_batch", n_batch), ("n_parallel", n_parallel), ("n_chunks", n_chunks)):
        if value is not None:
            check_count(name, value, 2 if name == "n_chunks" else 1)
    info = read_model_info(path)
    if not info.layers or info.mla:
        reason = "keeps V within K (MLA)" if info.mla else "has no KV cache"
        raise UnsupportedError(f"{info.path.name}: architecture {info.architecture} {reason}; nothing to tune")
    for kind in kinds:
        refuse_impossible(info, resolve(kind.name, info.n_layer))
    _check_goal(budget, max_kld, kinds, info)
    if centre and info.centring_obstacle:
        raise ArgumentError(f"{info.path.name}: {info.centring_obstacle}")
    n_ctx, n_chunks = context_length(info, n_ctx), n_chunks or DEFAULT_CHUNKS
    own = text is None
    if text is None:
        text = own_text(info, n_ctx, n_chunks)
    refuse_short(text, n_ctx)
    check_tail(tail)
    f16 = NamedCache("f16", resolve("f16", info.n_layer))
    with contextlib.closing(load(path, f16, n_ctx, n_threads, n_batch=n_batch, swa_full=False)) as model:
        chunks = text_chunks(model, text, n_ctx, n_chunks, own)
        if len(chunks) < 2:
            raise TextError(
                f"the text has less than two chunks of {n_ctx:,} tokens, one to tune on and one held out: "
                f"give a longer text or a shorter context"
            )
        n_tuning = (len(chunks) + 1) // 2
        bench = _Bench(model, f16, chunks[:n_tuning], chunks[n_tuning:], tail, n_parallel, progress)
        return _Tuner(bench, kinds, centre).run(budget, max_kld)


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
    """A loaded model and both parts of the text, (n_chunks, n_ctx) tokens each."""

    model: Llama
    f16: NamedCache
    tuning: Chunks
    held_out: Chunks
    tail: int
    n_parallel: int
    progress: Progress | None

    def named(self, label: str, policy: CachePolicy) -> NamedCache:
        """A cache to measure, with the tail that all have."""
        return NamedCache(label, policy, self.tail if policy.ours else 0)

    def read(self, title: str, caches: Sequence[NamedCache], chunks: Chunks) -> list[Reader]:
        """The reference and then every cache, after they have read the chunks."""
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
        """Divergence of every policy at the scored tokens of the tuning part, (n_scored) each."""
        caches = [replace(self.named("policy", policy), rotate=rotate) for policy in policies]
        return [np.concatenate(reader.kld) for reader in self.read(title, caches, self.tuning)[1:]]

    def qualities(self, title: str, caches: Sequence[NamedCache]) -> list[TypeQuality]:
        """The reference's figures and every cache's on the held-out part."""
        readers = self.read(title, caches, self.held_out)
        return [reader.quality(self.model.model_info, self.held_out.shape[1], self.held_out.size) for reader in readers]

    def _from(self, title: str, before: int, total: int) -> Callable[[int, int], None] | None:
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
        # In a policy with types of ours stock types are not rotated, so that is how their parts must be measured.
        self.rotate = not any(kind.ours for kind in kinds)
        names = [*self.names, *(name for name in UNIFORM_TYPES if self._fits(name))]
        self.uniform = [
            self.bench.named(name, resolve(name, self.info.n_layer))
            for name in sorted(dict.fromkeys(names), key=lambda name: cache_type(name).bits)
        ]

    def run(self, budget: float | None, max_kld: float | None) -> Tuning:
        single: list[TypeQuality] = []
        if max_kld is not None:  # before hours are spent on what cannot be
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
        policy = replace(policy, model_hash=self.hash, tail=self.bench.tail)
        own = [self.bench.named("policy", policy)]
        rows = self.bench.qualities("held-out part", own if single else [*own, *self.uniform])
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
            tail=self.bench.tail,
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
        """Where centring helps; sets `means` and `helped`."""
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
        """The options of each part, in the order of `parts`; they come in that order, too."""
        sizes = {("K", x.index): x.n_head_kv * x.head_dim_k for x in self.info.layers}
        sizes |= {("V", x.index): x.n_head_kv * x.head_dim_v for x in self.info.layers}
        return [
            [Option(s.type, cache_type(s.type).row_bytes(sizes[s.side, s.layer]), s.kld) for s in group]
            for _, group in groupby(sensitivities, key=lambda s: (s.layer, s.side))
        ]

    # ---- The policy ----

    def _within(self, budget: float, options: Sequence[Sequence[Option]]) -> tuple[CachePolicy, float]:
        """The best policy within a budget of bits per value, and its mean divergence on the tuning part."""
        # A budget that is meant to be met exactly must not miss a byte to rounding.
        n_bytes = math.floor(budget * self.info.values_per_token / 8 + 1e-6)
        policy = self._policy(allocate(options, n_bytes))
        others = [x for x in self.uniform if x.label in self.names and x.policy.bytes_per_token(self.info) <= n_bytes]
        candidates = [policy, *([replace(policy, k_means={})] if policy.k_means else [])]
        klds = [float(kld.mean()) for kld in self.bench.klds("policies", [*candidates, *(x.policy for x in others)])]
        best = int(np.argmin(klds))  # of equal ones the first: the policy
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
            single: the reference and the single types on the held-out part; one of the latter must keep to it.
        """
        way = [self._policy(chosen) for chosen in allocations(options)]
        low, high = 0, len(way)  # way[high] keeps to it, or is beyond the end
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
        """`Tuning.line`, and notes on how the policy stands to it."""
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
        """A policy with one part of the cache in a type and all else as f16."""
        types = {other: ["f16"] * self.info.n_layer for other in "KV"}
        types[side][layer] = name
        return CachePolicy(tuple(types["K"]), tuple(types["V"]))

    def _fits(self, name: str) -> bool:
        kind = cache_type(name)
        return self.info.obstacle(kind, kind) is None
