"""`tqgguf compare`: what caches cost a model, measured on a text and by recall."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cache.tail import DEFAULT_TAIL
from ...config import CACHE_TYPES, MEASURED_TYPES
from ...errors import TqggufError
from ...gguf.info import read_model_info
from ..options import cache_or_pair, positive, tail, threads
from ..render.format import print_table, to_json
from ..render.plot import check_plot, plot
from . import compare_attention

if TYPE_CHECKING:
    from rich.progress import TaskID

    from ...cache.policy import PolicySpec
    from ...diagnostics.compare import Comparison, TypeQuality
    from ...diagnostics.recall import Recall


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "compare",
        help="what caches cost a model",
        description="Reads a text with several KV caches and compares each with the first: perplexity, "
        "KL divergence, tokens predicted alike. It loads the weights once, and a cache for each type.",
        epilog="example: tqgguf compare model.gguf -f text.txt --cache f16,pqo4,pqo4/pqo3,policy.gguf --plot kld.png",
    )
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("-f", "--file", metavar="TEXT", help="a UTF-8 text file (the demo model has a text of its own)")
    parser.add_argument(
        "--cache",
        type=cache_list,
        default=",".join(MEASURED_TYPES),
        metavar="CACHE,CACHE",
        help="types, pairs K/V and policy files, reference first (default: %(default)s)",
    )
    parser.add_argument(
        "--tail",
        type=tail_list,
        default=(DEFAULT_TAIL,),
        metavar="N,N",
        help=f"newest tokens that caches of ours keep in f16; each is measured with each N (default: {DEFAULT_TAIL})",
    )
    parser.add_argument(
        "--ctx",
        type=positive,
        metavar="N",
        help="tokens in a chunk (default: 2048, or the trained context if less; 512 with --attention)",
    )
    parser.add_argument(
        "--chunks", type=positive, metavar="N", help="chunks to read at most (default: all; 8 of the demo model's text)"
    )
    parser.add_argument(
        "--batch", type=positive, default=512, metavar="N", help="tokens read at once; fewer save memory (default: 512)"
    )
    parser.add_argument("--threads", type=threads, metavar="N", help="threads (default: all processors)")
    parser.add_argument("--recall", action="store_true", help="also ask for facts planted in prompts, and count")
    parser.add_argument("--plot", metavar="FILE", help="also draw KL divergence over bytes (.png, .svg, .pdf)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    compare_attention.add_options(parser)
    parser.set_defaults(call=call, usage_error=parser.error)


def cache_list(text: str) -> tuple[PolicySpec, ...]:
    """argparse type: at least two caches with commas between: types, pairs such as pqo4/pqo3, policy files."""
    from ...diagnostics.compare import compared_caches

    caches = tuple(cache_or_pair(part.strip()) for part in text.split(","))
    try:
        compared_caches(caches, n_layer=1)  # what is wrong in any model is told before one is opened
    except TqggufError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return caches


def tail_list(text: str) -> tuple[int, ...]:
    """argparse type: numbers of tokens with commas between, none twice."""
    found = tuple(tail(part.strip()) for part in text.split(","))
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"a tail is given twice in {text!r}")
    return found


def call(args: argparse.Namespace) -> int:
    """Runs the command."""
    from ...diagnostics.compare import compare, own_text, read_text
    from ...diagnostics.recall import recall

    if args.plot:
        check_plot(Path(args.plot))
    text = None if args.file is None else read_text(args.file)
    if args.attention:
        if args.recall or args.plot or args.chunks or args.tail != (DEFAULT_TAIL,):
            args.usage_error("--attention goes with none of --recall, --plot, --chunks, --tail")
        types = [cache for cache in args.cache if isinstance(cache, str) and cache in CACHE_TYPES]
        if len(types) < len(args.cache):
            args.usage_error("--attention takes types in --cache, no pairs and no policy files")
        if text is None:
            text = own_text(read_model_info(args.model), args.ctx or compare_attention.DEFAULT_TOKENS, 1)
        return compare_attention.call(args, text, types)
    with progress_bar("reading") as progress:
        comparison = compare(
            args.model,
            args.cache,
            text,
            tails=args.tail,
            n_ctx=args.ctx,
            n_chunks=args.chunks,
            n_batch=args.batch,
            n_threads=args.threads,
            progress=progress,
        )
    for note in comparison.notes:
        print(f"tqgguf: note: {note}", file=sys.stderr)
    if not args.json:  # before the questions are asked, which may take as long again
        render(comparison)
    recalled = None
    if args.recall:
        with progress_bar("asking") as progress:
            recalled = recall(
                args.model, args.cache, tails=args.tail, n_ctx=args.ctx, n_threads=args.threads, progress=progress
            )
    if args.json:
        print(to_json({"comparison": comparison, "recall": recalled}))
    elif recalled:
        render_recall(recalled)
    if args.plot:  # last: what was measured is printed, whatever the disk says
        plot(comparison, Path(args.plot))
    return 0


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, if that is a terminal; yields the callback that moves it."""
    with progress_bars() as show:
        yield lambda done, total: show(title, done, total)


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Bars one below the other, one for each title, on stderr if that is a terminal; yields what moves them."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        tasks: dict[str, TaskID] = {}

        def show(title: str, done: int, total: int) -> None:
            if title not in tasks:
                tasks[title] = bar.add_task(title, total=None)
            bar.update(tasks[title], completed=done, total=total)

        yield show


def render(comparison: Comparison) -> None:
    """Prints what was read, then a row for each cache."""
    rows = comparison.rows
    print(
        f"{comparison.model}: {comparison.n_chunks:,} x {comparison.n_ctx:,} tokens, "
        f"{comparison.n_scored:,} predictions scored against {rows[0].type}, KL divergence in nats\n"
    )
    render_rows(rows)


def render_rows(rows: Sequence[TypeQuality]) -> None:
    """Prints a row for each cache; the first is the reference and has no divergence."""
    table = table_of(
        "cache", "bits", "bytes/token", "bytes", "perplexity", "mean KLD", "±", "median", "99 %", "99.9 %", "max"
    )
    for title in ("same top", "tokens/s"):
        table.add_column(title, justify="right", no_wrap=True)
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


def render_recall(result: Recall) -> None:
    """Prints right answers, a row for each size and cache, a column for each depth."""
    from ...diagnostics.recall import DEPTHS

    print("\nfacts recalled, by depth of the fact in the prompt\n")
    table = table_of(result.unit, "cache", *(f"{depth:.0%}" for depth in DEPTHS), "all")
    for size in sorted({score.size for score in result.scores}):
        for kind in dict.fromkeys(score.type for score in result.scores):
            marks = [score for score in result.scores if (score.size, score.type) == (size, kind)]
            right, n = sum(score.right for score in marks), sum(score.n for score in marks)
            cells = [f"{score.right}/{score.n}" for score in marks]
            table.add_row(f"{size:,}", kind, *cells, f"{right}/{n}")
        table.add_section()
    print_table(table)


def table_of(*titles: str) -> Any:
    """An empty table whose columns are right-aligned, but for that of caches."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, justify="left" if title == "cache" else "right", no_wrap=True)
    return table
