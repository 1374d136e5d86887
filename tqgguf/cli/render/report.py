"""The page of `tqgguf inspect --html`: one file without scripts or links, for a phone, a desk, paper, light and dark.

Pictures are SVG without text, stretched to their place; numbers stand beside them in HTML, so that they stay legible at
any width.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ...config import CACHE_TYPES
from ...errors import ArgumentError
from ...whole_file import check_folder
from .format import size

if TYPE_CHECKING:
    from ...diagnostics.cache_contents import CacheContents, HeadContents, TensorContents

_RAMP: Final = ((24, 30, 84), (52, 92, 148), (44, 148, 148), (122, 193, 108), (250, 222, 90))
"""Colours from the least value to the largest; lightness grows all the way, so that it survives grey paper."""

_CSS: Final = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #5b6875; --line: #d9dee4; --ground: #fff; --card: #f4f6f8;
  --bar: #2c9494; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaee; --soft: #9aa7b4; --line: #38424d; --ground: #14191f;
  --card: #1d242c; --bar: #55b9b3; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.25rem 1rem 3rem; color: var(--ink); background: var(--ground);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .25rem; }
p { margin: 0 0 .75rem; color: var(--soft); max-width: 44rem; overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.facts div { background: var(--card); border-radius: .5rem; padding: .6rem .75rem; }
.facts b { display: block; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
.facts span { color: var(--soft); font-size: .85rem; }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 1.1rem 2rem; }
figure { margin: 0; break-inside: avoid; min-width: 0; }
figcaption { display: flex; align-items: center; gap: .5rem; font-size: .85rem; margin-bottom: .3rem;
  font-variant-numeric: tabular-nums; }
figcaption b { flex: 1; }
.ramp { width: 4.5rem; height: .6rem; border-radius: .3rem; background: linear-gradient(90deg, RAMP); }
.map { display: grid; grid-template-columns: 1.6rem 1fr; font-size: .75rem; color: var(--soft); }
.map svg { width: 100%; height: HEIGHT; display: block; border-radius: .25rem; background: var(--card); }
.heads { display: flex; flex-direction: column; justify-content: space-between; line-height: 1.2; padding: .1rem 0; }
.heads.all, .layers.all { justify-content: space-around; }
.layers { grid-column: 2; display: flex; justify-content: space-between; padding-top: .15rem; }
.bars svg { width: 100%; height: 7rem; display: block; border-bottom: 1px solid var(--line); }
.bars rect { fill: var(--bar); }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .2rem .6rem .2rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, td:nth-child(2), th:nth-child(2), td:nth-child(3), th:nth-child(3) { text-align: left; }
th { color: var(--soft); font-weight: 600; }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --line: #bbb; --ground: #fff; --card: #fff;
    --bar: #2c9494; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .facts div { border: 1px solid var(--line); } .table { overflow: visible; } section { break-inside: avoid; }
  section.long { break-inside: auto; } tr { break-inside: avoid; } }
"""

Value = Callable[["HeadContents"], "float | None"]

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
    """Says before anything is measured why the page could not be written afterwards.

    Raises:
        ArgumentError: its folder does not exist or cannot be written to, or it is a folder itself.
    """
    if path.is_dir():
        raise ArgumentError(f"cannot write {path}: it is a folder")
    check_folder(path, f"cannot write {path}")


def page(contents: CacheContents) -> str:
    """The whole page."""
    name = html.escape(contents.info.name)
    sides = [(side, contents.side(side)) for side in ("K", "V") if contents.side(side)]
    most_heads = max(len(tensor.heads) for tensor in contents.tensors)
    css = _CSS.replace("RAMP", ", ".join(_colour(i / 8) for i in range(9)))
    css = css.replace("HEIGHT", f"{min(max(1.4 * most_heads, 3), 14):g}rem")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>KV cache of {name}</title><style>{css}</style></head><body>",
        f"<h1>KV cache of {name}</h1>",
        f"<p>{html.escape(_summary(contents))}</p>",
        _facts(contents),
        *(f"<p>{html.escape(note[:1].upper() + note[1:])}.</p>" for note in contents.notes),
        *(_maps(title, text, form, value, sides) for title, text, form, value in _MAPS),
        _histograms(sides),
        _table(contents),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _summary(contents: CacheContents) -> str:
    where = "a live context" if contents.source == "context" else contents.source
    cells = f"{contents.n_cells:,} cells with tokens, of which {contents.n_sampled:,} were looked at"
    axes = "In the pictures layers run from left to right and heads from top to bottom"
    return f"{contents.info.architecture}, from {where}: {cells}. {axes}."


def _facts(contents: CacheContents) -> str:
    tensors = contents.tensors
    heads = [head for tensor in tensors for head in tensor.heads]
    types = sorted({tensor.type for tensor in tensors})
    f16 = sum(tensor.bytes / _bits(tensor) * 16 for tensor in tensors)
    facts = [
        (", ".join(types), "type" if len(types) == 1 else "types"),
        (size(contents.bytes), f"in those cells, {contents.bytes / f16:.1%} of f16"),
        (f"{len(contents.side('K'))}", "layers with a cache"),
        (f"{sum(len(head.outliers) for head in heads)}", "outlier channels in all"),
        (f"{_mean([head.nmse_3 for head in heads]):.4f}", "mean error at 3 bits"),
        (f"{_mean([head.bit_gain for head in heads]):.1f} times", "smaller with a fourth bit"),
    ]
    items = (f"<div><b>{html.escape(value)}</b><span>{html.escape(what)}</span></div>" for value, what in facts)
    return f'<div class="facts">{"".join(items)}</div>'


