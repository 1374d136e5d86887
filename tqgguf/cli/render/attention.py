"""What `tqgguf compare --attention` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ...diagnostics.attention import OUTLIER_FACTOR, AttentionQuality, HeadError, LayerAttention
from .table import new_table, print_table, print_text

_FIGURES: Final = (("K NMSE", "nmse_k"), ("V NMSE", "nmse_v"), ("q.k", "score"), ("KL", "kl"), ("output", "output"))


def print_attention(result: AttentionQuality) -> None:
    """Prints a table for each layer: the mean over its KV heads, and the worst of them."""
    keys = ", keys centred" if result.centred else ""
    rotation = "" if result.rotated else ", stock types not rotated"
    print_text(f"{result.info.name}: {result.n_tokens:,} tokens{keys}{rotation}; mean/worst KV head")
    for layer in result.layers:
        _print_layer(layer)


def _print_layer(layer: LayerAttention) -> None:
    sizes = " and ".join(map(str, sorted({layer.head_dim_k, layer.head_dim_v})))
    print_text(f"\nlayer {layer.layer}: {layer.n_head} query heads, {len(layer.heads)} KV heads of {sizes}")
    for head in layer.heads:
        print_text(f"  KV head {head.head}: offset {head.offset:.2f}, {_outliers(head.outliers)}")
    table = new_table("cache", *(title for title, _ in _FIGURES))
    for name, errors in layer.errors.items():
        table.add_row(name, *(_cell(errors, figure) for _, figure in _FIGURES))
    print_table(table)


def _cell(errors: Sequence[HeadError], figure: str) -> str:
    """Mean and worst of a figure, short enough for five of them in 80 columns: ".0053/.0054"."""
    values = [getattr(error, figure) for error in errors]
    mean, worst = (f"{value:.4f}".removeprefix("0") for value in (sum(values) / len(values), max(values)))
    return f"{mean}/{worst}"


def _outliers(channels: Sequence[int]) -> str:
    """The first eight outlier channels by number, and how many more there are."""
    if not channels:
        return "no outlier channels"
    named = ", ".join(map(str, channels[:8]))
    more = f" and {len(channels) - 8} more" if len(channels) > 8 else ""
    return f"outlier channels (over {OUTLIER_FACTOR:g} times the median) {named}{more}"
