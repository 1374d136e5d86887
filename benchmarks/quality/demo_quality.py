"""What each KV cache type costs the demo model: greedy texts that stay the same, and right answers by task.

    python benchmarks/quality/demo_quality.py   # all types, 100 recall prompts a size; saves its result
    python benchmarks/quality/demo_quality.py --cases 20 --types f16 pqo4 pqo3 --output -

Tasks: every capital in every form of the question; and recall of one fact out of many, by number of facts (140 are
1,000 tokens of the model, 280 fill its context) and of names (fewer names: more facts that differ in their kind only).
Every prompt is answered from an empty cache, greedily, with flash attention on for every type and without a tail, so
that the cache type is the only difference. Training never drew these prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "common"))

import machine

import tqgguf
from tqgguf.demo import model as demo

RESULTS = Path(__file__).parents[1] / "results" / "demo_quality.json"
TYPES = ("f16", "q8_0", "q4_0", "pqt4", "pqo4", "pqt3", "pqo3")
FIRST_SEED = 3_000_000
RECALL_SIZES = ((16, 124), (64, 124), (140, 124), (140, 35), (280, 124), (280, 70))
"""Facts and names."""


@dataclass(frozen=True)
class Question:
    """One chat message and the judge of its answer."""

    prompt: str
    judge: Callable[[str], bool]


@dataclass(frozen=True)
class Score:
    """One cache type in one task.

    Attributes:
        right: right answers out of n.
        lost, won: questions that the first type measured answered and this one did not, and the other way round.
    """

    task: str
    n: int
    right: int
    lost: int
    won: int


@dataclass(frozen=True)
class Quality:
    """One cache type's figures.

    Attributes:
        type: the cache type, for K and V both.
        bits: bits per value.
        same_text: share of the greedy prompts answered word for word as with the first type measured.
        seconds: of the whole measurement.
    """

    type: str
    bits: float
    same_text: float
    scores: tuple[Score, ...]
    seconds: float


def tasks(n_cases: int) -> dict[str, list[Question]]:
    """Every task's questions."""
    found = {
        "capitals": [
            Question(demo.capital_question(country, form), partial(demo.capital_correct, country=country))
            for country in demo.CAPITALS
            for form in range(len(demo.CAPITAL_QUESTIONS))
        ]
    }
    for n_facts, n_names in RECALL_SIZES:
        cases = [demo.recall_prompt(FIRST_SEED + i, n_facts, n_names=n_names) for i in range(n_cases)]
        found[f"recall, {n_facts} facts, {n_names} names"] = [
            Question(case.prompt, partial(demo.recall_correct, case=case)) for case in cases
        ]
    return found


def answer(model: tqgguf.Llama, prompt: str, n_tokens: int) -> str:
    """A greedy answer from an empty cache."""
    model.reset()
    reply = model.create_chat_completion([{"role": "user", "content": prompt}], temperature=0.0, max_tokens=n_tokens)
    return str(reply["choices"][0]["message"]["content"])


def measure(types: list[str], n_cases: int, n_threads: int | None) -> list[Quality]:
    """Measures types in order; the first one is what the others are compared with."""
    questions = tasks(n_cases)
    rows: list[Quality] = []
    base_texts: list[str] = []
    base_right: dict[str, list[bool]] = {}
    for name in types:
        start = time.perf_counter()
        model = tqgguf.Llama(
            demo.MODEL_PATH,
            cache=name,
            tail=0,
            calibration="off",
            flash_attn=True,
            n_ctx=2048,
            n_batch=2048,
            n_threads=n_threads,
            n_threads_batch=n_threads,
            verbose=False,
        )
        texts = [answer(model, prompt, 32) for prompt in demo.GREEDY_PROMPTS]
        right = {task: [q.judge(answer(model, q.prompt, 16)) for q in asked] for task, asked in questions.items()}
        model.close()
        base_texts, base_right = base_texts or texts, base_right or right
        scores = tuple(
            Score(
                task=task,
                n=len(marks),
                right=sum(marks),
                lost=sum(a and not b for a, b in zip(base_right[task], marks, strict=True)),
                won=sum(b and not a for a, b in zip(base_right[task], marks, strict=True)),
            )
            for task, marks in right.items()
        )
        same = sum(a == b for a, b in zip(texts, base_texts, strict=True)) / len(texts)
        rows.append(Quality(name, tqgguf.CACHE_TYPES[name].bits, same, scores, time.perf_counter() - start))
        print(f"{name}: same text {same:.1%}, {rows[-1].seconds:.0f} s", file=sys.stderr)
        for score in scores:
            print(f"  {score.right / score.n:7.1%} of {score.n}  {score.task}", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=list(TYPES), help="cache types; the first is the reference")
    parser.add_argument("--cases", type=int, default=100, help="recall prompts of each size (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads (default: half of the processors)")
    parser.add_argument("--output", default=str(RESULTS), help="JSON file, - for stdout")
    args = parser.parse_args()
    rows = measure(args.types, args.cases, args.threads)
    result = {
        "command": " ".join(["python", "benchmarks/quality/demo_quality.py", *sys.argv[1:]]),
        "machine": machine.facts(),
        "model": demo.MODEL_PATH.name,
        "greedy_prompts": len(demo.GREEDY_PROMPTS),
        "types": [asdict(row) for row in rows],
    }
    text = json.dumps(result, indent=1) + "\n"
    if args.output == "-":
        print(text, end="")
    else:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(text)


if __name__ == "__main__":
    main()
