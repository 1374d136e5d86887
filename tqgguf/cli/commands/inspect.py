"""`tqgguf inspect`: what a model's KV cache would take, and what lies in one."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config import CACHE_TYPES
from ...diagnostics.model_cache import ModelCache, model_cache
from ...errors import TextError
from ..options import add_cache_options, add_threads_option, context_of, load_model, positive
from ..render.format import print_table, printable, size, to_json
from ..render.progress import Bar

if TYPE_CHECKING:
    from ...diagnostics.cache_contents import CacheContents


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "inspect",
        help="what a model's KV cache takes, and what lies in one",
        description="Shows what a GGUF says about its KV cache, and its size in each cache type; loads no weights. "
        "With --session it looks into a cache that was saved, with --file into one that has read a text: norms, "
        "scales, code use, outlier channels and offsets of each head, and what a further bit would buy.",
        epilog="example: tqgguf inspect model.gguf --session talk.session --html report.html",
    )
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument(
        "--ctx", type=contexts, default=(), metavar="N,N", help="context lengths (default: the model's own)"
    )
    look = parser.add_argument_group("what lies in a cache")
    look.add_argument("--session", metavar="FILE", help="a session that chat or llama.cpp saved with this model")
    look.add_argument("-f", "--file", metavar="TEXT", help="a UTF-8 text for the model to read")
    look.add_argument("--sample", type=positive, metavar="N", help="cells to look at (default: 1024)")
    look.add_argument("--html", type=Path, metavar="FILE", help="also write a page with heat maps")
    add_cache_options(parser)
    add_threads_option(parser)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(call=call, usage_error=parser.error, cache=None)


def contexts(text: str) -> tuple[int, ...]:
    """argparse type: positive integers with commas between."""
    return tuple(positive(part.strip()) for part in text.split(","))


def call(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.session and args.file:
        args.usage_error("--session and --file are two sources, give one")
    if args.session and args.ctx:
        args.usage_error("--ctx is for --file or for sizes: a session has the context it was saved with")
    if not args.file and any((args.cache, args.cache_k, args.cache_v, args.threads)):
        args.usage_error("--cache, --cache-k, --cache-v and --threads are for the model that reads --file")
    args.cache = args.cache or "pqo3"
    if args.session or args.file:
        return _call_contents(args)
    if args.html or args.sample:
        args.usage_error("--html and --sample need something to look into: --session or --file")
    result = model_cache(args.model, args.ctx, tail=args.tail)
    if args.json:
        print(to_json(result))
    else:
        render(result)
    return 0


def _call_contents(args: argparse.Namespace) -> int:
    from ...diagnostics import cache_contents
    from ...whole_file import write_whole
    from ..render.report import check_report, page

    if args.html:
        check_report(args.html)
    sample = args.sample or cache_contents.DEFAULT_SAMPLE
    if args.session:
        result = cache_contents.inspect_session(args.session, args.model, sample=sample)
    else:
        result = _read_text(args, sample)
    if args.html:
        write_whole(args.html, (page(result).encode(),), what="page")
        print(f"written: {args.html}", file=sys.stderr)
    if args.json:
        print(to_json(result))
    else:
        render_contents(result)
    return 0


def _read_text(args: argparse.Namespace, sample: int) -> CacheContents:
    """Lets the model read a text, and looks at its cache."""
    from ...diagnostics.cache_contents import inspect_cache
    from ...diagnostics.compare import read_text

    text = read_text(args.file)
    if not text.strip():
        raise TextError(f"{args.file} is empty: there is nothing for the model to read")
    bar = Bar()
    data = text.encode()
    # A token has a byte; cells beyond would be allocated and stay empty.
    n_ctx = min(context_of(args.ctx[0] if args.ctx else None, args.model), len(data) + 8)
    with contextlib.closing(load_model(args, args.model, bar, n_ctx=n_ctx)) as model:
        tokens = model.tokenize(data)
        if len(tokens) > n_ctx:
            print(
                f"tqgguf: note: of {len(tokens):,} tokens the first {n_ctx:,} are read; --ctx {len(tokens)} reads all",
                file=sys.stderr,
            )
        try:
            model.eval(tokens[:n_ctx])
        finally:
            bar.close()
        return inspect_cache(model, sample=sample)


def render_contents(result: CacheContents) -> None:
    """Prints a line for K and for V of each layer: means over its heads, or the most of them."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.print(
        Text(
            f"{result.info.name} ({result.info.architecture}): {result.n_cells:,} cells with tokens, "
            f"{size(result.bytes)}; {result.n_sampled:,} looked at"
        )
    )
    for note in result.notes:
        console.print(Text(note))
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    titles = ("layer", "", "type", "norm", "scale", "entropy", "outliers", "offset", "3 bits", "4 bits", "gain")
    for title in titles:
        table.add_column(title, justify="left" if title in ("", "type") else "right", no_wrap=True)
    for tensor in result.tensors:
        heads, n = tensor.heads, len(tensor.heads)
        ours = CACHE_TYPES[tensor.type].ours
        table.add_row(
            str(tensor.layer),
            tensor.side,
            tensor.type,
            f"{sum(head.norm for head in heads) / n:.3g}",
            f"{sum(head.scale or 0 for head in heads) / n:.3g}" if ours else "",
            f"{sum(head.entropy or 0 for head in heads) / n:.2f}" if ours else "",
            str(sum(len(head.outliers) for head in heads)),
            f"{max(head.offset for head in heads):.2f}",
            f"{sum(head.nmse_3 for head in heads) / n:.4f}",
            f"{sum(head.nmse_4 for head in heads) / n:.4f}",
            f"{sum(head.bit_gain for head in heads) / n:.1f}",
        )
    print_table(table)
    console.print()
    console.print(
        Text(
            "Means over a layer's heads; of outlier channels the sum, of offsets the largest. Entropy in bits per "
            "index. "
            "Errors are squared, relative to the squared values, and estimated, for a compressed value is known only "
            "decoded. Gain: how many times smaller a fourth bit makes them."
        )
    )


def render(result: ModelCache) -> None:
    """Prints the model's facts, then the table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    info = result.info
    console = Console(highlight=False)
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in (
        ("model", f"{info.name} ({info.architecture}, {size(info.file_bytes)})"),
        ("trained context", f"{info.n_ctx_train:,} tokens"),
        ("layers", f"{info.n_layer}, of which {len(info.layers)} have a KV cache"),
        ("heads", f"{info.n_head} for Q; KV: {_each(layer.n_head_kv for layer in info.layers)}"),
        ("head size", f"K {_each(r.head_dim_k for r in info.layers)}, V {_each(r.head_dim_v for r in info.layers)}"),
        *(("note", note) for note in info.notes),
    ):
        facts.add_row(name, Text(printable(value)))
    print_table(facts, fold=True)
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("cache", "bits/value", "bytes/token", *(f"{n:,} tokens" for n in result.contexts)):
        table.add_column(title, justify="left" if title == "cache" else "right", no_wrap=True)
    reasons = []
    for row in result.rows:
        cells = [row.type, f"{row.bits:g}"]
        if row.bytes is None or row.bytes_per_token is None:
            reasons.append(f"{row.type}: {row.obstacle}")
            cells += ["cannot be used"]
        else:
            cells += [f"{row.bytes_per_token:,}", *(size(n) for n in row.bytes)]
        table.add_row(*cells)
    print_table(table)
    for reason in reasons:
        console.print(Text(reason))


def _each(values: Any) -> str:
    """The value all layers share, or the values there are."""
    distinct = sorted(set(values))
    return ", ".join(map(str, distinct)) if distinct else "none"
