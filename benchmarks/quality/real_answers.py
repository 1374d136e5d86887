"""What cache types cost answers of two real language models: token by token, and by the right answer's probability.

    python benchmarks/quality/real_answers.py

Caches are as `Llama` has them: a tail of 128 and calibrated keys with types of tqgguf (which are measured without the
calibration, too), neither with stock types. Two kinds of figures, saved in benchmarks/results/real_answers.json:

Continuations, as `tqgguf compare --generate` makes them. f16 answers, every cache follows it one token at a time.
    greedy  50 short answers to the texts: after how many tokens would a cache have said something else?
    drawn   1,000 tokens at temperature 0.8: does the divergence grow with the length of the answer? (A long greedy
            answer of models this small soon repeats itself, which any cache gets right. It is measured, too.)

Tasks with one right answer, which the model is given in turn and whose probability counts. All tokens are computed as
a prompt is.
    needle      sentences "The code of Anna is 4821." at five depths of filler, about 1,100 tokens
    key-value   a JSON object of 40 random keys and values
    arithmetic  40 sums of two digits, after 40 solved ones
    copying     a list of 80 random words, once more
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "common"))

import machine
import real_sources

import tqgguf
from tqgguf.diagnostics import recall
from tqgguf.diagnostics.compare import Reader, Trial, also_calibrated, further_context, load, log_softmax

RESULTS: Final = Path(__file__).parents[1] / "results" / "real_answers.json"

CACHES: Final = ("q8_0", "q5_0", "q4_0", "pqt5", "pqt4", "pqo4", "pqt3", "pqo3", "pqt2")
CONTINUED: Final = ("q8_0", "q4_0", "pqt4", "pqt3")
"""Those that follow answers token by token, which takes longest."""

TOGETHER: Final = 4
"""Caches beside the reference at a time, each with and without calibration, for memory's sake."""

CONTEXT: Final = 2048
N_BATCH: Final = 512
ROUNDS: Final = 2
"""Prompts of each task."""


# ---- Tasks ----


@dataclass
class Prompt:
    """Text in pieces; the model has to say some of them.

    Attributes:
        pieces: text, in order.
        answers: (index of a piece that is an answer, group of the table it counts for).
    """

    pieces: list[str] = field(default_factory=list)
    answers: list[tuple[int, str]] = field(default_factory=list)

    def add(self, text: str) -> None:
        self.pieces.append(text)

    def ask(self, question: str, answer: str, group: str) -> None:
        """Adds a question, and the right answer as one that counts."""
        self.pieces += [question, answer]
        self.answers.append((len(self.pieces) - 1, group))


def needle(seed: int) -> Prompt:
    """Five facts in filler, asked for in random order."""
    prompt, case = Prompt(), recall.needle_prompt(seed, 110)
    prompt.add(case.context + "\n\n")
    asked = list(zip(recall.DEPTHS, case.facts, strict=True))
    for depth, fact in random.Random(seed).sample(asked, len(asked)):
        before, value, after = fact.sentence.partition(fact.code)
        prompt.ask(before.rstrip(), f" {value}", f"{depth:.0%}")
        prompt.add(f"{after}\n")
    return prompt


def key_value(seed: int) -> Prompt:
    """A JSON object, of which ten values are asked for."""
    draw, prompt = random.Random(seed), Prompt()
    keys = draw.sample([f"{a}_{b}" for a in WORDS for b in WORDS if a != b], 40)
    values = {key: str(draw.randrange(1000, 10000)) for key in keys}
    prompt.add("{\n" + "".join(f'  "{key}": "{value}",\n' for key, value in values.items()) + "}\n\n")
    for i in draw.sample(range(len(keys)), 10):
        prompt.ask(f'"{keys[i]}": "', values[keys[i]], f"{(5 * i // len(keys)) * 20 + 10} %")
        prompt.add('"\n')
    return prompt


def arithmetic(seed: int) -> Prompt:
    """Sums; those behind the first 40 count."""
    draw, prompt = random.Random(seed), Prompt()
    for i in range(80):
        a, b = draw.randrange(1, 10), draw.randrange(1, 10)
        if i < 40:
            prompt.add(f"{a} + {b} = {a + b}\n")
        else:
            prompt.ask(f"{a} + {b} =", f" {a + b}", "all")
            prompt.add("\n")
    return prompt


def copying(seed: int) -> Prompt:
    """A list of words twice; from the fourth on, each word of the second time counts."""
    draw, prompt = random.Random(seed), Prompt()
    words = [draw.choice(WORDS) for _ in range(80)]
    prompt.add(f"List: {', '.join(words)}\n\nThe same list again: {', '.join(words[:3])}")
    for i, word in enumerate(words[3:], 3):
        prompt.ask(",", f" {word}", f"{i // 20 * 20 + 1}-{i // 20 * 20 + 20}")
    return prompt


WORDS: Final = re.findall(
    r"\w+",
    """river stone window garden paper silver morning winter bridge candle forest island mirror orange pencil
    rabbit shadow summer tunnel valley basket copper desert engine feather guitar hammer jacket kitchen ladder""",
)

TASKS: Final[dict[str, Callable[[int], Prompt]]] = {
    "needle": needle,
    "key-value": key_value,
    "arithmetic": arithmetic,
    "copying": copying,
}


