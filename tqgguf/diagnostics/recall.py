"""Exact recall of facts planted in a prompt, by cache, prompt size and depth.

The divergence of `compare` corrects the model at every token. Here the model generates, so an early error has its full
effect. The demo model answers the kind of prompt it was trained for. Any other chat model gets a needle test: filler
with five facts at fixed depths, such as "The code of Anna is 4821.".
"""

from __future__ import annotations

import contextlib
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .._util import check_count
from ..cache.calibration import Calibration
from ..cache.policy import PolicySpec
from ..config import MEASURED_TYPES
from ..demo import model as demo
from ..errors import ArgumentError, TqggufError, UnsupportedError
from ..model.llama import Llama
from .compare import CountProgress, Trial, also_calibrated, load

DEPTHS: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Places of the facts asked for, as fractions of the prompt: 0 is its first fact, 1 its last."""

DEMO_SIZES: Final = (16, 64, 140, 280)
"""Facts in a prompt of the demo model, as far as they fit the context."""

NEEDLE_SHARES: Final = (4, 2, 1)
"""Needle prompts take a quarter, a half and all of the context."""


@dataclass(frozen=True)
class RecallScore:
    """Questions of one size and depth, answered with one cache.

    Attributes:
        type: label of the cache, as in `compare`.
        size: size of the prompt, in the unit of `Recall.unit`.
        depth: place of the fact asked for: 0 is the beginning of the prompt, 1 its end.
        right: answers that name the value asked for and no other value of the prompt.
        n: questions.
    """

    type: str
    size: int
    depth: float
    right: int
    n: int


@dataclass(frozen=True)
class Recall:
    """Recall of one model with several caches, on the same prompts.

    Attributes:
        model: name of the model's file.
        unit: what sizes count: "facts" (the demo model) or "tokens" (needle test).
        n_ctx: context in tokens.
        seed: seed of the first prompt.
        scores: sorted by cache, then size, then depth.
    """

    model: str
    unit: str
    n_ctx: int
    seed: int
    scores: tuple[RecallScore, ...]


def recall(
    path: str | Path,
    caches: Sequence[PolicySpec] = MEASURED_TYPES,
    *,
    tails: Sequence[int] | None = None,
    n_ctx: int | None = None,
    n_prompts: int = 10,
    n_predict: int = 32,
    seed: int = 0,
    n_threads: int | None = None,
    calibration: Calibration | str | Path | None = None,
    progress: CountProgress | None = None,
) -> Recall:
    """Asks every cache the same questions through the model's chat template, greedily.

    The same arguments give the same questions on every machine. Answers can differ between processors, whose kernels
    round differently. Caches are loaded one after another, all with flash attention. The questions about one prompt
    share its cache, so each prompt is read once for each cache.

    Args:
        path: a GGUF file.
        caches: at least two; as in `compare`.
        tails: as in `compare`.
        n_ctx: context in tokens; as in `compare`.
        n_prompts: prompts of each size; each gets one question for every depth of `DEPTHS`.
        n_predict: tokens of a reply at most. A model that thinks aloud first needs more.
        seed: seed of the first prompt; the other prompts take the seeds after it.
        n_threads: threads; None means the default of `Llama`.
        calibration: as in `compare`.
        progress: called as progress(questions answered, questions in all) after every answer.

    Raises:
        ArgumentError: as in `compare`; n_prompts or n_predict below 1; the context has no room for the shortest prompt.
        CacheTypeError: the model cannot have one of the caches.
        UnsupportedError: the model has no chat template.
        TqggufError: llama.cpp failed; otherwise as `Llama`.
    """
    check_count("n_prompts", n_prompts)
    check_count("n_predict", n_predict)
    info, named, n_ctx = Trial.of(path, caches, tails, n_ctx)
    named = also_calibrated(info, named, calibration, n_threads, progress)
    own = info.name == demo.MODEL_NAME
    scores: list[RecallScore] = []
    for i, cache in enumerate(named):
        with contextlib.closing(load(info.path, cache, n_ctx, n_threads)) as model:
            asker = Asker(model, n_predict)
            questions = _demo_questions(n_ctx, n_prompts, seed) if own else _needles(asker, n_ctx, n_prompts, seed)
            right: Counter[tuple[int, float]] = Counter()
            for done, (size, depth, case) in enumerate(questions, 1 + i * len(questions)):
                right[size, depth] += asker.right(case)
                if progress:
                    progress(done, len(named) * len(questions))
        scores += [RecallScore(cache.label, size, depth, n, n_prompts) for (size, depth), n in right.items()]
    return Recall(info.path.name, "facts" if own else "tokens", n_ctx, seed, tuple(scores))


def needle_prompt(seed: int, n_filler: int, asked: int = 0) -> demo.RecallCase:
    """Filler with one fact at each of `DEPTHS`, and a question about one of them; a seed gives the same everywhere.

    Args:
        seed: chooses names, values and the order of the filler.
        n_filler: filler sentences. Each ten of them are all the ten sentences, in some order, so that prompts of one
            size differ in length by a sentence at most.
        asked: index into `DEPTHS` of the fact asked for.
    """
    rng = random.Random(seed)
    names = rng.sample(demo.NAMES, len(DEPTHS))
    values = rng.sample(range(1000, 10000), len(DEPTHS))
    facts = tuple(demo.Fact("code", name, str(value)) for name, value in zip(names, values, strict=True))
    filler: list[str] = []
    while len(filler) < n_filler:
        filler += rng.sample(demo.FILLER_SENTENCES, len(demo.FILLER_SENTENCES))
    sentences = filler[:n_filler]
    for depth, fact in reversed(list(zip(DEPTHS, facts, strict=True))):
        sentences.insert(round(depth * n_filler), fact.sentence)
    return demo.RecallCase(seed, facts, asked, " ".join(sentences))


# ---- Questions: (size, depth, case), questions about one prompt in a row ----

_Question = tuple[int, float, demo.RecallCase]


def _demo_questions(n_ctx: int, n_prompts: int, seed: int) -> list[_Question]:
    fact, rest = 7, 64  # tokens of a fact, and of question, template and reply together
    sizes = [n_facts for n_facts in DEMO_SIZES if n_facts * fact + rest <= n_ctx]
    if not sizes:
        raise ArgumentError(f"a context of {n_ctx} tokens has no room for {DEMO_SIZES[0]} facts")
    kinds = len(demo.KINDS)  # the hardest prompts: every name has a fact of each kind
    return [
        (
            n_facts,
            depth,
            demo.recall_prompt(seed + i, n_facts, n_names=-(-n_facts // kinds), asked=round(depth * (n_facts - 1))),
        )
        for n_facts in sizes
        for i in range(n_prompts)
        for depth in DEPTHS
    ]


def _needles(asker: Asker, n_ctx: int, n_prompts: int, seed: int) -> list[_Question]:
    per_ten = asker.tokens(" ".join(demo.FILLER_SENTENCES))
    rest = asker.prompt_tokens(needle_prompt(seed, 0)) + asker.n_predict + 32  # names and values differ in tokens
    fillers = {n_ctx // share: (n_ctx // share - rest) * 10 // per_ten for share in NEEDLE_SHARES}
    sizes = {size: n_filler for size, n_filler in fillers.items() if n_filler >= len(DEPTHS)}
    if not sizes:
        raise ArgumentError(
            f"a context of {n_ctx} tokens is too short for the needle test, whose facts alone take {rest}"
        )
    return [
        (size, depth, needle_prompt(seed + i, n_filler, asked))
        for size, n_filler in sizes.items()
        for i in range(n_prompts)
        for asked, depth in enumerate(DEPTHS)
    ]


# ---- Answers ----


@dataclass(frozen=True)
class Asker:
    """Asks a model through its chat template, greedily, for at most n_predict tokens."""

    model: Llama
    n_predict: int

    def __post_init__(self) -> None:
        if not self.model.has_chat_template:
            raise UnsupportedError(
                f"{self.model.model_info.path.name} has no chat template, which recall needs to ask its questions"
            )

    def reply(self, case: demo.RecallCase, n_predict: int) -> Any:
        """The model's greedy reply, in the form of llama_cpp."""
        try:
            return self.model.create_chat_completion(case.messages, temperature=0.0, max_tokens=n_predict)
        except ValueError as error:
            # llama_cpp raises it for a prompt that does not fit and for a template that it cannot render.
            raise TqggufError(f"{self.model.model_info.path.name} could not be asked: {error}") from error

    def right(self, case: demo.RecallCase) -> bool:
        """Whether the reply names the value asked for, and no other value of the prompt."""
        text = str(self.reply(case, self.n_predict)["choices"][0]["message"]["content"])
        return set(re.findall(r"\w+", text)) & {fact.code for fact in case.facts} == {case.answer}

    def prompt_tokens(self, case: demo.RecallCase) -> int:
        """Tokens of a prompt, template included."""
        return int(self.reply(case, 1)["usage"]["prompt_tokens"])

    def tokens(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.model.tokenize(text.encode(), add_bos=False))
