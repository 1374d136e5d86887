"""Draws docs/pictures/NAME.svg for docs/how-it-works.md: python docs/generate/figures.py [NAME ...] (default: all).

`tqgguf.reference` computes the data, from keys that llama.cpp computes for a text with the demo model, and from
Gaussian numbers with a fixed seed. `facts` returns the figures that the page quotes; a test compares them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from pictures import REPOSITORY, draw_asked

sys.path.insert(0, str(REPOSITORY))

from tqgguf import CACHE_TYPES, reference
from tqgguf.demo import model as demo
from tqgguf.diagnostics.capture import capture_attention

F32 = npt.NDArray[np.float32]

INK, OURS, STOCK, SOFT, GRID = "#1f2933", "#d64550", "#7b8794", "#f3c5c9", "#e4e7eb"
TEXT: Final = demo.recall_prompt(1, 75).context
"""The text that the demo model reads: 75 facts."""

FACTORS: Final = (1, 2, 4, 8, 16, 32)
"""Widths of the four hot channels of 128, relative to the others."""


# ---- Data ----


@cache
def keys() -> F32:
    """The keys of all layers and heads of the demo model before encoding, as blocks (n_blocks, 32)."""
    layers = capture_attention(demo.MODEL_PATH, TEXT, range(4), n_ctx=512, n_threads=1)
    return np.concatenate([layer.k.reshape(-1, 32) for layer in layers.values()])


def decoded(x: F32, type: str, mode: str = "search") -> F32:
    """Values (..., n), encoded and decoded as a type."""
    return reference.decode(reference.encode(x, type, mode), type, mode).reshape(x.shape)


def decoded_without_transform(x: F32) -> F32:
    """The same with pqo3's codebook and search, but without the transform."""
    blocks = x.reshape(-1, 32)
    book, scale = reference.codebook("pqo3"), reference.search_scale(blocks, "pqo3")
    levels = book.levels[reference.quantize_indices(blocks / scale[:, None], book)]
    return (levels * scale[:, None]).reshape(x.shape)


def rotated_stock(x: F32, type: str) -> F32:
    """Values after the pqo transform, encoded and decoded as a stock type by gguf's NumPy code."""
    from gguf import GGMLQuantizationType, quants

    number = GGMLQuantizationType[type.upper()]
    y = reference.transform(x.reshape(-1, 32))
    return reference.inverse_transform(quants.dequantize(quants.quantize(y, number), number)).reshape(x.shape)


def nmse(x: F32, approximation: F32) -> float:
    """Squared error relative to the squared values."""
    return float(np.square(approximation - x, dtype=np.float64).sum() / np.square(x, dtype=np.float64).sum())


@cache
def hot_channels() -> dict[str, list[float]]:
    """NMSE of pqo3 for each width of four hot channels, with the transform and without."""
    found: dict[str, list[float]] = {"with": [], "without": []}
    for factor in FACTORS:
        x = np.random.default_rng(0).standard_normal((1000, 128)).astype(np.float32)
        x[:, (5, 40, 77, 110)] *= factor
        found["with"].append(nmse(x, decoded(x, "pqo3")))
        found["without"].append(nmse(x, decoded_without_transform(x)))
    return found


def gaussian() -> F32:
    """Gaussian blocks, (n_blocks, 32)."""
    return np.random.default_rng(1).standard_normal((8000, 32)).astype(np.float32)


@cache
def errors() -> dict[str, tuple[float, float]]:
    """Bits per value and NMSE of each type on Gaussian blocks; stock types use the same transform."""
    x = gaussian()
    found = {}
    for type in ("pqo3", "pqo4", "pqt2", "pqt3", "pqt4", "pqt5"):
        y = x[:2000] if type.startswith("pqt") else x  # the path search is slow in NumPy
        found[type] = (CACHE_TYPES[type].bits, nmse(y, decoded(y, type)))
    for type in ("q4_0", "q5_0", "q8_0"):
        found[type] = (CACHE_TYPES[type].bits, nmse(x, rotated_stock(x, type)))
    return found