@dataclass(frozen=True)
class Marked:
    """A prompt's tokens (n,) int32, and the answers as (first token, token behind the last, group)."""

    tokens: np.ndarray
    answers: list[tuple[int, int, str]]

    @classmethod
    def of(cls, model: tqgguf.Llama, prompt: Prompt) -> Marked:
        edges, tokens = [], []
        for i, piece in enumerate(prompt.pieces):
            tokens += model.tokenize(piece.encode(), add_bos=i == 0, special=False)
            edges.append(len(tokens))
        answers = [(edges[i - 1], edges[i], group) for i, group in prompt.answers]
        return cls(np.array(tokens, np.int32), answers)


def answered(reader: Reader, marked: Marked, n_vocab: int) -> Iterator[tuple[str, float, bool]]:
    """For each answer of a prompt: its group, its log-probability, and whether every token of it is the likeliest."""
    scored = np.zeros(len(marked.tokens), np.int8)
    for first, end, _ in marked.answers:
        scored[first - 1 : end - 1] = 1
    log_probs, hits = {}, {}
    reader.forget()
    for start in range(0, len(scored), N_BATCH):
        part = scored[start : start + N_BATCH]
        reader.decode(marked.tokens[start : start + N_BATCH], part)
        places = start + np.flatnonzero(part)
        if len(places):
            found = log_softmax(reader.logits(len(places), n_vocab))
            for place, row in zip(places, found, strict=True):
                token = marked.tokens[place + 1]
                log_probs[place + 1], hits[place + 1] = row[token], row.argmax() == token
    for first, end, group in marked.answers:
        places = range(first, end)
        yield group, float(sum(log_probs[i] for i in places)), all(hits[i] for i in places)


def tasks(path: Path, caches: Sequence[str], n_threads: int | None) -> dict[str, Any]:
    """By task: for each cache the mean log-probability of the right answers, of all and by group, and those given."""
    trial = Trial.of(path, ("f16", *caches), None, CONTEXT)
    named = also_calibrated(trial.info, trial.caches, None, n_threads, None)
    found: dict[str, dict[str, list[tuple[str, float, bool]]]] = {name: {} for name in TASKS}
    with contextlib.closing(load(path, trial.caches[0], CONTEXT, n_threads, n_batch=N_BATCH, swa_full=False)) as model:
        prompts = {name: [Marked.of(model, make(seed)) for seed in range(ROUNDS)] for name, make in TASKS.items()}
        for cache in named:
            own = contextlib.nullcontext(model.ctx) if cache is named[0] else further_context(model, cache)
            with own as context:
                reader = Reader(cache, context)
                for name, marked in prompts.items():
                    found[name][cache.label] = [x for m in marked for x in answered(reader, m, model.n_vocab())]
    return {
        name: {
            "tokens": round(float(np.mean([len(m.tokens) for m in prompts[name]]))),
            "rows": [{"type": label, **summary(answers)} for label, answers in by_cache.items()],
        }
        for name, by_cache in found.items()
    }


def summary(answers: Sequence[tuple[str, float, bool]]) -> dict[str, Any]:
    """Number, right ones, and mean log-probabilities."""
    groups = list(dict.fromkeys(group for group, _, _ in answers))
    groups.sort(key=lambda group: float(group.partition("-")[0].rstrip(" %")) if group != "all" else 0)
    return {
        "n": len(answers),
        "right": sum(right for _, _, right in answers),
        "log_probability": float(np.mean([value for _, value, _ in answers])),
        "groups": {g: float(np.mean([value for group, value, _ in answers if group == g])) for g in groups},
    }


# ---- Continuations ----


CONTINUATIONS: Final[dict[str, dict[str, Any]]] = {
    "short greedy answers": {"text": "chat", "n_chunks": 50, "n_ctx": 320, "n_generate": 64},
    "a long drawn answer": {"text": "prose", "n_chunks": 1, "n_ctx": 2048, "n_generate": 1000, "temperature": 0.8},
    "a long greedy answer": {"text": "prose", "n_chunks": 1, "n_ctx": 2048, "n_generate": 1000},
}


def continuations(path: Path, caches: Sequence[str], n_threads: int | None) -> dict[str, Any]:
    """By kind of answer: what `tqgguf.continuation` finds."""
    found: dict[str, Any] = {}
    for name, options in CONTINUATIONS.items():
        rows: dict[str, Any] = {}
        for first in range(0, len(caches), TOGETHER):
            done = tqgguf.continuation(
                path,
                ("f16", *caches[first : first + TOGETHER]),
                **{**options, "text": real_sources.text(options["text"])},
                n_threads=n_threads,
            )
            rows.update((row.type, asdict(row)) for row in done.rows)
        found[name] = {**options, "n_prompt": done.n_prompt, "rows": list(rows.values())}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(real_sources.MODELS), default=list(real_sources.MODELS))
    parser.add_argument("--cache", default=",".join(CACHES), help="types to compare with f16 (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="default: as many as there are processors")
    parser.add_argument("--output", default=str(RESULTS), help="file for the results, or - (default: %(default)s)")
    args = parser.parse_args()
    caches = args.cache.split(",")
    command = " ".join(["python", "benchmarks/quality/real_answers.py", *sys.argv[1:]])
    result: dict[str, Any] = {"command": command, "machine": machine.facts(), "models": []}
    try:
        for key in args.models:
            path, start = real_sources.model_path(key), time.monotonic()
            found = {
                "model": real_sources.MODELS[key].name,
                "tasks": tasks(path, caches, args.threads),
                "continuations": continuations(path, [c for c in caches if c in CONTINUED], args.threads),
            }
            result["models"].append({**found, "seconds": round(time.monotonic() - start)})
            machine.save(result, args.output)
    except (real_sources.SourceError, tqgguf.TqggufError) as error:
        sys.exit(f"real_answers.py: {error}")


if __name__ == "__main__":
    main()
