"""`tqgguf doctor`: is this installation as it should be?"""

from __future__ import annotations

import argparse
from typing import Any

from ..diagnostics.installation import Installation, installation
from .format import to_json


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "doctor",
        help="check this installation",
        description="Shows versions, the libraries loaded and from where, kernels, and the upstream pin. "
        "Exit status 1 if anything is not as it should be.",
        epilog="example: tqgguf doctor --json",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> int:
    """Runs the command."""
    result = installation()
    if args.json:
        print(to_json({"ok": result.ok, "checks": result.checks, "kernels": result.kernels, "kernel": result.kernel}))
    else:
        render(result)
    return 0 if result.ok else 1


def render(result: Installation) -> None:
    """Prints a line for each finding."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for check in result.checks:
        mark = Text("ok", style="green") if check.ok else Text("WRONG", style="bold red")
        table.add_row(mark, check.name, Text(check.detail))
    Console(highlight=False).print(table)
