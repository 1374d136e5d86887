"""Accuracy of the demo model as llama.cpp runs it: chat template, greedy decoding, a chosen KV cache type.

    python benchmarks/demo_accuracy.py --cache-type f16 q8_0 q4_0 --cases 200

Works with the stock `llama_cpp` package; prints one line per measurement and, with `--json`, saves them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import llama_cpp

from tqgguf import demo

CACHE_TYPES = ("f16", "q8_0", "q5_0", "q4_0", "iq4_nl")
FIRST_SEED = 2_000_000
RECALL_SIZES = ((16, 124), (64, 124), (140, 124), (140, 35), (280, 124))
"""Facts and names of the recall prompts; 140 facts are 1,000 tokens, 280 are 2,000."""


@dataclass(frozen=True)
class Case:
    """One chat and the judge of its answer."""

    messages: list[demo.Message]
    judge: Callable[[str], bool]


@dataclass(frozen=True)
class Measurement:
    """Share of right answers to one kind of question."""

    cache_type: str
    task: str
    n_cases: int
    n_prompt_tokens: float
    """Mean over the cases, chat template included."""
    accuracy: float
    seconds: float


def capital_cases() -> list[Case]:
    """Every country in every form of the question."""
    forms = range(len(demo.CAPITAL_QUESTIONS))
    return [
        Case(
            [{"role": "user", "content": demo.capital_question(country, form)}],
            partial(demo.capital_correct, country=country),
        )
        for country in demo.CAPITALS
        for form in forms
    ]


def recall_cases(n_cases: int, n_facts: int, n_names: int) -> list[Case]:
    """Recall prompts whose seeds the training run never used."""
    cases = [demo.recall_prompt(FIRST_SEED + i, n_facts, n_names=n_names) for i in range(n_cases)]
    return [Case(case.messages, partial(demo.recall_correct, case=case)) for case in cases]


def measure(llm: llama_cpp.Llama, cache_type: str, task: str, cases: list[Case]) -> Measurement:
    """Ask every case and count the right answers."""
    start = time.monotonic()
    n_right = n_tokens = 0
    for case in cases:
        reply = llm.create_chat_completion(case.messages, temperature=0.0, max_tokens=24)
        n_right += case.judge(reply["choices"][0]["message"]["content"])
        n_tokens += reply["usage"]["prompt_tokens"]
    n_cases = len(cases)
    return Measurement(
        cache_type, task, n_cases, round(n_tokens / n_cases, 1), n_right / n_cases, round(time.monotonic() - start, 1)
    )


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo.MODEL_PATH)
    parser.add_argument("--cache-type", nargs="+", choices=CACHE_TYPES, default=["f16"], help="of both K and V")
    parser.add_argument("--cases", type=int, default=200, help="recall prompts per size (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where to save the measurements")
    args = parser.parse_args()

    tasks = {"capitals": capital_cases()}
    for n_facts, n_names in RECALL_SIZES:
        tasks[f"{n_facts} facts, {n_names} names"] = recall_cases(args.cases, n_facts, n_names)
    results = []
    for cache_type in args.cache_type:
        ggml_type = getattr(llama_cpp, f"GGML_TYPE_{cache_type.upper()}")
        llm = llama_cpp.Llama(
            str(args.model),
            n_ctx=2048,
            n_batch=512,
            n_threads=args.threads,
            n_threads_batch=args.threads,
            type_k=ggml_type,
            type_v=ggml_type,
            flash_attn=True,
            verbose=False,
        )
        for task, cases in tasks.items():
            results.append(measure(llm, cache_type, task, cases))
            last = results[-1]
            print(f"{cache_type:7s} {last.accuracy:8.2%}  {last.n_prompt_tokens:7.1f} tokens  {task}", flush=True)
        llm.close()
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
