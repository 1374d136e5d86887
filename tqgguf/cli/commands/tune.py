"""`tqgguf tune`: measures which types K and V of each layer need, and writes a policy file."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ArgumentError
from ..options import (
    add_calibration_option,
    add_tail_option,
    add_text_options,
    cache_name,
    check_output,
    positive,
    positive_number,
    several,
)
from ..render.format import to_json
from ..render.progress import Bar

if TYPE_CHECKING:
    from ...diagnostics.tune import Tuning


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "tune",
        help="a cache policy for a model: types by layer, measured",
        description="Predicts from one reading of a text what each cache type costs in K and V of every layer, "
        "measures bands of layers, and writes the best policy within a budget. Half of the text is held out and "
        "measures the policy.",
        epilog="example: tqgguf tune model.gguf -f text.txt -o policy.gguf --budget 4.0 "
        "(then: tqgguf chat model.gguf --cache policy.gguf)",
    )
    add_text_options(parser, chunks=", half of them held out (default: 2)")
    parser.add_argument("-o", "--output", required=True, metavar="POLICY", help="the file to write, ending in .gguf")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--budget", type=positive_number, metavar="BITS", help="bits per value, averaged over the whole cache"
    )
    goal.add_argument(
        "--max-kld",
        type=positive_number,
        metavar="X",
        help="instead: the smallest policy whose mean KLD is at most X nats",
    )
    parser.add_argument(
        "--types",
        type=partial(several, cache_name),
        metavar="TYPE,TYPE",
        help="types to choose from (default: pqt3,pqt4,q8_0; pqo3,pqo4,q8_0 takes less time to store and attend)",
    )
    parser.add_argument(
        "--parallel", type=positive, default=8, metavar="N", help="caches at once; fewer save memory (default: 8)"
    )
    add_tail_option(parser)
    add_calibration_option(parser, "mean and gain of each channel of the keys, which the policy file will hold")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> int:
    """Runs the command."""
    from ...cache.policy import read_policy
    from ...diagnostics.texts import read_text
    from ...diagnostics.tune import CANDIDATE_TYPES, tune
    from ..render.compare import print_tuning

    output = Path(args.output)
    if output.suffix != ".gguf":
        raise ArgumentError(f"cannot write {output}: the name of a policy file must end in .gguf")
    check_output(output, "cache policy", read_policy)
    text = None if args.file is None else read_text(args.file)
    with contextlib.closing(Bar()) as bar:
        tuning = tune(
            args.model,
            text,
            budget=args.budget,
            max_kld=args.max_kld,
            types=args.types or CANDIDATE_TYPES,
            tail=args.tail,
            n_ctx=args.ctx,
            n_chunks=args.chunks,
            n_batch=args.batch,
            n_threads=args.threads,
            n_parallel=args.parallel,
            calibration=args.calibration,
            progress=bar,
        )
    tuning.policy.write(output)
    if args.json:
        print(to_json({"file": output, "policy": policy_json(tuning), **fields(tuning)}))
    else:
        print_tuning(tuning, output)
    for note in tuning.notes:
        print(f"tqgguf: note: {note}", file=sys.stderr)
    return 0


def fields(tuning: Tuning) -> dict[str, Any]:
    """All fields but the policy, whose means and gains are only in the file."""
    return {field.name: getattr(tuning, field.name) for field in dataclasses.fields(tuning) if field.name != "policy"}


def policy_json(tuning: Tuning) -> dict[str, Any]:
    """The policy without its means and gains."""
    policy = tuning.policy
    return {
        "types_k": policy.types_k,
        "types_v": policy.types_v,
        "centred": sorted(policy.k_means),
        "gains": sorted(policy.k_gains),
        "model_hash": policy.model_hash,
        "tail": policy.tail,
    }
