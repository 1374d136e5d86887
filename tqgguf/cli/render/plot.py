"""The picture of `tqgguf compare --plot`: KL divergence over the cache's bytes. It needs matplotlib (extra `plot`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...config import CACHE_TYPES
from ...errors import ArgumentError, UnsupportedError

if TYPE_CHECKING:
    from ...diagnostics.compare import Comparison, TypeQuality

FORMATS: Final = (".png", ".svg", ".pdf")

_INK: Final = "#1f2933"
_STOCK: Final = "#7b8794"
_OURS: Final = "#d64550"
_GRID: Final = "#e4e7eb"


def check_plot(path: Path) -> None:
    """Says before anything is measured why the picture could not be drawn afterwards.

    Raises:
        ArgumentError: the name ends in none of FORMATS, or its folder does not exist.
        UnsupportedError: matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise ArgumentError(f"cannot draw {path}: the name must end in {', '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise ArgumentError(f"cannot draw {path}: folder {path.absolute().parent} does not exist")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ArgumentError(f"cannot draw {path}: no permission to write there")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UnsupportedError("drawing needs matplotlib: pip install 'tqgguf[plot]'") from error


def plot(comparison: Comparison, path: Path) -> None:
    """Draws a comparison into a file."""
    figure_of(comparison).savefig(path)


def figure_of(comparison: Comparison) -> Any:
    """The picture: mean divergence (log axis) over bytes per token, a labelled point for each cache but the reference.

    Bytes are those that the cache takes for a chunk, tail included, divided by its tokens.
    Points of the same size are labelled right and left in turn, in order of divergence; labels that would still cover
    each other move up and down.
    """
    from matplotlib.figure import Figure

    reference, *rows = comparison.rows
    figure = Figure(figsize=(8, 5), dpi=160, layout="constrained")
    axes: Any = figure.add_subplot()
    axes.set_yscale("log")
    sides: dict[float, int] = {}
    labels = []
    place = {row.type: row.bytes / comparison.n_ctx for row in comparison.rows}
    for row in sorted((row for row in rows if row.kld.mean > 0), key=lambda row: row.kld.mean):
        x = place[row.type]
        side = sides[x] = -sides.get(x, -1)
        labels.append(_point(axes, row, x, side))
    axes.set_xlim(0, 1.08 * max(place.values()))
    axes.margins(y=0.12)
    axes.axvline(place[reference.type], color=_STOCK, linewidth=1, linestyle=(0, (4, 4)), zorder=1)
    axes.text(
        place[reference.type],
        0.97,
        f"{reference.type}, the reference ",
        transform=axes.get_xaxis_transform(),
        horizontalalignment="right",
        verticalalignment="top",
        color=_STOCK,
        fontsize=9,
    )
    axes.set_title(
        f"What a compressed KV cache costs {comparison.model}",
        loc="left",
        color=_INK,
        fontsize=13,
        fontweight="bold",
        pad=26,
    )
    axes.text(
        0,
        1.025,
        f"{comparison.n_scored:,} predictions in {comparison.n_chunks:,} x {comparison.n_ctx:,} tokens; "
        "bars: twice the standard error",
        transform=axes.transAxes,
        color=_STOCK,
        fontsize=9,
    )
    axes.set_xlabel(f"KV cache, bytes per token of {comparison.n_ctx:,}", color=_INK)
    axes.set_ylabel(f"mean KL divergence from {reference.type}, nats", color=_INK)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.tick_params(which="both", color=_GRID, labelcolor=_INK)
    axes.grid(which="major", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(_STOCK)
    _separate(figure, labels)
    return figure


def _separate(figure: Any, labels: list[Any]) -> None:
    """Moves labels up and down until none covers another."""
    from matplotlib.text import Text

    labels = sorted(labels, key=lambda label: label.xy[1])
    for _ in range(100):
        figure.draw_without_rendering()
        boxes = [Text.get_window_extent(label) for label in labels]  # without its line
        moved = False
        for i, low in enumerate(boxes):
            for j in range(i + 1, len(boxes)):
                high = boxes[j]
                overlap = low.y1 - high.y0
                if low.x0 < high.x1 and high.x0 < low.x1 and overlap > 0 and low.y0 < high.y1:
                    for label, sign in ((labels[i], -1), (labels[j], 1)):
                        x, y = label.get_position()
                        label.set_position((x, y + sign * (overlap / 2 + 1) * 72 / figure.dpi))
                    moved = True
        if not moved:
            return


def _point(axes: Any, row: TypeQuality, x: float, side: int) -> Any:
    """One cache: a point, its error bar, and a label to the right (side 1) or left (-1), which is returned."""
    ours = row.type not in CACHE_TYPES or CACHE_TYPES[row.type].ours
    color = _OURS if ours else _STOCK
    error = min(2 * row.kld.mean_error, 0.9 * row.kld.mean)  # a log axis has no room below zero
    axes.errorbar(
        x,
        row.kld.mean,
        yerr=[[error], [2 * row.kld.mean_error]],
        fmt="o",
        # Stock types are rings around the dots of ours, so that equal figures hide neither.
        markersize=7 if ours else 11,
        markerfacecolor=color if ours else "white",
        markeredgecolor=color,
        markeredgewidth=0 if ours else 1.6,
        ecolor=color,
        elinewidth=1.2,
        zorder=3 if ours else 2,
    )
    return axes.annotate(
        row.type,
        (x, row.kld.mean),
        xytext=(11 * side, 0),
        textcoords="offset points",
        arrowprops={"arrowstyle": "-", "color": _STOCK, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4},
        horizontalalignment="left" if side > 0 else "right",
        verticalalignment="center",
        color=color if ours else _INK,
        fontsize=11 if ours else 10,
        fontweight="bold" if ours else "normal",
    )