def _bits(tensor: TensorContents) -> float:
    return CACHE_TYPES[tensor.type].bits


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _maps(
    title: str, text: str, form: str, value: Value, sides: Sequence[tuple[str, tuple[TensorContents, ...]]]
) -> str:
    figures = [_map(side, tensors, form, value) for side, tensors in sides]
    if not any(figures):
        return ""
    body = "".join(figures)
    return f'<section><h2>{title}</h2><p>{text}</p><div class="maps">{body}</div></section>'


def _map(side: str, tensors: Sequence[TensorContents], form: str, value: Value) -> str:
    """A heat map: a column for each layer, a row for each head."""
    found = [
        (x, head.head, tensor.layer, number)
        for x, tensor in enumerate(tensors)
        for head in tensor.heads
        if (number := value(head)) is not None and math.isfinite(number)
    ]
    if not found:
        return ""
    low, high = min(number for *_, number in found), max(number for *_, number in found)
    low = 0.0 if len(found) < sum(len(tensor.heads) for tensor in tensors) else low  # those without a value are empty
    n_head = max(len(tensor.heads) for tensor in tensors)
    cells = "".join(
        f'<rect x="{x}" y="{y}" width="1.02" height="1.02" fill="{_colour((number - low) / (high - low or 1))}">'
        f"<title>{side}, layer {layer}, head {y}: {form.format(number)}</title></rect>"
        for x, y, layer, number in found
    )
    picture = (
        f'<svg viewBox="0 0 {len(tensors)} {n_head}" preserveAspectRatio="none" shape-rendering="crispEdges" '
        f'role="img" aria-label="{side} by layer and head, {form.format(low)} to {form.format(high)}">{cells}</svg>'
    )
    few = " all" if n_head <= 4 else ""
    legend = f"{form.format(low)}<span class=ramp></span>{form.format(high)}" if high > low else form.format(low)
    return (
        f"<figure><figcaption><b>{side}</b>{legend}</figcaption><div class=map>"
        f"<div class='heads{few}'>{_ends(range(n_head))}</div>{picture}"
        f"<div class='layers{' all' if len(tensors) <= 4 else ''}'>{_ends([t.layer for t in tensors])}</div>"
        "</div></figure>"
    )


def _ends(numbers: Sequence[int]) -> str:
    """The numbers beside an axis: all of up to four, else the first and the last."""
    shown = numbers if len(numbers) <= 4 else (numbers[0], numbers[-1])
    return "".join(f"<span>{number}</span>" for number in shown)


def _histograms(sides: Sequence[tuple[str, tuple[TensorContents, ...]]]) -> str:
    """How often each index is used, over all heads of all layers of a type."""
    figures = []
    for side, tensors in sides:
        for kind in sorted({tensor.type for tensor in tensors if tensor.heads[0].codes}):
            use = [head.codes for tensor in tensors if tensor.type == kind for head in tensor.heads]
            mean = [_mean(column) for column in zip(*use, strict=True)]
            top = max(mean)
            bars = "".join(
                f'<rect x="{i + 0.08:g}" y="{1 - share / top:.4f}" width="0.84" height="{share / top:.4f}">'
                f"<title>index {i}: {share:.1%}</title></rect>"
                for i, share in enumerate(mean)
            )
            figures.append(
                f"<figure class=bars><figcaption><b>{side}, {kind}</b>the most used: {top:.1%}</figcaption>"
                f'<svg viewBox="0 0 {len(mean)} 1" preserveAspectRatio="none" role="img" '
                f'aria-label="use of each index of {kind}">{bars}</svg>'
                f'<div class="layers map"><span>0</span><span>{len(mean) - 1}</span></div></figure>'
            )
    if not figures:
        return ""
    text = "How often each index of the codebook is used, over all heads. A negative scale mirrors the codebook."
    body = "".join(figures)
    return f'<section><h2>Use of each index</h2><p>{text}</p><div class="maps">{body}</div></section>'


def _table(contents: CacheContents) -> str:
    titles = ("layer", "", "type", "norm", "scale", "entropy", "outliers", "offset", "3 bits", "4 bits")
    rows = []
    for tensor in contents.tensors:
        heads = tensor.heads
        scales = [head.scale for head in heads if head.scale is not None]
        entropies = [head.entropy for head in heads if head.entropy is not None]
        cells = (
            str(tensor.layer),
            tensor.side,
            tensor.type,
            f"{_mean([head.norm for head in heads]):.3g}",
            f"{_mean(scales):.3g}" if scales else "",
            f"{_mean(entropies):.2f}" if entropies else "",
            str(sum(len(head.outliers) for head in heads)),
            f"{max(head.offset for head in heads):.2f}",
            f"{_mean([head.nmse_3 for head in heads]):.4f}",
            f"{_mean([head.nmse_4 for head in heads]):.4f}",
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{title}</th>" for title in titles)
    return (
        "<section class=long><h2>All layers</h2>"
        "<p>Means over the heads; of outliers the sum, of offsets the largest.</p>"
        f"<div class=table><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _colour(share: float) -> str:
    """The colour of a value between 0 and 1."""
    place = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    i = min(int(place), len(_RAMP) - 2)
    mixed = (a + (b - a) * (place - i) for a, b in zip(_RAMP[i], _RAMP[i + 1], strict=True))
    return "#" + "".join(f"{round(part):02x}" for part in mixed)
