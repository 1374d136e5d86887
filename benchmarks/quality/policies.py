"""What tuned cache policies cost the demo model, beside single types in all layers, on text that tuning did not read.

    python benchmarks/quality/policies.py   # saves results/policies.json, prints the table of docs/quality.md
    python benchmarks/quality/policies.py --chunks 4 --budgets 4 --output -

A conversation of the demo model is cut in two: `tqgguf.tune` measures layers on the first half, and every figure here
is of the second. Keys are calibrated, those of single types, too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "common"))

import machine

import tqgguf
from tqgguf import Tuning, TypeQuality
from tqgguf.demo import model as demo

RESULTS = Path(__file__).parents[1] / "results" / "policies.json"
CHOICES = (("pqt3", "pqt4", "q8_0"), ("pqo3", "pqo4", "q8_0"))
BUDGETS = (3.75, 4.0, 5.0)


def row(quality: TypeQuality, **more: Any) -> dict[str, Any]:
    """Figures of one cache on the held-out part."""
    kld = quality.kld
    return {
        "cache": quality.type,
        "bits": quality.bits,
        "bytes_per_token": quality.bytes_per_token,
        "mean_kld": kld.mean,
        "mean_kld_error": kld.mean_error,
        "kld_p99": kld.p99,
        "same_top": quality.same_top,
        **more,
    }


def tuned_row(tuning: Tuning, budget: float) -> dict[str, Any]:
    """The same of a policy, and what it is made of."""
    policy = tuning.policy
    return row(
        tuning.rows[1],
        budget=budget,
        types=tuning.types,
        types_k=policy.types_k,
        types_v=policy.types_v,
        calibrated=policy.calibrated,
        predicted_tuning=tuning.predicted,
        measured_tuning=tuning.measured,
        line=tuning.line,
        bands=[vars(found) for found in tuning.bands],
        notes=tuning.notes,
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, by bits."""
    lines = ["| cache | bits | bytes/token | mean KLD | ± | 99 % | same top | of the line |", "|---|" + "---|" * 7]
    for found in sorted(rows, key=lambda found: (found["bits"], -found["mean_kld"])):
        name = f"policy of {', '.join(found['types'])}" if "types" in found else found["cache"]
        line = f"{found['mean_kld'] / found['line']:.2f}" if found.get("line") else ""
        lines.append(
            f"| {name} | {found['bits']:.4g} | {found['bytes_per_token']:,} | {found['mean_kld']:#.3g} "
            f"| {found['mean_kld_error']:#.2g} | {found['kld_p99']:#.3g} | {found['same_top']:.2%} | {line} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, default=demo.MODEL_PATH, help="GGUF file (default: the demo model)")
    parser.add_argument("-f", "--file", type=Path, help="text (default: the demo model's own)")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="bits (default: %(default)s)")
    parser.add_argument("--chunks", type=int, default=8, help="both halves together (default: %(default)s)")
    parser.add_argument("--ctx", type=int, default=2048, help="tokens in a chunk (default: %(default)s)")
    parser.add_argument("--tail", type=int, default=0, help="newest tokens kept in f16 (default: none)")
    parser.add_argument("--threads", type=int, help="threads (default: all processors)")
    parser.add_argument("--output", default=str(RESULTS), help="file, - for none (default: %(default)s)")
    args = parser.parse_args()
    text = args.file.read_text(encoding="utf-8") if args.file else None
    rows: list[dict[str, Any]] = []
    for types in CHOICES:
        for budget in args.budgets:
            goal: dict[str, Any] = {"budget": budget, "types": types, "tail": args.tail}
            size = {"n_ctx": args.ctx, "n_chunks": args.chunks, "n_threads": args.threads}
            tuning = tqgguf.tune(args.model, text, **goal, **size)
            rows.append(tuned_row(tuning, budget))
            known = {found["cache"] for found in rows}
            rows += [row(quality) for quality in tuning.rows[2:] if quality.type not in known]
            print(f"{types} {budget}: {tuning.policy.types_k} {tuning.policy.types_v}", file=sys.stderr, flush=True)
    print(table(rows))
    if args.output != "-":
        text_of = {"model": args.model.name, "n_ctx": args.ctx, "n_chunks": args.chunks, "tail": args.tail}
        Path(args.output).write_text(
            json.dumps({"machine": machine.facts(), **text_of, "caches": rows}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
