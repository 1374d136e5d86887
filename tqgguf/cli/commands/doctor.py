"""`tqgguf doctor`: is this installation as it should be, and what would attention on a model run on?"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from ...diagnostics.installation import Check, Installation, installation
from ..options import add_cache_options, chosen_cache
from ..render.format import print_table, printable, to_json

if TYPE_CHECKING:
    from ...diagnostics.attention_path import AttentionPath


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "doctor",
        help="check this installation",
        description="Shows versions, the libraries loaded, from where and whether they are ours, kernels, CPU "
        "features, CUDA, and the upstream pin; with a model also which code computes attention for it with a cache, "
        "and why. "
        "Exit status 1 if anything is not as it should be.",
        epilog="example: tqgguf doctor model.gguf --cache pqo4",
    )
    parser.add_argument("model", nargs="?", help="a GGUF file")
    add_cache_options(parser)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> int:
    """Runs the command."""
    result = installation()
    path = _attention(args) if args.model and result.ok else None
    ok = result.ok and (path is None or path.obstacle is None)
    if args.json:
        data = {"ok": ok, "checks": result.checks, "kernels": result.kernels, "kernel": result.kernel}
        print(to_json({**data, "attention": path}))
    else:
        render(result, path)
        if args.model and not result.ok:
            print("The model was not looked at: first the installation must be as it should.")
    return 0 if ok else 1


def _attention(args: argparse.Namespace) -> AttentionPath:
    from ...diagnostics.attention_path import attention_path

    return attention_path(args.model, chosen_cache(args), tail=args.tail)


def render(result: Installation, path: AttentionPath | None) -> None:
    """Prints a line for each finding."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for check in (*result.checks, *(_findings(path) if path else ())):
        mark = Text("ok", style="green") if check.ok else Text("WRONG", style="bold red")
        table.add_row(mark, check.name, Text(printable(check.detail)))
    # Elsewhere a line for each finding, for grep and for reports.
    print_table(table, fold=sys.stdout is not None and sys.stdout.isatty())


def _findings(path: AttentionPath) -> list[Check]:
    from ...diagnostics.capture import ranges

    if path.obstacle:
        return [
            Check("model", True, f"{path.info.name} ({path.info.architecture})"),
            Check("cache", False, path.obstacle),
        ]
    flash = "with flash attention" if path.flash else "without flash attention"
    found = [Check("model", True, f"{path.info.name} ({path.info.architecture}), {path.cache} {flash}")]
    for way in path.paths:
        layers = f"layer{'s' if len(way.layers) > 1 else ''} {ranges(list(way.layers))}"
        alike = way.decode if way.decode == way.prefill else f"{way.decode} for a token, {way.prefill} for a prompt"
        types = way.type_k if way.type_k == way.type_v else f"{way.type_k}/{way.type_v}"
        found.append(Check("attention", True, f"{layers}, {types}: {alike}, because {way.reason}"))
    return found + [Check("attention", True, note) for note in path.notes]
