"""What the precise tail costs in speed: decode and prefill of a model, with and without, in turn.

    python benchmarks/speed/tail.py            # a model of random weights; saves results/tail.json
    python benchmarks/speed/tail.py --output - # prints only
    python benchmarks/speed/tail.py --output - --model model.gguf --cache q4_0 q8_0 --depths 2000

Each round reads a prompt of every depth from an empty cache, in batches as `tqgguf.Llama` cuts it, then decodes tokens
behind it, with one cache after the other, so that slow and fast moments of the machine meet all of them. Figures are
medians over rounds, ratios are those of a round's neighbours. What the tail does to predictions: `tqgguf compare --tail
0,128`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "common"))

import machine
import numpy as np
import random_model
from decoding import read

import tqgguf
from tqgguf._native import import_llama_cpp

llama_cpp: Any = import_llama_cpp()

RESULTS = Path(__file__).parents[1] / "results" / "tail.json"
SHAPE = random_model.Shape()
TAILS = (0, 128)


def measure(
    path: Path, cache: str, depths: list[int], n_decode: int, rounds: int, n_threads: int
) -> list[dict[str, Any]]:
    """Seconds of prefill and of one decoded token at each depth, with each tail."""
    options: dict[str, Any] = {"n_batch": 512, "n_threads": n_threads, "n_threads_batch": n_threads}
    model = tqgguf.Llama(path, cache=cache, tail=TAILS[0], n_ctx=max(depths) + n_decode, verbose=False, **options)
    contexts = {TAILS[0]: model.ctx, **{tail: model.add_context(cache, tail=tail) for tail in TAILS[1:]}}
    tokens = np.random.default_rng(0).integers(0, model.n_vocab(), max(depths) + n_decode).astype(np.int32)
    rows = []
    for depth in depths:
        prefill: dict[int, list[float]] = {tail: [] for tail in TAILS}
        decode: dict[int, list[float]] = {tail: [] for tail in TAILS}
        for i in range(rounds):
            for tail in TAILS if i % 2 else TAILS[::-1]:
                llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(contexts[tail]), True)
                prefill[tail].append(read(contexts[tail], tokens[:depth], 512))
                steps = [read(contexts[tail], tokens[depth + j : depth + j + 1], 1) for j in range(n_decode)]
                decode[tail].append(median(steps))
        for tail in TAILS:
            rows.append(
                {
                    "cache": cache,
                    "depth": depth,
                    "tail": tail,
                    "prefill_tokens_per_s": depth / median(prefill[tail]),
                    "decode_tokens_per_s": 1 / median(decode[tail]),
                    "prefill_ratio": median(a / b for a, b in zip(prefill[TAILS[0]], prefill[tail], strict=True)),
                    "decode_ratio": median(a / b for a, b in zip(decode[TAILS[0]], decode[tail], strict=True)),
                }
            )
    model.close()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file in place of random weights")
    parser.add_argument("--cache", nargs="+", default=["pqo3", "pqo4"])
    parser.add_argument("--depths", nargs="+", type=int, default=[256, 2000, 8000])
    parser.add_argument("--tokens", type=int, default=64, help="decoded behind each prompt")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default=str(RESULTS), help="result file, or - for none")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or Path(folder) / "random.gguf"
        if args.model is None:
            random_model.write(path, SHAPE)
        for cache in args.cache:
            rows += measure(path, cache, args.depths, args.tokens, args.rounds, args.threads)
    print("cache  depth  tail  prefill tok/s  decode tok/s  speed against tail 0: prefill, decode")
    for r in rows:
        print(
            f"{r['cache']:5}  {r['depth']:5}  {r['tail']:4}  {r['prefill_tokens_per_s']:13.1f}  "
            f"{r['decode_tokens_per_s']:12.1f}  {r['prefill_ratio']:.3f}  {r['decode_ratio']:.3f}"
        )
    if args.output != "-":
        result = {
            "machine": machine.facts(),
            "arguments": sys.argv[1:],
            "shape": args.model.name if args.model else SHAPE.name,
            "rows": rows,
        }
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
