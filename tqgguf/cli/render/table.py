"""Tables and paragraphs on stdout."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .format import printable

_LEFT: Final = ("cache", "type", "")
"""Titles of columns that are aligned to the left; all others hold figures."""


def new_table(*titles: str) -> Table:
    """An empty table without lines."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, justify="left" if title in _LEFT else "right", no_wrap=True)
    return table


def print_table(table: Table, *, fold: bool = False) -> None:
    """Prints a table.

    Args:
        table: what to print.
        fold: fold text at the width of the terminal. Otherwise the table has its full width even where the terminal
            is narrower, because a figure cut short would be a wrong figure.
    """
    console = Console(highlight=False)
    if not fold:
        console.width = max(console.width, Console(width=1000).measure(table).maximum)
    _print(console, table)


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Prints a line for each (name, value)."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, Text(printable(value)))
    print_table(table, fold=True)


def print_text(text: str = "", *, wrap: bool = True) -> None:
    """Prints a paragraph, wrapped at the width of the terminal unless `wrap` is false."""
    _print(Console(highlight=False), Text(text), soft_wrap=not wrap)


def _print(console: Console, what: Table | Text, *, soft_wrap: bool = False) -> None:
    """Prints; in a file or a pipe without the blanks that rich leaves at the end of a line."""
    if console.is_terminal:
        console.print(what, soft_wrap=soft_wrap)
        return
    with console.capture() as capture:
        console.print(what, soft_wrap=soft_wrap)
    for line in capture.get().splitlines():
        print(line.rstrip())