def facts() -> dict[str, float]:
    """The figures that the page quotes."""
    x = keys()
    y = reference.transform(x)
    worst = int(np.argmax(crest(x)))
    wide = hot_channels()
    return {
        "crest before": float(crest(x)[worst]),
        "crest after": float(crest(y)[worst]),
        "kurtosis before": kurtosis(x),
        "kurtosis after": kurtosis(y),
        "keys with": nmse(x, decoded(x, "pqo3")),
        "keys without": nmse(x, decoded_without_transform(x)),
        "hot 8 with": wide["with"][FACTORS.index(8)],
        "hot 8 without": wide["without"][FACTORS.index(8)],
        "error maxnorm": nmse(gaussian(), decoded(gaussian(), "pqo3", "maxnorm")),
        **{f"error {type}": error for type, (_, error) in errors().items()},
    }


def crest(x: F32) -> npt.NDArray[Any]:
    """Largest magnitude of each block relative to its RMS."""
    ratio: npt.NDArray[Any] = np.abs(x).max(axis=1) / np.sqrt(np.square(x).mean(axis=1))
    return ratio


def kurtosis(x: F32) -> float:
    """Kurtosis of values relative to their block's RMS: 2.8 for Gaussian blocks of 32, more with outliers."""
    unit = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True))
    return float(np.mean(unit**4))


# ---- Pictures ----


def transform() -> Any:
    """The block of keys with the largest outlier, before and after signs and transform."""
    x = keys()
    block = x[np.argmax(crest(x))][None]
    y = reference.transform(block)
    scale = float(reference.search_scale(y, "pqo3")[0])
    figure, (left, right) = _figure(9, 3.2, 1, 2)
    for axes, values, title in (
        (left, block[0], "before the transform"),
        (right, y[0], "after the transform (signs, H32)"),
    ):
        axes.bar(range(32), values, color=OURS, width=0.7)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("index in the block")
        axes.set_ylim(-1.1 * np.abs(block).max(), 1.1 * np.abs(block).max())
    for level in reference.codebook("pqo3").levels * scale:
        right.axhline(level, color=STOCK, linewidth=0.7, linestyle=(0, (4, 3)))
    right.text(32, np.abs(reference.codebook("pqo3").levels * scale).max() + 0.5, "d · level", fontsize=8, color=STOCK)
    return figure


def histogram() -> Any:
    """Histogram of all transformed values in units of their block's scale, with the levels of pqo3 and pqo4."""
    y = reference.transform(keys())
    figure, both = _figure(9, 3.6, 1, 2)
    for axes, type in zip(both, ("pqo3", "pqo4"), strict=True):
        book, scale = reference.codebook(type), reference.search_scale(y, type)
        axes.hist(
            (y / scale[:, None]).ravel(), bins=120, range=(-3, 3), color=SOFT, density=True, histtype="stepfilled"
        )
        for level in book.levels:
            axes.plot([level, level], [0, 0.03], color=OURS, linewidth=2)
        for boundary in book.boundaries:
            axes.axvline(boundary, color=STOCK, linewidth=0.5)
        axes.set_title(f"{type}: {len(book.levels)} levels", fontsize=10)
        axes.set_xlabel("value / d")
        axes.set_yticks([])
    return figure


def outliers() -> Any:
    """Error of pqo3 for each width of four hot channels, with the transform and without."""
    figure, axes = _figure(6, 3.4)
    found = hot_channels()
    for key, colour, label in (("without", STOCK, "without the transform"), ("with", OURS, "with the transform")):
        axes.plot(FACTORS, found[key], marker="o", color=colour, label=label)
    axes.set_xscale("log", base=2, subs=())
    axes.set_xticks(FACTORS, [str(factor) for factor in FACTORS])
    axes.set_xlabel("width of 4 of 128 channels, relative to the others")
    axes.set_ylabel("squared error / squared values")
    axes.set_ylim(0, 0.105)
    axes.legend(frameon=False)
    return figure


