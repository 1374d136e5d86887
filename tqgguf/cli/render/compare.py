"""What `tqgguf compare` prints."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from ...diagnostics.compare import Comparison, TypeQuality
from ...diagnostics.continuation import Continuation
from ...diagnostics.recall import DEPTHS, Recall
from .table import new_table, print_table


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
