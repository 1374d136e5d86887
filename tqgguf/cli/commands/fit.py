"""`tqgguf fit`: the longest context, and the best cache, for a memory."""

from __future__ import annotations

import argparse
from typing import Any

from ...config import FIT_CACHES
from ...errors import CacheTypeError
from ..options import add_tail_option, cache_list, memory_size, positive
from ..render.format import show


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "fit",
        help="the longest context that fits into a memory",
        description="Computes the sizes of weights, KV cache and compute buffers before anything is loaded, and for "
        "each cache type the longest context that fits, up to the one wanted (--ctx). It recommends the most precise "
        "type with which the context wanted fits. llama.cpp itself plans the memory, without allocating it. "
        "Exit status 1 if nothing fits.",
        epilog="example: tqgguf fit model.gguf --memory 8G --ctx 32768",
    )
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument(
        "--memory", type=memory_size, required=True, metavar="SIZE", help="main memory to use: 8G or 8GiB, 512M, 8GB"
    )
    parser.add_argument(
        "--vram", type=memory_size, default=0, metavar="SIZE", help="video memory to use as well (an estimate)"
    )
    parser.add_argument(
        "--ctx",
        type=positive,
        metavar="N",
        help="tokens wanted, over all sequences; no longer context is tried (default: the trained context for each "
        "sequence)",
    )
    parser.add_argument("--parallel", type=positive, default=1, metavar="N", help="sequences at once (default: 1)")
    parser.add_argument(
        "--unified", action="store_true", help="sequences share one cache (llama.cpp's kv_unified), not a part for each"
    )
    parser.add_argument(
        "--window-only",
        action="store_true",
        help="layers with a sliding window keep no more than that (Llama(swa_full=False), llama-server's default)",
    )
    parser.add_argument(
        "--cache",
        type=cache_list,
        metavar="CACHE,CACHE",
        help="types, pairs K/V and policy files, the preferred first (default: by precision)",
    )
    add_tail_option(parser)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> int:
    """Runs the command."""
    from ...diagnostics.fit import fit
    from ..render.fit import print_fit

    result = fit(
        args.model,
        args.memory,
        vram=args.vram,
        n_ctx=args.ctx,
        n_seq=args.parallel,
        unified=args.unified,
        swa_full=not args.window_only,
        caches=args.cache or FIT_CACHES,
        tail=args.tail,
    )
    if all(row.obstacle for row in result.rows):
        raise CacheTypeError(f"{result.info.path.name} can have none of these caches: {result.rows[0].obstacle}")
    show(result, args.json, print_fit)
    return 0 if result.recommended else 1