def error() -> Any:
    """Error of each type by its bits, and Shannon's bound."""
    figure, axes = _figure(6.5, 3.8)
    bits = np.linspace(2.2, 9, 50)
    axes.plot(bits, 2.0 ** (-2 * bits), color=GRID, linewidth=2)
    axes.text(
        6.5,
        2.0**-13.0,
        "Shannon's bound:\nthe least possible error",
        fontsize=8,
        color=STOCK,
        ha="right",
        va="top",
    )
    for type, (at, value) in errors().items():
        ours = CACHE_TYPES[type].ours
        axes.scatter([at], [value], color=OURS if ours else STOCK, s=28, zorder=3)
        place = (-7, "right") if type.startswith("pqt") else (7, "left")
        axes.annotate(
            *(type, (at, value), (place[0], 0)),
            textcoords="offset points",
            fontsize=9,
            va="center",
            ha=place[1],
            color=OURS if ours else INK,
        )
    axes.set_yscale("log")
    axes.set_xlabel("bits per value, scales included")
    axes.set_ylabel("squared error / squared values")
    return figure


def block() -> Any:
    """The bytes of a block of each type."""
    figure, axes = _figure(9, 4.1)
    axes.set_axis_off()
    axes.set_xlim(-2.6, 23)
    axes.set_ylim(-0.6, 6.2)
    path = (("d", 2, OURS), ("path t", 4, "#f8dfe1"))
    pairs = (("e, even values", 4, SOFT), ("e, odd values", 4, SOFT))
    rows = {
        "pqo3": (("d", 2, OURS), *(("8 x 3 bits", 3, SOFT),) * 4),
        "pqo4": (("d", 2, OURS), *(("2 x 4", 1, SOFT),) * 16),
        "pqt2": (*path, ("e", 4, SOFT)),
        "pqt3": (*path, *pairs),
        "pqt4": (*path, *pairs, ("bit 2 of e", 4, SOFT)),
        "pqt5": (*path, *pairs, ("bit 2 of e", 4, SOFT), ("bit 3 of e", 4, SOFT)),
    }
    for y, (type, fields) in zip(reversed(range(len(rows))), rows.items(), strict=True):
        axes.text(-0.3, y + 0.35, type, ha="right", va="center", fontsize=10, color=INK)
        at = 0
        for name, n_bytes, colour in fields:
            axes.barh(y + 0.35, n_bytes, 0.7, at, color=colour, edgecolor="white", linewidth=1)
            small = 5 if n_bytes == 1 else 8
            axes.text(
                at + n_bytes / 2,
                y + 0.35,
                name,
                ha="center",
                va="center",
                fontsize=small,
                color="white" if colour == OURS else INK,
            )
            at += n_bytes
        axes.text(at + 0.2, y + 0.35, f"{at}", va="center", fontsize=9, color=STOCK)
    axes.text(0, -0.35, "bytes of 32 values", fontsize=8, color=STOCK)
    return figure


def attention() -> Any:
    """The steps of attention that run once for a query, and those that run for each token of the cache."""
    figure, axes = _figure(9, 3.1)
    axes.set_axis_off()
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 40)
    boxes = {
        "q": (8, 29, 13, "q of a head", "white"),
        "hq": (25, 29, 14, "H (s · q)\nonce", SOFT),
        "score": (46, 29, 22, "score = Σ d · ⟨level, q'⟩\nfor each token, from K's blocks", OURS),
        "soft": (70, 29, 13, "softmax", "white"),
        "v": (46, 9, 22, "sum += weight · d · level\nfor each token, from V's blocks", OURS),
        "out": (25, 9, 14, "s · (H sum)\nonce", SOFT),
        "o": (8, 9, 13, "output", "white"),
    }
    for x, y, width, label, colour in boxes.values():
        axes.text(
            *(x + width / 2 - 4, y, label),
            ha="center",
            va="center",
            fontsize=8.5,
            color="white" if colour == OURS else INK,
            bbox={"boxstyle": "round,pad=0.6", "facecolor": colour, "edgecolor": STOCK, "linewidth": 0.8},
        )
    arrow = {"arrowstyle": "->", "color": INK, "linewidth": 1}
    for start, end in (
        ((17.5, 29), (21.5, 29)),
        ((34.5, 29), (40, 29)),
        ((66, 29), (68.5, 29)),
        ((40, 9), (34.5, 9)),
        ((21.5, 9), (16.5, 9)),
    ):
        axes.annotate("", end, start, arrowprops=arrow)
    axes.annotate("", (66, 9), (73, 25.5), arrowprops={**arrow, "connectionstyle": "angle,angleA=0,angleB=90,rad=6"})
    return figure


