"""What KV caches cost a model on a text: perplexity and divergence from a reference cache, token by token.

The procedure is that of llama.cpp's `llama-perplexity --kl-divergence`. The text is cut into chunks of n_ctx tokens.
The first token of a chunk becomes BOS if the model wants one. Each chunk is read into an empty cache, and the
predictions from position n_ctx/2 to n_ctx-2 are scored. Two things differ: the reference's logits are compared at once,
in float64, instead of being written to a file as 16-bit values; and chunks are read one by one.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .._native import import_llama_cpp
from .._util import check_count
from ..cache.calibration import Calibration
from ..cache.policy import CachePolicy, PolicySpec, refuse_impossible, resolve
from ..cache.tail import check_tail
from ..config import MEASURED_TYPES
from ..errors import ArgumentError, TqggufError
from ..gguf.info import ModelInfo, read_model_info
from ..model.calibrate import calibrated_by_default, chosen_calibration
from ..model.llama import Llama
from .texts import DEFAULT_CHUNKS, chosen_text, text_chunks

llama_cpp: Any = import_llama_cpp()
_TokenPointer: Final = ctypes.POINTER(ctypes.c_int32)
_FlagPointer: Final = ctypes.POINTER(ctypes.c_int8)

DEFAULT_CONTEXT: Final = 2048
"""Context in tokens; a model trained for less gets the context it was trained for. The cost of a quantized K grows with
the number of keys that compete, so a context of a few hundred tokens shows too little of it."""

MIN_CONTEXT: Final = 128
UBATCH: Final = 512
"""Tokens that llama.cpp computes at once by default."""

Array = npt.NDArray[np.float64]
CountProgress = Callable[[int, int], None]
"""Called with how much is done, and of how much."""


@dataclass(frozen=True)
class Divergence:
    """KL divergence of the next-token distribution from the reference's, over the scored tokens, in nats.

    Attributes:
        mean: over all scored tokens.
        mean_error: standard error of the mean, if tokens were independent.
        median: half of the tokens have less.
        p99: 99 % of the tokens have less.
        p999: 99.9 % of the tokens have less.
        max: of the worst token.
    """

    mean: float
    mean_error: float
    median: float
    p99: float
    p999: float
    max: float


@dataclass(frozen=True)
class TypeQuality:
    """One cache on the text.

    Attributes:
        type: label of the cache (`NamedCache`): the name of its type, unless K and V or layers differ.
        bits: bits per cached value, over all layers and the tokens of a chunk, with the tail.
        bytes_per_token: bytes of K and V of all layers together, without the tail.
        tail: newest tokens kept in f16.
        bytes: bytes of the cache for a chunk, with the tail.
        perplexity: exp of the mean negative log-likelihood of the scored tokens.
        perplexity_error: its standard error, if tokens were independent.
        kld: divergence from the reference; all zero for the reference itself.
        same_top: share of scored tokens whose most probable token is the reference's.
        tokens_per_second: speed at which the text was read in batches (prefill); all tokens count.
    """

    type: str
    bits: float
    bytes_per_token: int
    tail: int
    bytes: int
    perplexity: float
    perplexity_error: float
    kld: Divergence
    same_top: float
    tokens_per_second: float


@dataclass(frozen=True)
class Comparison:
    """Caches compared on the same tokens of one model.

    Attributes:
        model: name of the model's file.
        n_ctx: tokens in a chunk.
        n_chunks: chunks read.
        n_scored: tokens scored, in all chunks together.
        n_threads: threads used.
        rows: one for each cache; the first is the reference.
        notes: limits of the figures that a reader should know.
    """

    model: str
    n_ctx: int
    n_chunks: int
    n_scored: int
    n_threads: int
    rows: tuple[TypeQuality, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class NamedCache:
    """A cache to measure.

    Attributes:
        label: name of its type; "pqo4/pqo3" if K and V have different types; the name of a policy file without its
            suffix; "policy" for any other policy. "+N" follows if there is a tail of N tokens, " calibrated" if it was
            calibrated here.
        policy: the type of every layer's K and V.
        tail: newest tokens kept in f16, as for `Llama`.
        rotate: whether llama.cpp may rotate stock quantized types, which it does by default.
        n_ubatch: tokens to compute at once.
    """

    label: str
    policy: CachePolicy
    tail: int | None = 0
    rotate: bool = True
    n_ubatch: int = UBATCH

    @property
    def kept(self) -> int:
        """Newest tokens that are kept in f16."""
        return self.policy.kept(self.tail)


class Trial(NamedTuple):
    """A model, the caches to measure on it, all of which it can have, the reference first, and tokens in a chunk."""

    info: ModelInfo
    caches: tuple[NamedCache, ...]
    n_ctx: int

    @classmethod
    def of(
        cls,
        path: str | Path,
        caches: Sequence[PolicySpec],
        tails: Sequence[int] | None,
        n_ctx: int | None,
    ) -> Trial:
        """The trial that the arguments of `compare` describe."""
        info = read_model_info(path)
        named = compared_caches(caches, info.n_layer, tails)
        for cache in named:
            refuse_impossible(info, cache.policy)
        return cls(info, named, context_length(info, n_ctx))


def compare(
    path: str | Path,
    caches: Sequence[PolicySpec] = MEASURED_TYPES,
    text: str | None = None,
    *,
    tails: Sequence[int] | None = None,
    n_ctx: int | None = None,
    n_chunks: int | None = None,
    n_batch: int = 512,
    n_threads: int | None = None,
    calibration: Calibration | str | Path | None = None,
    progress: CountProgress | None = None,
) -> Comparison:
    """Measures caches against the first of them.

    The weights are loaded once. Every cache has a context of its own, and all contexts read each batch in turn. So
    logits are compared while llama.cpp still holds them, and only a few numbers per scored token are stored. Each cache
    takes memory for n_ctx tokens, for one batch of logits (n_batch * n_vocab * 4 bytes), and for llama.cpp's compute
    buffer, which reserves as much for logits again. The length of the text does not matter.

    Caches are compared as they are used: flash attention is on for every one, and llama.cpp rotates quantized caches as
    it does by default.

    Args:
        path: a GGUF file.
        caches: at least two; the first is the reference. Each is anything that `Llama` takes: a type, a pair for K and
            V, types by layer, a policy, or a policy file.
        text: the text to read; it is tokenized without control tokens. None takes a conversation about facts that the
            demo model was made for, with control tokens; any other model needs a text.
        tails: numbers of newest tokens kept in f16; a cache with a quantized type is measured with each of them. None
            measures each cache once, with the tail that `Llama` gives it unless told otherwise. As in `Llama`, the tail
            also decides how many tokens are computed at once.
        n_ctx: tokens in a chunk; None means DEFAULT_CONTEXT, or the trained context if that is less.
        n_chunks: chunks to read at most; None means the whole text (DEFAULT_CHUNKS of the demo model's own text).
        n_batch: tokens per call of llama.cpp; fewer save memory if the vocabulary is large.
        n_threads: threads; None means the number of processors.
        calibration: as for `Llama`. Each cache that `Llama` calibrates by default, except the reference, is measured
            calibrated as well; with a calibration that is named, or "auto", each with quantized keys.
        progress: called as progress(tokens read, tokens in all) after every batch; a token counts once for each cache.
            While a calibration is measured before, as progress(layers done, layers in all).

    Raises:
        ArgumentError: fewer than two caches, a cache given twice, or an unknown type; no tail, or a tail given twice;
            n_ctx below MIN_CONTEXT; n_chunks or n_batch below 1; no text for a model that is not the demo model.
        PolicyError: a policy or its file is not well formed.
        TextError: the text is empty or has fewer than n_ctx tokens.
        CacheTypeError: the model cannot have one of the caches, or llama.cpp did not use it.
        OutOfMemoryError: no memory for the KV caches.
        TqggufError: llama.cpp failed, or gave logits that are not finite; otherwise as `Llama`.
    """
    trial = Trial.of(path, caches, tails, n_ctx)
    with reading(trial, text, n_chunks, n_batch, n_threads, calibration, progress) as (model, readers, chunks):
        read_chunks(model, readers, chunks, progress)
        return Comparison(
            model=trial.info.path.name,
            n_ctx=trial.n_ctx,
            n_chunks=len(chunks),
            n_scored=len(chunks) * (trial.n_ctx - 1 - trial.n_ctx // 2),
            n_threads=model.n_threads_batch,
            rows=tuple(reader.quality(trial.info, trial.n_ctx, chunks.size) for reader in readers),
            notes=_notes(trial, text is None),
        )


@contextlib.contextmanager
def reading(
    trial: Trial,
    text: str | None,
    n_chunks: int | None,
    n_batch: int,
    n_threads: int | None,
    calibration: Calibration | str | Path | None,
    progress: CountProgress | None,
) -> Iterator[tuple[Llama, list[Reader], npt.NDArray[np.int32]]]:
    """The model, a reader for each cache, calibrated ones among them, and the text's tokens (n_chunks, n_ctx).

    Without a text the demo model gets its own. Memory is given back at the end.

    Raises:
        As `compare`.
    """
    check_count("n_batch", n_batch)
    if n_chunks is not None:
        check_count("n_chunks", n_chunks)
    (info, named, n_ctx), own = trial, text is None
    n_chunks = n_chunks or (DEFAULT_CHUNKS if own else None)
    text = chosen_text(info, text, n_ctx, n_chunks)
    named = also_calibrated(info, named, calibration, n_threads, progress)
    # As in llama.cpp's tools, a layer with a sliding window keeps no more tokens than that (swa_full).
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(
            contextlib.closing(load(info.path, named[0], n_ctx, n_threads, n_batch=n_batch, swa_full=False))
        )
        chunks = text_chunks(model, text, n_ctx, n_chunks, own)
        readers = [Reader(named[0], model.ctx)]
        readers += [Reader(cache, stack.enter_context(further_context(model, cache))) for cache in named[1:]]
        yield model, readers, chunks


def compared_caches(
    caches: Sequence[PolicySpec], n_layer: int, tails: Sequence[int] | None = None
) -> tuple[NamedCache, ...]:
    """The caches of a comparison in a model of n_layer layers, the reference first, each with every tail it can have.

    No two labels are equal: if a policy has the label of an earlier cache, its label becomes "name (2)".

    Raises:
        ArgumentError: an unknown type (the message lists the valid ones), a cache given twice, or fewer than two
            caches; no tail, a tail given twice, or a tail that is not a number of tokens.
        PolicyError, ModelNotFoundError: as `resolve`.
    """
    for name, value in (("caches", caches), ("tails", () if tails is None else tails)):
        if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence):
            raise ArgumentError(f"{name} is {value!r}, must be a list")
    lengths = [None] if tails is None else [check_tail(tail) for tail in tails]
    if not lengths or len(set(lengths)) < len(lengths):
        raise ArgumentError(f"tails are {list(tails or ())}, must be at least one and none twice")
    found: dict[str, CachePolicy] = {}
    words: set[str] = set()
    for i, cache in enumerate(caches):
        policy = resolve(cache, n_layer)
        label = _label(cache, policy)
        if (label == policy.words and label in words) or cache in caches[:i]:
            raise ArgumentError(f"cache {label} is given twice")
        words.add(policy.words)
        copies = sum(other == label or other.startswith(f"{label} (") for other in found)
        found[f"{label} ({copies + 1})" if copies else label] = policy
    named: list[NamedCache] = []
    for label, policy in found.items():
        for tail in lengths if policy.quantized else [0]:
            recent = policy.kept(tail)
            named.append(NamedCache(f"{label}+{recent}" if recent else label, policy, tail))
    if len(named) < 2:
        raise ArgumentError(
            "a comparison needs at least two caches: the reference first, then those to compare with it"
        )
    return tuple(named)


def also_calibrated(
    info: ModelInfo,
    named: Sequence[NamedCache],
    choice: Calibration | str | Path | None,
    n_threads: int | None,
    progress: CountProgress | None,
) -> tuple[NamedCache, ...]:
    """The caches, and behind each that can be calibrated, except the reference, what it is with a calibration.

    Where none was chosen, those are the caches that `Llama` calibrates by default.

    Raises:
        CalibrationError: as `chosen_calibration`.
    """

    def suits(policy: CachePolicy) -> bool:
        if choice is None:
            return calibrated_by_default(info, policy)
        return not policy.calibrated and any(policy.types(layer.index)[0].quantized for layer in info.layers)

    suited = [cache for cache in named[1:] if suits(cache.policy)]
    calibration = chosen_calibration(info, choice, n_threads=n_threads, progress=progress) if suited else None
    found = [named[0]]
    for cache in named[1:]:
        found.append(cache)
        if calibration and cache in suited:
            policy = calibration.applied(cache.policy, info)
            found.append(replace(cache, label=f"{cache.label} calibrated", policy=policy))
    return tuple(found)


def _label(cache: PolicySpec, policy: CachePolicy) -> str:
    """See `NamedCache`."""
    if isinstance(cache, Path) or (isinstance(cache, str) and cache.endswith(".gguf")):
        return Path(cache).stem
    return policy.words or "policy"


def context_length(info: ModelInfo, n_ctx: int | None) -> int:
    """n_ctx, checked; if it is None, the smaller one of DEFAULT_CONTEXT and the trained context.

    Raises:
        ArgumentError: the context is below MIN_CONTEXT.
    """
    length = min(DEFAULT_CONTEXT, info.n_ctx_train) if n_ctx is None else check_count("n_ctx", n_ctx)
    if length < MIN_CONTEXT:
        raise ArgumentError(f"a context of {length} tokens is too short to compare caches: {MIN_CONTEXT} at least")
    return length


def load(path: str | Path, cache: NamedCache, n_ctx: int, n_threads: int | None, **options: Any) -> Llama:
    """A model to measure: quiet, and with flash attention for every cache, so that only the types differ."""
    threads: dict[str, Any] = {"n_threads": n_threads, "n_threads_batch": n_threads}
    tail = cache.tail if cache.policy.quantized else None  # which further contexts may take for theirs
    options = {"n_ubatch": cache.n_ubatch, **threads, **options, "cache": cache.policy, "tail": tail}
    options["calibration"] = None if cache.policy.calibrated else "off"  # a cache that is to be calibrated is
    return Llama(path, flash_attn=True, n_ctx=n_ctx, verbose=False, **options)


def further_context(model: Llama, cache: NamedCache) -> AbstractContextManager[Any]:
    """A context of that model for another cache; it computes as many tokens at once as a context of `load` would."""
    return model.further_context(cache.policy, tail=cache.tail, n_ubatch=cache.n_ubatch, rotate=cache.rotate)


def log_softmax(logits: npt.NDArray[Any]) -> Array:
    """Natural logarithms of the probabilities; logits (n, n_vocab), in float64."""
    x: Array = np.subtract(logits, logits.max(axis=-1, keepdims=True), dtype=np.float64)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x


def kl_divergence(reference: Array, other: Array, p: Array | None = None) -> Array:
    """sum p ln(p/q) of each row, in nats; both (n, n_vocab), from `log_softmax`; p is exp(reference), if known."""
    # A divergence is never negative, but the sum of a few million roundings can be, by 1e-16.
    divergence: Array = np.maximum(np.einsum("ij,ij->i", np.exp(reference) if p is None else p, reference - other), 0.0)
    return divergence


def untrained_notes(info: ModelInfo, n_ctx: int) -> list[str]:
    """What to say of a context that is longer than any in the model's training, as a list of no or one note."""
    if n_ctx <= info.n_ctx_train:
        return []
    return [f"the context of {n_ctx:,} tokens exceeds the {info.n_ctx_train:,} that the model was trained for"]


def _notes(trial: Trial, own: bool) -> tuple[str, ...]:
    info, caches, n_ctx = trial
    notes = untrained_notes(info, n_ctx)
    if not info.exact:
        notes.append(f"bytes per token are a lower bound: {'; '.join(info.notes)}")
    if own:
        notes.append(
            "the demo model was taught to predict answers, not the facts and questions between them: "
            "its perplexity is high and means little; compare the divergence"
        )
    for cache in caches:
        if cache.policy.tail not in (None, cache.kept):
            notes.append(f"{cache.label} was tuned with a tail of {cache.policy.tail}")
    return tuple(notes)


# ---- Reading in lock-step ----


@dataclass
class Reader:
    """One cache's context and the figures measured with it, one array per batch."""

    cache: NamedCache
    context: Any
    seconds: float = 0.0
    nll: list[Array] = field(default_factory=list)
    kld: list[Array] = field(default_factory=list)
    same_top: list[npt.NDArray[np.bool_]] = field(default_factory=list)

    def warm_up(self, token: npt.NDArray[np.int32]) -> None:
        """Reads one token without counting the time: the first pass over the weights reads them from disk."""
        self.forget()  # the reference is still full from the pass before
        self.decode(token, np.zeros(1, np.int8))
        self.seconds = 0.0

    def decode(self, tokens: npt.NDArray[np.int32], scored: npt.NDArray[np.int8]) -> None:
        """Appends tokens (n) to the cache; logits are kept where `scored` (n) is not 0."""
        batch = llama_cpp.llama_batch_get_one(tokens.ctypes.data_as(_TokenPointer), len(tokens))
        batch.logits = scored.ctypes.data_as(_FlagPointer)
        start = time.perf_counter()
        status = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_synchronize(self.context)
        self.seconds += time.perf_counter() - start
        if status:
            raise TqggufError(f"llama.cpp could not read a batch with the cache {self.cache.label} (status {status})")

    def logits(self, n: int, n_vocab: int) -> npt.NDArray[np.float32]:
        """The logits (n, n_vocab) of the last batch, in llama.cpp's memory: valid until the next batch."""
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.context), (n, n_vocab))

    def forget(self) -> None:
        """Empties the cache; its memory stays."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)

    def score(
        self,
        reference: Array,
        logits: npt.NDArray[np.float32],
        targets: npt.NDArray[np.int32],
        p: Array | None = None,
    ) -> None:
        """Compares logits (n, n_vocab) with the reference's log-probabilities and the tokens that followed (n).

        p: exp(reference), if it is known.
        """
        own = log_softmax(logits)
        if not np.isfinite(own).all():
            raise TqggufError(f"logits are not finite with the cache {self.cache.label}")
        self.nll.append(-own[np.arange(len(targets)), targets])
        self.kld.append(kl_divergence(reference, own, p))
        self.same_top.append(own.argmax(axis=-1) == reference.argmax(axis=-1))

    def quality(self, info: ModelInfo, n_ctx: int, n_tokens: int) -> TypeQuality:
        """The figures of all n_tokens read, in chunks of n_ctx."""
        nll, kld = np.concatenate(self.nll), np.concatenate(self.kld)
        perplexity = math.exp(nll.mean())
        n_bytes = self.cache.policy.bytes(info, n_ctx, self.cache.tail, self.cache.n_ubatch)
        f16 = resolve("f16", info.n_layer).bytes(info, n_ctx, 0, self.cache.n_ubatch)
        return TypeQuality(
            type=self.cache.label,
            bits=16 * n_bytes / f16 if f16 else 0.0,
            bytes_per_token=self.cache.policy.bytes_per_token(info),
            tail=self.cache.kept,
            bytes=n_bytes,
            perplexity=perplexity,
            perplexity_error=perplexity * standard_error(nll),
            kld=divergence(kld),
            same_top=float(np.concatenate(self.same_top).mean()),
            tokens_per_second=n_tokens / self.seconds,
        )


def divergence(kld: Array) -> Divergence:
    """The figures of the divergences (n)."""
    median, p99, p999 = (float(x) for x in np.quantile(kld, (0.5, 0.99, 0.999)))
    return Divergence(float(kld.mean()), standard_error(kld), median, p99, p999, float(kld.max()))


def standard_error(values: Array) -> float:
    """Standard error of the mean of values (n)."""
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def read_chunks(
    model: Llama, readers: Sequence[Reader], chunks: npt.NDArray[np.int32], progress: CountProgress | None
) -> None:
    """Lets every reader read the chunks (n_chunks, n_ctx) batch by batch and scores it against the first reader."""
    n_ctx, n_batch, n_vocab = chunks.shape[1], model.n_batch, model.n_vocab()
    scored = np.zeros(n_ctx, np.int8)
    scored[n_ctx // 2 : -1] = 1
    done, total = 0, chunks.size * len(readers)
    for reader in readers:
        reader.warm_up(chunks[0, :1])
    with ThreadPoolExecutor(max_workers=model.n_threads_batch) as pool:  # NumPy computes beside other threads
        for chunk in chunks:
            following = np.roll(chunk, -1)  # the last token has no next one and is not scored
            for reader in readers:
                reader.forget()
            for start in range(0, n_ctx, n_batch):
                batch = slice(start, start + n_batch)
                for reader in readers:
                    reader.decode(chunk[batch], scored[batch])
                    done += len(chunk[batch])
                    if progress:
                        progress(done, total)
                _score(readers, following[batch][scored[batch] > 0], n_vocab, pool)


def _score(readers: Sequence[Reader], targets: npt.NDArray[np.int32], n_vocab: int, pool: Executor) -> None:
    """Scores the last batch, 8 MiB of float64 at a time; `targets` (n) are the tokens that followed the scored ones."""
    rows = max(1, 2**20 // n_vocab)
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        reference = log_softmax(readers[0].logits(len(targets), n_vocab)[part])
        p = np.exp(reference)
        logits = [reader.logits(len(targets), n_vocab)[part] for reader in readers]
        done = [pool.submit(r.score, reference, x, targets[part], p) for r, x in zip(readers, logits, strict=True)]
        for each in done:
            each.result()
