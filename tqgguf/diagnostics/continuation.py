"""What caches do to an answer, token by token: the reference continues a text, and every cache follows it.

`compare` scores the predictions of a given text, read in batches. Here tokens are computed one at a time, as in an
answer, and the text is the reference's own: its most probable token each time. As all caches are given that token, the
divergence at a position shows whether errors add up. Up to the first token at which a cache would have chosen another
one, its own greedy answer is the reference's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from .._util import check_count
from ..cache.calibration import Calibration
from ..cache.policy import PolicySpec
from ..config import MEASURED_TYPES
from ..errors import ArgumentError
from ..model.llama import Llama
from .compare import Array, CountProgress, Divergence, Reader, Trial, divergence, log_softmax, reading

SPANS: Final = 5
"""Equal parts of an answer whose divergence is told apart."""


@dataclass(frozen=True)
class ContinuationQuality:
    """One cache that followed the reference's answers.

    Attributes:
        type: label of the cache, as in `compare`.
        tail: newest tokens kept in f16.
        kld: divergence from the reference over all tokens of all answers, in nats.
        by_position: its mean in each of `SPANS` equal parts of the answers, in order.
        same_top: share of tokens at which the most probable one is the reference's.
        agreed: for each answer, tokens before the first one at which the most probable one is not the reference's; all
            of them if there is none.
    """

    type: str
    tail: int
    kld: Divergence
    by_position: tuple[float, ...]
    same_top: float
    agreed: tuple[int, ...]


@dataclass(frozen=True)
class Continuation:
    """Answers of one model's reference cache, followed by the other caches.

    Attributes:
        model: name of the model's file.
        n_prompt: tokens of text read before an answer.
        n_generate: tokens of an answer.
        rows: one for each cache; the first is the reference.
    """

    model: str
    n_prompt: int
    n_generate: int
    rows: tuple[ContinuationQuality, ...]


def continuation(
    path: str | Path,
    caches: Sequence[PolicySpec] = MEASURED_TYPES,
    text: str | None = None,
    *,
    n_generate: int,
    tails: Sequence[int] | None = None,
    n_ctx: int | None = None,
    n_chunks: int | None = None,
    n_batch: int = 512,
    n_threads: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    calibration: Calibration | str | Path | None = None,
    progress: CountProgress | None = None,
) -> Continuation:
    """Lets the first cache continue each chunk of a text, and the others follow it token by token.

    Args:
        path: a GGUF file.
        caches: as in `compare`.
        text: as in `compare`.
        n_generate: tokens of each answer. A token that ends an answer is one like any other.
        tails: as in `compare`.
        n_ctx: tokens of text and answer together; None as in `compare`.
        n_chunks: answers at most; None means as many as the text gives.
        n_batch: as in `compare`.
        n_threads: as in `compare`.
        temperature: 0 takes the most probable token each time; else tokens are drawn from the reference's distribution
            at this temperature. A long greedy answer of a small model repeats itself, which hides errors.
        seed: of the draw.
        calibration: as in `compare`.
        progress: called as progress(tokens read or generated, in all) after every batch or token.

    Raises:
        ArgumentError: n_generate is below 1 or leaves less than half of n_ctx to the text; temperature is not a finite
            number from 0 on; otherwise as `compare`.
        PolicyError, TextError, CacheTypeError, OutOfMemoryError, TqggufError: as `compare`.
    """
    trial = Trial.of(path, caches, tails, n_ctx)
    n_prompt = trial.n_ctx - check_generate(n_generate, trial.n_ctx)
    if isinstance(temperature, bool) or not (isinstance(temperature, (int, float)) and 0 <= temperature < np.inf):
        raise ArgumentError(f"temperature is {temperature!r}, must be a finite number of at least 0")
    with reading(trial, text, n_chunks, n_batch, n_threads, calibration, progress) as (model, readers, chunks):
        _follow(model, readers, chunks, n_generate, temperature, seed, progress)
    return Continuation(trial.info.path.name, n_prompt, n_generate, tuple(_quality(r, n_generate) for r in readers))


def _follow(
    model: Llama,
    readers: Sequence[Reader],
    chunks: npt.NDArray[np.int32],
    n_generate: int,
    temperature: float,
    seed: int,
    progress: CountProgress | None,
) -> None:
    """Lets every reader read the beginning of each chunk, then the tokens by which the first one continues it."""
    n_prompt, n_vocab, random = chunks.shape[1] - n_generate, model.n_vocab(), np.random.default_rng(seed)
    done, total = 0, chunks.size * len(readers)

    def read(tokens: npt.NDArray[np.int32], scored: npt.NDArray[np.int8]) -> None:
        nonlocal done
        for reader in readers:
            reader.decode(tokens, scored)
            done += len(tokens)
            if progress:
                progress(done, total)

    last = np.zeros(n_prompt, np.int8)
    last[-1] = 1
    for chunk in chunks:
        for reader in readers:
            reader.forget()
        for start in range(0, n_prompt, model.n_batch):
            batch = slice(start, min(start + model.n_batch, n_prompt))
            read(chunk[batch], last[batch])
        for _ in range(n_generate):
            reference = log_softmax(readers[0].logits(1, n_vocab))
            # The largest sum of log-probability and Gumbel noise is a draw from the distribution.
            noise = temperature * random.gumbel(size=n_vocab) if temperature else 0.0
            token = (reference + noise).argmax(axis=-1).astype(np.int32)
            for reader in readers:
                reader.score(reference, reader.logits(1, n_vocab), token)
            read(token, np.ones(1, np.int8))


def check_generate(n_generate: int, n_ctx: int) -> int:
    """n_generate, if at least half of the context is left to the text."""
    if check_count("n_generate", n_generate) > n_ctx // 2:
        raise ArgumentError(
            f"n_generate is {n_generate:,}, must be at most half of the context of {n_ctx:,} tokens: "
            f"the other half is the text that is continued"
        )
    return n_generate


def _spans(kld: Array) -> list[Array]:
    """The divergences (n, n_generate) in SPANS equal parts, or one for each token of a shorter answer."""
    n = kld.shape[1]
    edges = [n * i // min(SPANS, n) for i in range(min(SPANS, n) + 1)]
    return [kld[:, first:last] for first, last in itertools.pairwise(edges)]


def _quality(reader: Reader, n_generate: int) -> ContinuationQuality:
    kld = np.concatenate(reader.kld).reshape(-1, n_generate)
    same = np.concatenate(reader.same_top).reshape(-1, n_generate)
    agreed = np.where(same.all(axis=1), n_generate, same.argmin(axis=1))
    return ContinuationQuality(
        type=reader.cache.label,
        tail=reader.cache.kept,
        kld=divergence(kld.ravel()),
        by_position=tuple(float(part.mean()) for part in _spans(kld)),
        same_top=float(same.mean()),
        agreed=tuple(int(n) for n in agreed),
    )