def calibrated() -> Any:
    """The channels of a KV head of SmolLM2: what queries and keys are, and what is stored and read."""
    results = json.loads((REPOSITORY / "benchmarks" / "results" / "calibration.json").read_text(encoding="utf-8"))
    head = results["channels"]
    figure, both = _figure(9, 3.2, 1, 2)
    for axes, title, queries, keys in zip(
        both,
        (f"layer {head['layer']}, KV head {head['head']}: before", "calibrated"),
        (("q", "q"), ("q / D", "read")),
        (("k", "k"), ("D (k - m)", "stored")),
        strict=True,
    ):
        for (label, name), colour in zip((queries, keys), (STOCK, OURS), strict=True):
            axes.step(range(len(head[name])), head[name], where="mid", color=colour, label=label, linewidth=1.2)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("channel")
        axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=8)
    low, high = np.array([axes.get_ylim() for axes in both]).T
    for axes in both:
        axes.set_ylim(low.min(), high.max())
        axes.set_yticks((0.5, 1, 2, 5, 10), ("0.5", "1", "2", "5", "10"))
        axes.minorticks_off()
    both[0].set_ylabel("RMS")
    return figure


def tail() -> Any:
    """Which cells of a cache have f16 rows beside their blocks, and the mean KLD for each length of the tail."""
    figure, (left, right) = _figure(9, 3.2, 1, 2)
    left.set_axis_off()
    n, first, recent = 40, 4, 12
    for cell in range(n):
        x, y = cell % 20, 1 - cell // 20
        kept = cell < first or cell >= 33 - recent
        written = cell < 33
        left.add_patch(_square(x, y * 2.2 + 1, SOFT if written else "white"))
        if kept and written:
            left.add_patch(_square(x, y * 2.2 + 0.05, OURS))
    left.set_xlim(-0.5, 20.5)
    left.set_ylim(-1.6, 4.6)
    left.text(0, -0.5, "light: blocks of all tokens written so far", fontsize=8, color=INK)
    left.text(0, -1.2, "red: f16 rows of the first four cells and of the newest tokens", fontsize=8, color=INK)
    results = json.loads((REPOSITORY / "benchmarks" / "results" / "tail_quality.json").read_text(encoding="utf-8"))
    for type, colour in (("pqo3", OURS), ("pqo4", STOCK)):
        rows = [row for row in results["rows"] if row["cache"] == type and row["n_ubatch"] == 1]
        right.plot(
            [str(row["tail"]) for row in rows], [row["mean_kld"] for row in rows], marker="o", color=colour, label=type
        )
    right.set_xlabel("newest tokens kept in f16")
    right.set_ylabel("mean KLD, nats")
    right.set_ylim(0)
    right.legend(frameon=False)
    return figure


def _square(x: float, y: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 0.85, 0.85, facecolor=colour, edgecolor=STOCK, linewidth=0.6)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes: Any = figure.subplots(rows, columns)
    for each in np.atleast_1d(axes).ravel():
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=8)
        each.xaxis.label.set_size(9)
        each.yaxis.label.set_size(9)
    return figure, axes


FIGURES: Final[dict[str, Callable[[], Any]]] = {
    each.__name__: each for each in (transform, histogram, outliers, error, block, attention, tail, calibrated)
}


def main() -> int:
    """Draws the named pictures, or all, and prints the figures that the page quotes."""
    import matplotlib

    # A picture drawn again is the same file: fixed ids within it, and no date.
    matplotlib.rcParams["svg.hashsalt"] = "tqgguf"
    draw_asked(
        __doc__.split("\n\n")[0], FIGURES, lambda name, path: FIGURES[name]().savefig(path, metadata={"Date": None})
    )
    for fact, value in facts().items():
        print(f"{fact:16} {value:.5f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
