"""What `tqgguf compare` and `tqgguf tune` print."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ..._util import ranges
from ...config import CACHE_TYPES
from ...diagnostics.attention import OUTLIER_FACTOR, AttentionQuality, HeadError, LayerAttention
from ...diagnostics.compare import Comparison, TypeQuality
from ...diagnostics.continuation import Continuation
from ...diagnostics.recall import DEPTHS, Recall
from ...diagnostics.tune import Tuning
from .table import new_table, print_table, print_text

_FIGURES: Final = (("K NMSE", "nmse_k"), ("V NMSE", "nmse_v"), ("q.k", "score"), ("KL", "kl"), ("output", "output"))


def print_comparison(comparison: Comparison) -> None:
    """Prints what was read, then a row for each cache."""
    rows = comparison.rows
    print(
        f"{comparison.model}: {comparison.n_chunks:,} x {comparison.n_ctx:,} tokens, "
        f"{comparison.n_scored:,} predictions scored against {rows[0].type}, KL divergence in nats\n"
    )
    print_qualities(rows)


def print_qualities(rows: Sequence[TypeQuality]) -> None:
    """Prints a row for each cache; the first is the reference and has no divergence."""
    figures = ("cache", "bits", "bytes/token", "bytes", "perplexity")
    table = new_table(*figures, "mean KLD", "±", "median", "99 %", "99.9 %", "max", "same top", "tokens/s")
    for row in rows:
        kld = row.kld
        divergence = (kld.mean, kld.mean_error, kld.median, kld.p99, kld.p999, kld.max)
        table.add_row(
            row.type,
            f"{row.bits:.4g}",
            f"{row.bytes_per_token:,}",
            f"{row.bytes:,}",
            f"{row.perplexity:,.4f}",
            *("" if row is rows[0] else f"{value:#.3g}" for value in divergence),
            "" if row is rows[0] else f"{row.same_top:.2%}",
            f"{row.tokens_per_second:,.0f}",
        )
    print_table(table)


def print_continuation(result: Continuation) -> None:
    """Prints a row for each cache that followed the reference's answers."""
    reference, *others = result.rows
    print(
        f"\nthe reference's own {len(reference.agreed):,} x {result.n_generate:,} tokens after "
        f"{result.n_prompt:,} of text, KL divergence by position in the answer\n"
    )
    edges = [result.n_generate * i // len(reference.by_position) for i in range(len(reference.by_position) + 1)]
    spans = [f"{first + 1:,}-{last:,}" for first, last in itertools.pairwise(edges)]
    table = new_table("cache", "mean KLD", "median", "99.9 %", *spans, "same top", "agree for", "same answers")
    for row in others:
        values = (row.kld.mean, row.kld.median, row.kld.p999, *row.by_position)
        same = sum(n == result.n_generate for n in row.agreed)
        table.add_row(
            row.type,
            *(f"{value:#.3g}" for value in values),
            f"{row.same_top:.2%}",
            f"{statistics.median(row.agreed):g}",
            f"{same}/{len(row.agreed)}",
        )
    print_table(table)


def print_recall(result: Recall) -> None:
    """Prints the numbers of right answers: a row for each size and cache, a column for each depth."""
    print("\nfacts recalled, by depth of the fact in the prompt\n")
    table = new_table(result.unit, "cache", *(f"{depth:.0%}" for depth in DEPTHS), "all")
    for size in sorted({score.size for score in result.scores}):
        for kind in dict.fromkeys(score.type for score in result.scores):
            marks = [score for score in result.scores if (score.size, score.type) == (size, kind)]
            right, n = sum(score.right for score in marks), sum(score.n for score in marks)
            cells = [f"{score.right}/{score.n}" for score in marks]
            table.add_row(f"{size:,}", kind, *cells, f"{right}/{n}")
        table.add_section()
    print_table(table)


# ---- compare --attention ----


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


# ---- tune ----


def print_tuning(tuning: Tuning, output: Path) -> None:
    """Prints the types, what the smallest type is predicted to cost every layer and was measured to cost bands of them,
    then the policy beside single types."""
    n = tuning.n_tuning
    held_out = "tuning did not read" if tuning.max_kld is None else "told tuning where to stop, and nothing else"
    print(
        f"{tuning.model}: chunks of {tuning.n_ctx:,} tokens; tuned on {_chunks(1, n)}, "
        f"measured on {_chunks(n + 1, n + tuning.n_held_out)}, which {held_out}"
        + (f"; {_tailed(tuning)} caches with a tail of {tuning.tail} tokens in f16\n" if tuning.tail else "\n")
    )
    policy, smallest = tuning.policy, tuning.types[0]
    table = new_table("layer", "K", f"KLD at {smallest}", "V", f"KLD at {smallest}")
    cost = {(s.layer, s.side): s.kld for s in tuning.sensitivities if s.type == smallest}
    for layer in sorted({layer for layer, _ in cost}):
        table.add_row(
            str(layer),
            policy.types_k[layer],
            f"{cost[layer, 'K']:#.3g}",
            policy.types_v[layer],
            f"{cost[layer, 'V']:#.3g}",
        )
    print_table(table)
    print(f"\nKLD of layers: predicted, from KLD measured for bands of them in {smallest}, less {tuning.floor:#.2g}:")
    for band in tuning.bands:
        print(f"  {band.side} of layers {ranges(band.layers)}: {band.kld:#.3g} ± {band.error:#.2g}")
    print(
        f"\npolicy on the tuning part: mean KLD {tuning.measured:#.3g} measured, "
        f"{tuning.predicted:#.3g} predicted; on the part held out:\n"
    )
    print_qualities(tuning.rows)
    policy_row = tuning.rows[1]
    if tuning.line is not None:
        print(
            f"\n{policy_row.kld.mean / tuning.line:.2f} of the mean KLD that single types in all layers give "
            f"at {policy_row.bits:.4g} bits (interpolated where none has so many)"
        )
    bits = 16 * policy_row.bytes_per_token / tuning.rows[0].bytes_per_token
    tail = f"; {policy_row.bits:.4g} with the tail, at {tuning.n_ctx:,} tokens" if policy_row.bits > bits else ""
    calibrated = ", keys calibrated" if policy.calibrated else ""
    print(
        f"\nwritten to {output}: {bits:.4g} bits per value{calibrated}, "
        f"{policy_row.bytes_per_token:,} bytes per token{tail}"
    )


def _tailed(tuning: Tuning) -> str:
    """Which caches were measured with a tail."""
    stock = any(row.tail and row.type in CACHE_TYPES and not CACHE_TYPES[row.type].ours for row in tuning.rows)
    return "quantized" if stock else "pqo and pqt"


def _chunks(first: int, last: int) -> str:
    return f"chunk {first}" if first == last else f"chunks {first} to {last}"
