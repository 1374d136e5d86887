"""What each KV cache type costs the demo model: greedy texts that stay the same, and recall at 1,000 tokens.

    python benchmarks/demo_quality.py                 # all types, 200 recall prompts, saves results/demo_quality.json
    python benchmarks/demo_quality.py --cases 20 --types f16 pqo4 pqo3 --output -

Every prompt is answered from an empty cache, greedily, with flash attention on for every type, so that the cache type
is the only difference.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tqgguf
from tqgguf import demo

RESULTS = Path(__file__).parent / "results" / "demo_quality.json"
TYPES = ("f16", "q8_0", "q4_0", "pqo4", "pqo3")
FIRST_SEED = 3_000_000
N_FACTS = 140  # 1,000 tokens of the demo model


@dataclass(frozen=True)
class Quality:
    """One cache type's figures.

    Attributes:
        type: the cache type, for K and V both.
        bits: bits per value.
        same_text: share of the greedy prompts answered word for word as with the first type measured.
        recall: share of the recall prompts answered right.
        recall_error: standard error of that share.
        paired_loss: prompts lost and won against the first type, on the same recall prompts.
        seconds: of the whole measurement.
    """

    type: str
    bits: float
    same_text: float
    recall: float
    recall_error: float
    paired_loss: tuple[int, int]
    seconds: float


def answers(model: tqgguf.Llama, prompts: list[str], n_tokens: int) -> list[str]:
    """Greedy answers, each from an empty cache."""
    texts = []
    for prompt in prompts:
        model.reset()
        reply = model.create_chat_completion(
            [{"role": "user", "content": prompt}], temperature=0.0, max_tokens=n_tokens
        )
        texts.append(str(reply["choices"][0]["message"]["content"]))
    return texts


def measure(types: list[str], n_cases: int, n_threads: int | None) -> list[Quality]:
    """Measures types in order; the first one is what the others are compared with."""
    cases = [demo.recall_prompt(FIRST_SEED + i, N_FACTS) for i in range(n_cases)]
    rows: list[Quality] = []
    base_texts: list[str] = []
    base_right: list[bool] = []
    for name in types:
        start = time.perf_counter()
        model = tqgguf.Llama(
            demo.MODEL_PATH, cache=name, flash_attn=True, n_ctx=2048, n_batch=2048, n_threads=n_threads, verbose=False
        )
        texts = answers(model, list(demo.GREEDY_PROMPTS), 32)
        recalled = answers(model, [case.prompt for case in cases], 16)
        model.close()
        right = [demo.recall_correct(text, case) for text, case in zip(recalled, cases, strict=True)]
        base_texts, base_right = base_texts or texts, base_right or right
        share = sum(right) / n_cases
        rows.append(
            Quality(
                type=name,
                bits=tqgguf.CACHE_TYPES[name].bits,
                same_text=sum(a == b for a, b in zip(texts, base_texts, strict=True)) / len(texts),
                recall=share,
                recall_error=math.sqrt(share * (1 - share) / n_cases),
                paired_loss=(
                    sum(a and not b for a, b in zip(base_right, right, strict=True)),
                    sum(b and not a for a, b in zip(base_right, right, strict=True)),
                ),
                seconds=time.perf_counter() - start,
            )
        )
        row = rows[-1]
        print(
            f"{row.type:7} {row.bits:5.1f} bits  same text {row.same_text:6.1%}  recall {row.recall:6.1%} "
            f"(+-{row.recall_error:.1%}, lost {row.paired_loss[0]}, won {row.paired_loss[1]})  {row.seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=list(TYPES), help="cache types; the first is the reference")
    parser.add_argument("--cases", type=int, default=200, help="recall prompts (default: 200)")
    parser.add_argument("--threads", type=int, help="threads (default: half of the processors)")
    parser.add_argument("--output", default=str(RESULTS), help="JSON file, - for stdout")
    args = parser.parse_args()
    rows = measure(args.types, args.cases, args.threads)
    result = {
        "model": demo.MODEL_PATH.name,
        "tqgguf": tqgguf.__version__,
        "greedy_prompts": len(demo.GREEDY_PROMPTS),
        "recall_prompts": args.cases,
        "recall_facts": N_FACTS,
        "types": [asdict(row) for row in rows],
    }
    text = json.dumps(result, indent=2) + "\n"
    if args.output == "-":
        print(text, end="")
    else:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(text)


if __name__ == "__main__":
    main()
