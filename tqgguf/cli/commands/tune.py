"""`tqgguf tune`: measures which type each layer's K and V need, and writes a policy file."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ArgumentError, PolicyError
from ...whole_file import check_folder
from ..options import add_tail_option, cache_name, positive, threads
from ..render.format import print_table, to_json
from .compare import progress_bars, render_rows, table_of

if TYPE_CHECKING:
    from ...diagnostics.tune import Tuning


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "tune",
        help="a cache policy for a model: types by layer, measured",
        description="Measures on a text what each cache type costs K and V of every layer, and writes the policy that "
        "makes the most of a budget. Half of the text is held out, and says what the policy is worth.",
        epilog="example: tqgguf tune model.gguf -f text.txt -o policy.gguf --budget 4.0 "
        "(then: tqgguf chat model.gguf --cache policy.gguf)",
    )
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("-f", "--file", metavar="TEXT", help="a UTF-8 text file (the demo model has a text of its own)")
    parser.add_argument("-o", "--output", required=True, metavar="POLICY", help="the file to write, ending in .gguf")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--budget", type=number, metavar="BITS", help="bits per value, averaged over the whole cache")
    goal.add_argument(
        "--max-kld", type=number, metavar="X", help="instead: the smallest policy whose mean KLD is at most X nats"
    )
    parser.add_argument(
        "--types",
        type=type_list,
        metavar="TYPE,TYPE",
        help="types to choose from (default: pqt3,pqt4,q8_0; pqo3,pqo4,q8_0 takes less time to store and attend)",
    )
    centring = parser.add_mutually_exclusive_group()
    centring.add_argument(
        "--centre",
        action="store_const",
        const=True,
        help="an error if the model does not allow keys to be stored less their mean (default: then go on without)",
    )
    centring.add_argument(
        "--no-centre", action="store_const", const=False, dest="centre", help="store keys as they are"
    )
    parser.add_argument(
        "--ctx", type=positive, metavar="N", help="tokens in a chunk (default: 2048, or the trained context if less)"
    )
    parser.add_argument(
        "--chunks", type=positive, metavar="N", help="chunks to read at most, half of them held out (default: 8)"
    )
    parser.add_argument(
        "--batch", type=positive, default=512, metavar="N", help="tokens read at once; fewer save memory (default: 512)"
    )
    parser.add_argument(
        "--parallel", type=positive, default=8, metavar="N", help="caches at once; fewer save memory (default: 8)"
    )
    add_tail_option(parser)
    parser.add_argument("--threads", type=threads, metavar="N", help="threads (default: all processors)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(call=call)


def number(text: str) -> float:
    """argparse type: a positive number."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, not {text!r}")
    return value


def type_list(text: str) -> tuple[str, ...]:
    """argparse type: names of cache types with commas between."""
    return tuple(cache_name(part.strip()) for part in text.split(","))


def call(args: argparse.Namespace) -> int:
    """Runs the command."""
    from ...diagnostics.compare import read_text
    from ...diagnostics.tune import TUNED_TYPES, tune

    output = Path(args.output)
    check_output(output)
    text = None if args.file is None else read_text(args.file)
    with progress_bars() as progress:
        tuning = tune(
            args.model,
            text,
            budget=args.budget,
            max_kld=args.max_kld,
            types=args.types or TUNED_TYPES,
            centre=args.centre,
            tail=args.tail,
            n_ctx=args.ctx,
            n_chunks=args.chunks,
            n_batch=args.batch,
            n_threads=args.threads,
            n_parallel=args.parallel,
            progress=progress,
        )
    tuning.policy.write(output)
    if args.json:
        print(to_json({"file": output, "policy": policy_json(tuning), **fields(tuning)}))
    else:
        render(tuning, output)
    for note in tuning.notes:
        print(f"tqgguf: note: {note}", file=sys.stderr)
    return 0


def check_output(path: Path) -> None:
    """Says before anything is measured why the policy could not be written afterwards.

    Raises:
        ArgumentError: the name does not end in .gguf, its folder does not exist or cannot be written to, or there is a
            file that is no policy.
    """
    from ...cache.policy import read_policy

    if path.suffix != ".gguf":
        raise ArgumentError(f"cannot write {path}: the name of a policy file must end in .gguf")
    check_folder(path, f"cannot write {path}")
    if path.exists():
        try:
            read_policy(path)
        except (PolicyError, FileNotFoundError):  # the latter: it is no regular file
            raise ArgumentError(f"{path} exists and is no cache policy: it is not overwritten") from None


def fields(tuning: Tuning) -> dict[str, Any]:
    """Everything but the policy, whose mean keys are for the file."""
    return {field.name: getattr(tuning, field.name) for field in dataclasses.fields(tuning) if field.name != "policy"}


def policy_json(tuning: Tuning) -> dict[str, Any]:
    """What the policy says of layers."""
    policy = tuning.policy
    return {
        "types_k": policy.types_k,
        "types_v": policy.types_v,
        "centred": sorted(policy.k_means),
        "model_hash": policy.model_hash,
        "tail": policy.tail,
    }


def render(tuning: Tuning, output: Path) -> None:
    """Prints the type of every layer and what the smallest would cost it, then the policy beside single types."""
    n = tuning.n_tuning
    held_out = "tuning did not read" if tuning.max_kld is None else "told tuning where to stop, and nothing else"
    print(
        f"{tuning.model}: chunks of {tuning.n_ctx:,} tokens; tuned on {_chunks(1, n)}, "
        f"measured on {_chunks(n + 1, n + tuning.n_held_out)}, which {held_out}"
        + (f"; caches of ours with a tail of {tuning.tail} tokens in f16\n" if tuning.tail else "\n")
    )
    policy, smallest = tuning.policy, tuning.types[0]
    table = table_of("layer", "K", f"KLD at {smallest}", "centred", "V", f"KLD at {smallest}")
    cost = {(s.layer, s.side): s.kld for s in tuning.sensitivities if s.type == smallest}
    for layer in sorted({layer for layer, _ in cost}):
        table.add_row(
            str(layer),
            policy.types_k[layer],
            f"{cost[layer, 'K']:#.3g}",
            "yes" if layer in policy.k_means else "",
            policy.types_v[layer],
            f"{cost[layer, 'V']:#.3g}",
        )
    print_table(table)
    print(
        f"\npolicy on the tuning part: mean KLD {tuning.measured:#.3g} measured, "
        f"{tuning.predicted:#.3g} as the sum over layers and sides; on the part held out:\n"
    )
    render_rows(tuning.rows)
    own = tuning.rows[1]
    if tuning.line is not None:
        print(
            f"\n{own.kld.mean / tuning.line:.2f} of the mean KLD that single types in all layers give "
            f"at {own.bits:.4g} bits (interpolated where none has so many)"
        )
    bits = 16 * own.bytes_per_token / tuning.rows[0].bytes_per_token
    tail = f"; {own.bits:.4g} with the tail, at {tuning.n_ctx:,} tokens" if own.bits > bits else ""
    print(f"\nwritten to {output}: {bits:.4g} bits per value, {own.bytes_per_token:,} bytes per token{tail}")


def _chunks(first: int, last: int) -> str:
    return f"chunk {first}" if first == last else f"chunks {first} to {last}"
