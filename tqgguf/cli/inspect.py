"""`tqgguf inspect`: what a model's KV cache takes, before anything is loaded."""

from __future__ import annotations

import argparse
from typing import Any

from ..diagnostics.model_cache import ModelCache, model_cache
from .format import size, to_json
from .options import add_tail_option, positive


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "inspect",
        help="what a model's KV cache takes",
        description="Shows what a GGUF says about its KV cache, and its size in each cache type. Loads no weights.",
        epilog="example: tqgguf inspect model.gguf --ctx 8192,131072",
    )
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument(
        "--ctx", type=contexts, default=(), metavar="N,N", help="context lengths (default: the model's own)"
    )
    add_tail_option(parser)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(call=call)


def contexts(text: str) -> tuple[int, ...]:
    """argparse type: positive integers with commas between."""
    return tuple(positive(part.strip()) for part in text.split(","))


def call(args: argparse.Namespace) -> int:
    """Runs the command."""
    result = model_cache(args.model, args.ctx, tail=args.tail)
    if args.json:
        print(to_json(result))
    else:
        render(result)
    return 0


def render(result: ModelCache) -> None:
    """Prints the model's facts, then the table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    info = result.info
    console = Console(highlight=False)
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in (
        ("model", f"{info.name} ({info.architecture}, {size(info.file_bytes)})"),
        ("trained context", f"{info.n_ctx_train:,} tokens"),
        ("layers", f"{info.n_layer}, of which {len(info.layers)} have a KV cache"),
        ("heads", f"{info.n_head} for Q; KV: {_each(layer.n_head_kv for layer in info.layers)}"),
        ("head size", f"K {_each(r.head_dim_k for r in info.layers)}, V {_each(r.head_dim_v for r in info.layers)}"),
        *(("note", note) for note in info.notes),
    ):
        facts.add_row(name, Text(value))
    console.print(facts)
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("cache", "bits/value", "bytes/token", *(f"{n:,} tokens" for n in result.contexts)):
        table.add_column(title, justify="left" if title == "cache" else "right", no_wrap=True)
    reasons = []
    for row in result.rows:
        cells = [row.type, f"{row.bits:g}"]
        if row.bytes is None or row.bytes_per_token is None:
            reasons.append(f"{row.type}: {row.obstacle}")
            cells += ["cannot be used"]
        else:
            cells += [f"{row.bytes_per_token:,}", *(size(n) for n in row.bytes)]
        table.add_row(*cells)
    console.print(table)
    for reason in reasons:
        console.print(Text(reason))


def _each(values: Any) -> str:
    """The value all layers share, or the values there are."""
    distinct = sorted(set(values))
    return ", ".join(map(str, distinct)) if distinct else "none"
