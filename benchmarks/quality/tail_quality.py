"""What the precise tail does to the demo model's predictions, by its length and by the tokens computed at once.

    python benchmarks/quality/tail_quality.py   # saves results/tail_quality.json, prints that of docs/quality.md
    python benchmarks/quality/tail_quality.py --chunks 1 --output -

Each token of a batch reads what it would read alone, so the tokens computed at once must not matter.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "common"))

import machine

from tqgguf import read_model_info
from tqgguf.cache.policy import resolve
from tqgguf.demo import model as demo
from tqgguf.diagnostics.compare import NamedCache, Reader, load, read_chunks
from tqgguf.diagnostics.texts import own_text, text_chunks

RESULTS = Path(__file__).parents[1] / "results" / "tail_quality.json"
N_CTX = 2048
UBATCHES = (1, 64, 512, 2048)
TAILS = (0, 1, 32, 128, 512)
"""A tail of one token is little more than the first four."""


def measure(cache: str, n_ubatch: int, n_chunks: int, n_threads: int) -> list[dict[str, Any]]:
    """Mean divergence from f16 with each tail."""
    info = read_model_info(demo.MODEL_PATH)
    reference = NamedCache("f16", resolve("f16", info.n_layer))
    policy = resolve(cache, info.n_layer)
    with contextlib.closing(
        load(demo.MODEL_PATH, reference, N_CTX, n_threads, n_batch=N_CTX, n_ubatch=n_ubatch)
    ) as model:
        chunks = text_chunks(model, own_text(info, N_CTX, n_chunks), N_CTX, n_chunks, special=True)
        readers = [Reader(reference, model.ctx)]
        for tail in TAILS:
            readers.append(Reader(NamedCache(cache, policy, tail), model.add_context(policy, tail=tail)))
        read_chunks(model, readers, chunks, None)
        found = [reader.quality(info, N_CTX, chunks.size) for reader in readers[1:]]
    return [
        {
            "cache": cache,
            "n_ubatch": n_ubatch,
            "tail": row.tail,
            "bytes": row.bytes,
            "mean_kld": row.kld.mean,
            "mean_kld_error": row.kld.mean_error,
            "same_top": row.same_top,
        }
        for row in found
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", nargs="+", default=["pqo3", "pqo4"])
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default=str(RESULTS), help="result file, or - for none")
    args = parser.parse_args()
    rows = []
    print("| cache | at once | " + " | ".join(f"tail {tail}" for tail in TAILS) + " |")
    print("|---|---|" + "---|" * len(TAILS))
    for cache in args.cache:
        for n_ubatch in UBATCHES:
            found = measure(cache, n_ubatch, args.chunks, args.threads)
            print(
                f"| {cache} | {n_ubatch} | " + " | ".join(f"{row['mean_kld']:.3g}" for row in found) + " |", flush=True
            )
            rows += found
    if args.output != "-":
        result = {"machine": machine.facts(), "arguments": sys.argv[1:], "chunks": args.chunks, "rows": rows}
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
