"""The picture of `tqgguf compare --plot`: KL divergence over the cache's bytes. It needs matplotlib (extra `plot`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..._util import check_folder
from ...config import CACHE_TYPES
from ...errors import ArgumentError, UnsupportedError

if TYPE_CHECKING:
    from ...diagnostics.compare import Comparison, TypeQuality

FORMATS: Final = (".png", ".svg", ".pdf")

_INK: Final = "#1f2933"
_STOCK: Final = "#7b8794"
_PQO: Final = "#d64550"
_GRID: Final = "#e4e7eb"


def check_plot(path: Path) -> None:
    """Refuses a picture that cannot be written, before anything is measured.

    Raises:
        ArgumentError: the name does not end in one of FORMATS, or its folder does not exist or cannot be written to.
        UnsupportedError: matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise ArgumentError(f"cannot draw {path}: the name must end in {', '.join(FORMATS)}")
    check_folder(path, f"cannot draw {path}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UnsupportedError("drawing needs matplotlib: pip install 'tqgguf[plot]'") from error


def plot(comparison: Comparison, path: Path) -> None:
    """Draws a comparison into a file."""
    figure_of(comparison).savefig(path)


def figure_of(comparison: Comparison) -> Any:
    """The picture: mean divergence (log axis) over bytes per token, a labelled point for each cache but the reference.

    Bytes per token are the bytes of the cache for a chunk, with the tail, divided by the tokens of the chunk. Points of
    the same size have their labels right and left in turn, in the order of divergence. Labels that still cover each
    other move up and down.
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
    small = {"color": _STOCK, "fontsize": 9}
    beside_line = {"transform": axes.get_xaxis_transform(), "horizontalalignment": "right", "verticalalignment": "top"}
    axes.text(place[reference.type], 0.97, f"{reference.type}, the reference ", **small, **beside_line)
    title = f"What a compressed KV cache costs {comparison.model}"
    axes.set_title(title, loc="left", color=_INK, fontsize=13, fontweight="bold", pad=26)
    read = f"{comparison.n_scored:,} predictions in {comparison.n_chunks:,} x {comparison.n_ctx:,} tokens"
    axes.text(0, 1.025, f"{read}; bars: twice the standard error", transform=axes.transAxes, **small)
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
        boxes = [Text.get_window_extent(label) for label in labels]  # without the line to its point
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
    """Draws a point with its error bar and a label to the right (side 1) or left (-1); returns the label."""
    is_pqo = row.type not in CACHE_TYPES or CACHE_TYPES[row.type].ours
    color = _PQO if is_pqo else _STOCK
    error = min(2 * row.kld.mean_error, 0.9 * row.kld.mean)  # a log axis has no room below zero
    axes.errorbar(
        x,
        row.kld.mean,
        yerr=[[error], [2 * row.kld.mean_error]],
        fmt="o",
        # Stock types are rings and the others dots, so that neither hides the other at equal figures.
        markersize=7 if is_pqo else 11,
        markerfacecolor=color if is_pqo else "white",
        markeredgecolor=color,
        markeredgewidth=0 if is_pqo else 1.6,
        ecolor=color,
        elinewidth=1.2,
        zorder=3 if is_pqo else 2,
    )
    return axes.annotate(
        row.type,
        (x, row.kld.mean),
        xytext=(11 * side, 0),
        textcoords="offset points",
        arrowprops={"arrowstyle": "-", "color": _STOCK, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4},
        horizontalalignment="left" if side > 0 else "right",
        verticalalignment="center",
        color=color if is_pqo else _INK,
        fontsize=11 if is_pqo else 10,
        fontweight="bold" if is_pqo else "normal",
    )
