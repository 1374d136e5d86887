"""`tqgguf compare`: the cost of caches, measured on a text, by recall, or in attention alone."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from ...cache.tail import DEFAULT_TAIL
from ...config import CACHE_TYPES, MEASURED_TYPES
from ...errors import TqggufError
from ...gguf.info import read_model_info
from ..options import add_calibration_option, add_text_options, cache_list, several, tail
from ..render.format import show, to_json
from ..render.plot import check_plot, plot
from ..render.progress import Bar

ATTENTION_TOKENS: Final = 512
"""Tokens for --attention without --ctx: time and memory grow with their square."""


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "compare",
        help="what caches cost a model",
        description="Reads a text with several KV caches and compares each with the first: perplexity, "
        "KL divergence, tokens predicted alike. The weights are loaded once, for all caches.",
        epilog="example: tqgguf compare model.gguf -f text.txt --cache f16,pqo4,pqo4/pqo3,policy.gguf --plot kld.png",
    )
    add_text_options(parser, ctx="; 512 with --attention", chunks=" (default: all; 8 of the demo model's text)")
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
        metavar="N,N",
        help="newest tokens kept in f16; each quantized cache is measured with each N "
        f"(default: {DEFAULT_TAIL} beside pqo and pqt types, none beside others)",
    )
    add_calibration_option(parser, "each cache with quantized keys is also measured with a calibration of them")
    parser.add_argument("--recall", action="store_true", help="also ask for facts planted in prompts, and count")
    parser.add_argument(
        "--generate",
        type=int,
        metavar="N",
        help="also let the reference continue each chunk by N tokens, the most probable ones, and all caches follow it",
    )
    parser.add_argument("--plot", metavar="FILE", help="also draw KL divergence over bytes (.png, .svg, .pdf)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    add_attention_options(parser)
    parser.set_defaults(call=call, usage_error=parser.error)


def add_attention_options(parser: argparse.ArgumentParser) -> None:
    """Adds --attention and the options that belong to it."""
    group = parser.add_argument_group("attention")
    group.add_argument(
        "--attention",
        action="store_true",
        help="instead of KLD: errors of K, V, scores, attention weights and outputs on the model's own Q, K and V",
    )
    group.add_argument(
        "--layers", type=layer_list, metavar="N,N-N", help="layers to look at (default: first, middle, last)"
    )
    group.add_argument("--centre", action="store_true", help="subtract each head's mean key before encoding")
    group.add_argument(
        "--no-rotation", action="store_true", help="leave out llama.cpp's rotation before stock quantized types"
    )


def layer_list(text: str) -> tuple[int, ...]:
    """argparse type: layers such as "0,1,5-7"."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and (not last.isdecimal() or int(last) < int(first))):
            raise argparse.ArgumentTypeError(f"must be layers such as 0,1,5-7, not {text!r}")
        found.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))


def tail_list(text: str) -> tuple[int, ...]:
    """argparse type: numbers of tokens with commas between, none twice."""
    found = several(tail, text)
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"a tail is given twice in {text!r}")
    return found


def call(args: argparse.Namespace) -> int:
    """Runs the command."""
    from ...diagnostics.compare import compare
    from ...diagnostics.continuation import continuation
    from ...diagnostics.recall import recall
    from ...diagnostics.texts import own_text, read_text
    from ..render.compare import print_comparison, print_continuation, print_recall

    if args.plot:
        check_plot(Path(args.plot))
    text = None if args.file is None else read_text(args.file)
    if args.attention:
        others = {"recall": False, "generate": None, "plot": None, "chunks": None, "tail": None, "calibration": None}
        if any(getattr(args, name) != unset for name, unset in others.items()):
            args.usage_error(f"--attention goes with none of --{', --'.join(others)}")
        types = [cache for cache in args.cache if isinstance(cache, str) and cache in CACHE_TYPES]
        if len(types) < len(args.cache):
            args.usage_error("--attention takes types in --cache, no pairs and no policy files")
        if text is None:
            text = own_text(read_model_info(args.model), args.ctx or ATTENTION_TOKENS, 1)
        return call_attention(args, text, types)
    _check_measured(args)
    both: dict[str, Any] = {"tails": args.tail, "n_ctx": args.ctx, "n_threads": args.threads}
    both["calibration"] = args.calibration
    read = {**both, "n_chunks": args.chunks, "n_batch": args.batch}
    with contextlib.closing(Bar()) as bar:
        comparison = compare(args.model, args.cache, text, **read, progress=partial(bar, "reading"))
    for note in comparison.notes:
        print(f"tqgguf: note: {note}", file=sys.stderr)
    if not args.json:  # before the questions, which may take as long again
        print_comparison(comparison)
    continued = recalled = None
    if args.generate:
        with contextlib.closing(Bar()) as bar:
            options = {**read, "n_generate": args.generate, "progress": partial(bar, "continuing")}
            continued = continuation(args.model, args.cache, text, **options)
        if not args.json:
            print_continuation(continued)
    if args.recall:
        with contextlib.closing(Bar()) as bar:
            recalled = recall(args.model, args.cache, **both, progress=partial(bar, "asking"))
    if args.json:
        print(to_json({"comparison": comparison, "continuation": continued, "recall": recalled}))
    elif recalled:
        print_recall(recalled)
    if args.plot:  # last, so that the figures are printed even if the disk is full
        plot(comparison, Path(args.plot))
    return 0


def _check_measured(args: argparse.Namespace) -> None:
    """Refuses before anything is measured what cannot be; a wrong list of caches is a usage error."""
    from ...diagnostics.compare import compared_caches, context_length
    from ...diagnostics.continuation import check_generate

    info = read_model_info(args.model)
    try:
        compared_caches(args.cache, info.n_layer, args.tail)
    except TqggufError as error:
        args.usage_error(f"argument --cache: {error}")
    if args.generate is not None:
        check_generate(args.generate, context_length(info, args.ctx))


def call_attention(args: argparse.Namespace, text: str, types: Sequence[str] | None) -> int:
    """Measures attention and prints the errors.

    Args:
        args: the parsed command line.
        text: the text to run.
        types: cache types; None for all that fit.
    """
    from ...diagnostics.attention import attention_quality
    from ..render.compare import print_attention

    result = attention_quality(
        args.model,
        text,
        types=types,
        layers=args.layers,
        n_ctx=args.ctx or ATTENTION_TOKENS,
        centre=args.centre,
        rotate=not args.no_rotation,
        n_threads=args.threads,
    )
    show(result, args.json, print_attention)
    return 0
