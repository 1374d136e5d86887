"""What decides how good a calibration of keys is: the exponent of the gain, the text, its positions, how long it is.

    python benchmarks/quality/calibration.py     # saves results/calibration.json

Each variant is measured as `tqgguf compare` does, on prose of benchmarks/common/real_sources.py at 2,048 tokens, and
those of DEEP at 8,192, without a tail, beside the plain type. The text is that of `tqgguf calibrate`, or the one of
real_sources that a variant names. Nothing is calibrated on what it is measured on, but for the row "prose", which says
how much there is to gain by that.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final
from unittest import mock

sys.path.append(str(Path(__file__).parents[1] / "common"))

import machine
import numpy as np
import real_sources
from rich.console import Console
from rich.table import Table

import tqgguf
from tqgguf.cache.policy import resolve
from tqgguf.model import calibrate as calibrating

RESULTS: Final = Path(__file__).parents[1] / "results" / "calibration.json"

VARIANTS: Final[dict[str, dict[str, Any]]] = {
    "mean alone": {"exponent": 0.0},
    "exponent 0.5": {"exponent": 0.5},
    "exponent 0.75, the default": {},
    "exponent 1": {"exponent": 1.0},
    "every pair alike": {"weighted": False},
    "at the beginning alone": {"starts": (0,)},
    "256 tokens": {"n_tokens": 256},
    "1,024 tokens": {"n_tokens": 1024},
    "code": {"text": "code"},
    "chat": {"text": "chat"},
    "prose": {"text": "prose"},
}
DEEP: Final = ("exponent 0.75, the default", "at the beginning alone")


def calibrated(path: Path, n_threads: int | None, variant: dict[str, Any]) -> tqgguf.Calibration:
    """The calibration of a variant."""
    text = real_sources.text(variant["text"]) if "text" in variant else None
    exponent = variant.get("exponent", calibrating.EXPONENT)
    statistics, starts = calibrating.key_statistics, calibrating.far_starts
    with (
        mock.patch.object(calibrating, "EXPONENT", exponent),
        mock.patch.object(calibrating, "far_starts", lambda *sizes: variant.get("starts") or starts(*sizes)),
        mock.patch.object(
            calibrating, "key_statistics", lambda inputs: statistics(inputs, variant.get("weighted", True))
        ),
    ):
        found = tqgguf.calibrate(path, text, n_tokens=variant.get("n_tokens"), n_threads=n_threads)
    return found if exponent else replace(found, gains={})


def channels(key: str, layer: int, head: int) -> dict[str, Any]:
    """RMS of queries and keys, and the mean and gain of keys, of every channel of a KV head."""
    seen: dict[int, calibrating.KeyStatistics] = {}
    statistics = calibrating.key_statistics

    def noted(inputs: Any) -> calibrating.KeyStatistics:
        seen[inputs.layer] = statistics(inputs)
        return seen[inputs.layer]

    with mock.patch.object(calibrating, "key_statistics", noted):
        found = tqgguf.calibrate(real_sources.model_path(key))
    mean, k2, q2 = (values[head] for values in (seen[layer].mean, seen[layer].k2, seen[layer].q2))
    vectors = {"q": np.sqrt(q2), "k": np.sqrt(k2 + mean**2), "mean": mean, "gain": found.gains[layer][head]}
    vectors["stored"] = vectors["gain"] * np.sqrt(k2)
    vectors["read"] = vectors["q"] / vectors["gain"]
    rounded = {name: [float(f"{x:.4g}") for x in values] for name, values in vectors.items()}
    return {"model": real_sources.MODELS[key].name, "layer": layer, "head": head, **rounded}


def measure(
    key: str, kind: str, names: Sequence[str], n_ctx: int, n_chunks: int, n_threads: int | None
) -> list[dict[str, Any]]:
    """A row for the plain type and for each variant."""
    path = real_sources.model_path(key)
    info = tqgguf.read_model_info(path)
    plain = resolve(kind, info.n_layer)
    rows: list[dict[str, Any]] = []
    for first in range(0, len(names), 5):  # a context of Gemma takes about 1 GiB
        group = names[first : first + 5]
        policies = [calibrated(path, n_threads, VARIANTS[name]).applied(plain, info) for name in group]
        found = tqgguf.compare(
            path,
            ["f16", kind, *policies],
            real_sources.text("prose"),
            tails=(0,),
            n_ctx=n_ctx,
            n_chunks=n_chunks,
            n_threads=n_threads,
            calibration="off",
        )
        named = zip(["plain", *group], found.rows[1:], strict=True)
        rows += [{"variant": name, **asdict(row)} for name, row in named if name != "plain" or not first]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(real_sources.MODELS), default=list(real_sources.MODELS))
    parser.add_argument("--cache", nargs="+", default=["pqt3"])
    parser.add_argument("--chunks", type=int, default=1, help="of 2,048 tokens (default: 1)")
    parser.add_argument("--threads", type=int, help="default: as many as there are processors")
    parser.add_argument("--output", default=str(RESULTS), help="file for the results, or - (default: %(default)s)")
    args = parser.parse_args()
    command = " ".join(["python", "benchmarks/quality/calibration.py", *sys.argv[1:]])
    result: dict[str, Any] = {"command": command, "machine": machine.facts(), "runs": []}
    try:
        result["channels"] = channels("smollm2", 12, 0)
        for key in args.models:
            name = real_sources.MODELS[key].name
            for kind, (n_ctx, names) in itertools.product(args.cache, ((2048, VARIANTS), (8192, DEEP))):
                rows = measure(key, kind, list(names), n_ctx, args.chunks if n_ctx == 2048 else 1, args.threads)
                result["runs"].append({"model": name, "cache": kind, "n_ctx": n_ctx, "rows": rows})
                shown = Table("calibration", "mean KLD", "of plain", "median", "99.9 %", "perplexity")
                shown.title = f"{name}, {kind}, {n_ctx:,} tokens"
                for row in rows:
                    kld = row["kld"]
                    figures = (kld["mean"], kld["mean"] / rows[0]["kld"]["mean"], kld["median"], kld["p999"])
                    shown.add_row(row["variant"], *(f"{x:.3g}" for x in figures), f"{row['perplexity']:.2f}")
                Console(width=110).print(shown)
                machine.save(result, args.output)
    except (real_sources.SourceError, tqgguf.TqggufError) as error:
        sys.exit(f"calibration.py: {error}")


if __name__ == "__main__":
    main()
