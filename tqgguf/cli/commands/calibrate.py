"""`tqgguf calibrate`: measures mean and gain of a model's keys."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from ..options import check_output, positive, threads
from ..render.format import show
from ..render.progress import Bar


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "calibrate",
        help="measures a mean and a gain for each channel of a model's keys",
        description="Reads a text once and measures, for each channel of each KV head, what is subtracted from keys "
        "and what they are multiplied by before they are stored. That changes nothing that the model computes, but "
        "makes the error of quantized keys smaller, at no byte. The result is kept where --calibration auto finds it.",
        epilog="example: tqgguf calibrate model.gguf && tqgguf chat model.gguf --cache pqt3 --calibration auto",
    )
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("-f", "--file", metavar="TEXT", help="a UTF-8 text file (default: a text of tqgguf's own)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write it there, for --calibration FILE")
    parser.add_argument(
        "--tokens", type=positive, metavar="N", help="of the text, taken evenly from all of it (default: 1408 at most)"
    )
    parser.add_argument("--threads", type=threads, metavar="N", help="threads (default: all processors)")
    parser.add_argument("--json", action="store_true", help="print what was measured, and where it is, as JSON")
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> int:
    """Runs the command."""
    from ...cache.calibration import read_calibration, stored_calibration
    from ...diagnostics.texts import read_text
    from ...model.calibrate import calibrate

    if args.output:
        check_output(args.output, "calibration", read_calibration)
    text = None if args.file is None else read_text(args.file)
    start = time.monotonic()
    with contextlib.closing(Bar()) as bar:
        found = calibrate(
            args.model, text, n_tokens=args.tokens, n_threads=args.threads, progress=partial(bar, "calibrating")
        )
    seconds = time.monotonic() - start
    path = args.output or stored_calibration(found.model)
    if not args.output:
        if path.exists():
            print("tqgguf: note: it takes the place of the calibration that was kept for this model", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
    found.write(path)
    measured = {
        "file": path,
        "model": found.model,
        "gains": sorted(found.gains),
        "centred": sorted(found.means),
        "n_tokens": found.n_tokens,
        "seconds": seconds,
    }
    show(measured, args.json, _print)
    return 0


def _print(measured: dict[str, Any]) -> None:
    what = "means and gains" if measured["centred"] else "gains (this model's keys cannot be centred)"
    tokens, seconds = measured["n_tokens"], measured["seconds"]
    print(f"{what} of {len(measured['gains'])} layers, from {tokens:,} tokens, in {seconds:.1f} s: {measured['file']}")
