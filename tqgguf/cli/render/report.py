"""The page of `tqgguf inspect --html`: the figures that templates/report.html shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import jinja2

from ..._util import check_folder
from ...config import CACHE_TYPES
from ...diagnostics.cache_contents import CacheContents, HeadContents, TensorContents
from ...errors import ArgumentError
from .format import size
from .inspect import LAYER_FIGURES, layer_figures, mean

_RAMP: Final = ((24, 30, 84), (52, 92, 148), (44, 148, 148), (122, 193, 108), (250, 222, 90))
"""Colours from the smallest value to the largest. Lightness always grows, so that they differ on grey paper, too."""

Value = Callable[[HeadContents], "float | None"]
Sides = Sequence[tuple[str, Sequence[TensorContents]]]

_MAPS: Final[tuple[tuple[str, str, str, Value], ...]] = (
    (
        "Norms",
        "Mean length of a head's vectors. Softmax sees differences of scores, so long keys make it sharp.",
        "{:.3g}",
        lambda head: head.norm,
    ),
    (
        "Spread of norms",
        "Standard deviation of the lengths, relative to their mean: 0 if all vectors are as long.",
        "{:.2f}",
        lambda head: head.norm_spread,
    ),
    (
        "Scales",
        "Median magnitude of the block scales. Each block of 32 values has its own.",
        "{:.3g}",
        lambda head: head.scale,
    ),
    (
        "Code use",
        "Entropy of the codebook indices in bits. Near the most possible: every level earns its place.",
        "{:.2f}",
        lambda head: head.entropy,
    ),
    (
        "Outlier channels",
        "Channels whose RMS is more than 4 times the median channel's, where a head has any. The block "
        "transform spreads them.",
        "{:.0f}",
        lambda head: float(len(head.outliers)) or None,
    ),
    (
        "Constant offset",
        "Length of the mean vector relative to the RMS length: 0 if vectors point everywhere, 1 if all are "
        "the same. Storing keys less their mean (tqgguf tune) saves its square of their energy.",
        "{:.2f}",
        lambda head: head.offset,
    ),
    (
        "Error at 3 bits",
        "Squared error relative to the squared values, of 3 bits per index on values like these (estimated).",
        "{:.4f}",
        lambda head: head.nmse_3,
    ),
    (
        "What a fourth bit buys",
        "How many times smaller the squared error becomes with 4 bits (estimated).",
        "{:.2f}",
        lambda head: head.bit_gain,
    ),
)


def check_report(path: Path) -> None:
    """Refuses a page that cannot be written, before anything is measured.

    Raises:
        ArgumentError: its folder does not exist or cannot be written to, or it is a folder itself.
    """
    if path.is_dir():
        raise ArgumentError(f"cannot write {path}: it is a folder")
    check_folder(path, f"cannot write {path}")


def page(contents: CacheContents) -> str:
    """The whole page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tqgguf.cli"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    sides = [(side, contents.side(side)) for side in ("K", "V") if contents.side(side)]
    most_heads = max(len(tensor.heads) for tensor in contents.tensors)
    return environment.get_template("report.html").render(
        name=contents.info.name,
        summary=_summary(contents),
        facts=_facts(contents),
        notes=contents.notes,
        maps=[
            (title, text, [figure for side, tensors in sides if (figure := _map(side, tensors, form, value))])
            for title, text, form, value in _MAPS
        ],
        histograms=_histograms(sides),
        columns=LAYER_FIGURES,
        rows=[layer_figures(tensor) for tensor in contents.tensors],
        ramp=[_colour(i / 8) for i in range(9)],
        height=f"{min(max(1.4 * most_heads, 3), 14):g}",
    )


def _summary(contents: CacheContents) -> str:
    where = "a live context" if contents.source == "context" else contents.source
    cells = f"{contents.n_cells:,} cells with tokens, of which {contents.n_sampled:,} were looked at"
    axes = "In the pictures layers run from left to right and heads from top to bottom"
    return f"{contents.info.architecture}, from {where}: {cells}. {axes}."


def _facts(contents: CacheContents) -> list[tuple[str, str]]:
    tensors = contents.tensors
    heads = [head for tensor in tensors for head in tensor.heads]
    types = sorted({tensor.type for tensor in tensors})
    f16 = sum(tensor.bytes / CACHE_TYPES[tensor.type].bits * 16 for tensor in tensors)
    return [
        (", ".join(types), "type" if len(types) == 1 else "types"),
        (size(contents.bytes), f"in those cells, {contents.bytes / f16:.1%} of f16"),
        (f"{len(contents.side('K'))}", "layers with a cache"),
        (f"{sum(len(head.outliers) for head in heads)}", "outlier channels in all"),
        (f"{mean([head.nmse_3 for head in heads]):.4f}", "mean error at 3 bits"),
        (f"{mean([head.bit_gain for head in heads]):.1f} times", "smaller with a fourth bit"),
    ]


def _map(side: str, tensors: Sequence[TensorContents], form: str, value: Value) -> dict[str, Any] | None:
    """A heat map with a column for each layer and a row for each head; None if no head has the value."""
    found = [
        (x, head.head, tensor.layer, number)
        for x, tensor in enumerate(tensors)
        for head in tensor.heads
        if (number := value(head)) is not None and math.isfinite(number)
    ]
    if not found:
        return None
    low, high = min(number for *_, number in found), max(number for *_, number in found)
    low = 0.0 if len(found) < sum(len(tensor.heads) for tensor in tensors) else low  # heads without a value are empty
    n_head = max(len(tensor.heads) for tensor in tensors)
    return {
        "side": side,
        "low_number": low,
        "high_number": high,
        "low": form.format(low),
        "high": form.format(high),
        "n_head": n_head,
        "n_layer": len(tensors),
        "heads": _ends(range(n_head)),
        "layers": _ends([tensor.layer for tensor in tensors]),
        "cells": [
            (
                x,
                y,
                _colour((number - low) / (high - low or 1)),
                f"{side}, layer {layer}, head {y}: {form.format(number)}",
            )
            for x, y, layer, number in found
        ],
    }


def _ends(numbers: Sequence[int]) -> Sequence[int]:
    """The numbers beside an axis: all of up to four, else the first and the last."""
    return numbers if len(numbers) <= 4 else (numbers[0], numbers[-1])


def _histograms(sides: Sides) -> list[tuple[str, str, list[float]]]:
    """By side and type, how often each index is used, over all heads of all layers."""
    found = []
    for side, tensors in sides:
        for kind in sorted({tensor.type for tensor in tensors if tensor.heads[0].codes}):
            use = [head.codes for tensor in tensors if tensor.type == kind for head in tensor.heads]
            found.append((side, kind, [mean(column) for column in zip(*use, strict=True)]))
    return found


def _colour(share: float) -> str:
    """The colour of a value between 0 and 1."""
    place = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    i = min(int(place), len(_RAMP) - 2)
    mixed = (a + (b - a) * (place - i) for a, b in zip(_RAMP[i], _RAMP[i + 1], strict=True))
    return "#" + "".join(f"{round(part):02x}" for part in mixed)
