"""`tqgguf inspect`: what a model's KV cache would take, and what lies in one."""

from __future__ import annotations

import argparse
import contextlib
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import TextError
from ..options import (
    add_cache_options,
    add_calibration_option,
    add_threads_option,
    context_of,
    load_model,
    positive,
    several,
)
from ..render.format import show
from ..render.progress import Bar

if TYPE_CHECKING:
    from ...diagnostics.cache_contents import CacheContents


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "inspect",
        help="what a model's KV cache takes, and what lies in one",
        description="Shows the KV cache of a GGUF model and its size in each cache type, without loading weights. "
        "With --session it looks into a saved cache, with --file into the cache of a text: norms, scales, code use, "
        "outlier channels and offsets of each head, and how much a fourth bit would help.",
        epilog="example: tqgguf inspect model.gguf --session talk.session --html report.html",
    )
    parser.add_argument("model", help="a GGUF file")
    contexts = partial(several, positive)
    parser.add_argument(
        "--ctx", type=contexts, default=(), metavar="N,N", help="context lengths (default: the model's own)"
    )
    look = parser.add_argument_group("what lies in a cache")
    look.add_argument("--session", metavar="FILE", help="a session that chat or llama.cpp saved with this model")
    look.add_argument("-f", "--file", metavar="TEXT", help="a UTF-8 text for the model to read")
    look.add_argument("--sample", type=positive, metavar="N", help="cells to look at (default: 1024)")
    look.add_argument("--html", type=Path, metavar="FILE", help="also write a page with heat maps")
    add_cache_options(parser)
    add_calibration_option(parser, "mean and gain of each channel of the keys, for --file")
    add_threads_option(parser)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(call=call, usage_error=parser.error, cache=None)


def call(args: argparse.Namespace) -> int:
    """Runs the command."""
    from ...diagnostics.model_cache import model_cache
    from ..render.inspect import print_model_cache

    if args.session and args.file:
        args.usage_error("--session and --file are two sources, give one")
    if args.session and args.ctx:
        args.usage_error("--ctx is for --file or for sizes: a session has the context it was saved with")
    if not args.file and any((args.cache, args.cache_k, args.cache_v, args.calibration, args.threads)):
        args.usage_error("--cache, --cache-k, --cache-v, --calibration and --threads are for a model that reads --file")
    args.cache = args.cache or "pqo3"
    if args.session or args.file:
        return _call_contents(args)
    if args.html or args.sample:
        args.usage_error("--html and --sample need something to look into: --session or --file")
    result = model_cache(args.model, args.ctx, tail=args.tail)
    show(result, args.json, print_model_cache)
    return 0


def _call_contents(args: argparse.Namespace) -> int:
    from ..._util import write_whole
    from ...diagnostics import cache_contents
    from ..render.inspect import print_contents
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
    show(result, args.json, print_contents)
    return 0


def _read_text(args: argparse.Namespace, sample: int) -> CacheContents:
    """The contents of the cache after the model has read a text."""
    from ...diagnostics.cache_contents import inspect_cache
    from ...diagnostics.texts import read_text

    text = read_text(args.file)
    if not text.strip():
        raise TextError(f"{args.file} is empty: there is nothing for the model to read")
    bar = Bar()
    data = text.encode()
    # A token has at least one byte, so more cells than bytes would stay empty.
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
