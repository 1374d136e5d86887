"""`tqgguf compare --attention`: what cache types do to attention itself, layer by layer."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..render.format import print_table, to_json

if TYPE_CHECKING:
    from rich.console import Console

    from ...diagnostics.attention import AttentionQuality, HeadError, LayerAttention

DEFAULT_TOKENS = 512
"""Tokens if `--ctx` is not given: time and memory grow with its square."""

FIGURES = (("K NMSE", "nmse_k"), ("V NMSE", "nmse_v"), ("q.k", "score"), ("KL", "kl"), ("output", "output"))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds --attention and the options that belong to it."""
    group = parser.add_argument_group("attention")
    group.add_argument(
        "--attention",
        action="store_true",
        help="errors of K, V, scores, attention weights and outputs on the model's own Q, K and V, instead of KLD",
    )
    group.add_argument(
        "--layers", type=layer_list, metavar="N,N-N", help="layers to look at (default: first, middle, last)"
    )
    group.add_argument("--centre", action="store_true", help="subtract each head's mean key before encoding")
    group.add_argument(
        "--no-rotation", action="store_true", help="leave out llama.cpp's rotation before stock quantized types"
    )


def layer_list(text: str) -> tuple[int, ...]:
    """argparse type: layers such as "0,1,5-7"."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and (not last.isdecimal() or int(last) < int(first))):
            raise argparse.ArgumentTypeError(f"must be layers such as 0,1,5-7, not {text!r}")
        found.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))


def call(args: argparse.Namespace, text: str, types: Sequence[str] | None) -> int:
    """Measures and prints, with the options of `add_options` and model, ctx, threads and json.

    Args:
        args: the parsed command line.
        text: the text to run.
        types: cache types; None for all that fit.
    """
    from ...diagnostics.attention import attention_quality

    result = attention_quality(
        args.model,
        text,
        types=types,
        layers=args.layers,
        n_ctx=args.ctx or DEFAULT_TOKENS,
        centre=args.centre,
        rotate=not args.no_rotation,
        n_threads=args.threads,
    )
    if args.json:
        print(to_json(result))
    else:
        render(result)
    return 0


def render(result: AttentionQuality) -> None:
    """Prints a table for each layer: mean over its KV heads, and the worst of them."""
    from rich.console import Console

    console = Console(highlight=False)
    keys = ", keys centred" if result.centred else ""
    rotation = "" if result.rotated else ", stock types not rotated"
    console.print(f"{result.info.name}: {result.n_tokens:,} tokens{keys}{rotation}; mean/worst KV head")
    for layer in result.layers:
        console.print()
        _render_layer(console, layer)


def _render_layer(console: Console, layer: LayerAttention) -> None:
    from rich.table import Table
    from rich.text import Text

    sizes = {layer.head_dim_k, layer.head_dim_v}
    console.print(
        f"layer {layer.layer}: {layer.n_head} query heads, {len(layer.heads)} KV heads of "
        f"{' and '.join(map(str, sorted(sizes)))}"
    )
    for head in layer.heads:
        console.print(Text(f"  KV head {head.head}: offset {head.offset:.2f}, {_outliers(head.outliers)}"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("cache", no_wrap=True)
    for title, _ in FIGURES:
        table.add_column(title, justify="right", no_wrap=True)
    for name, errors in layer.errors.items():
        table.add_row(name, *(_cell(errors, figure) for _, figure in FIGURES))
    print_table(table)


def _cell(errors: Sequence[HeadError], figure: str) -> str:
    """Mean and worst of a figure, short enough for five of them in 80 columns: ".0053/.0054"."""
    values = [getattr(error, figure) for error in errors]
    mean, worst = (f"{value:.4f}".removeprefix("0") for value in (sum(values) / len(values), max(values)))
    return f"{mean}/{worst}"


def _outliers(channels: Sequence[int]) -> str:
    """The outlier channels by number, or how many if that would be long."""
    from ...diagnostics.attention import OUTLIER_FACTOR

    if not channels:
        return "no outlier channels"
    named = ", ".join(map(str, channels[:8]))
    more = f" and {len(channels) - 8} more" if len(channels) > 8 else ""
    return f"outlier channels (over {OUTLIER_FACTOR:g} times the median) {named}{more}"
