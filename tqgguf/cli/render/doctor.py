"""What `tqgguf doctor` prints."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from ..._util import ranges
from ...diagnostics.installation import Check, Installation
from .format import printable
from .table import print_table

if TYPE_CHECKING:  # it needs the libraries, which may be what is wrong
    from ...diagnostics.attention_path import AttentionPath


def print_checks(result: Installation, path: AttentionPath | None) -> None:
    """Prints a line for each check and each fact about the model's attention."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for check in (*result.checks, *(_findings(path) if path else ())):
        mark = Text("ok", style="green") if check.ok else Text("WRONG", style="bold red")
        table.add_row(mark, check.name, Text(printable(check.detail)))
    # A file or a pipe gets one line for each check, for grep and for reports.
    print_table(table, fold=sys.stdout is not None and sys.stdout.isatty())


def _findings(path: AttentionPath) -> list[Check]:
    if path.obstacle:
        return [
            Check("model", True, f"{path.info.name} ({path.info.architecture})"),
            Check("cache", False, path.obstacle),
        ]
    flash = "with flash attention" if path.flash else "without flash attention"
    found = [Check("model", True, f"{path.info.name} ({path.info.architecture}), {path.cache} {flash}")]
    for way in path.paths:
        layers = f"layer{'s' if len(way.layers) > 1 else ''} {ranges(way.layers)}"
        alike = way.decode if way.decode == way.prefill else f"{way.decode} for a token, {way.prefill} for a prompt"
        types = way.type_k if way.type_k == way.type_v else f"{way.type_k}/{way.type_v}"
        found.append(Check("attention", True, f"{layers}, {types}: {alike}, because {way.reason}"))
    return found + [Check("attention", True, note) for note in path.notes]
