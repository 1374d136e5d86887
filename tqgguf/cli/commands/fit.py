"""`tqgguf fit`: the longest context, and the best cache, for a memory."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING, Any

from ...cache.tail import DEFAULT_TAIL
from ...errors import CacheTypeError
from ..options import add_tail_option, cache_or_pair, memory_size, positive
from ..render.format import print_table, printable, size, to_json

if TYPE_CHECKING:
    from ...diagnostics.fit import Fit, FitRow


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "fit",
        help="the longest context that fits into a memory",
        description="Says before anything is loaded what weights, KV cache and compute buffers take, the longest "
        "context for each cache type, up to the one wanted (--ctx), and which to take: the first in order of "
        "precision with which the context wanted fits. llama.cpp itself plans the memory, without allocating it. "
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
        help="tokens wanted, over all sequences; no longer context is looked for (default: what the model was trained "
        "for, for each)",
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


def cache_list(text: str) -> tuple[str | tuple[str, str], ...]:
    """argparse type: caches with commas between: types, pairs such as pqo4/pqo3, policy files."""
    return tuple(cache_or_pair(part.strip()) for part in text.split(","))


def call(args: argparse.Namespace) -> int:
    """Runs the command."""
    from ...diagnostics.fit import FITTED_TYPES, fit

    result = fit(
        args.model,
        args.memory,
        vram=args.vram,
        n_ctx=args.ctx,
        n_seq=args.parallel,
        unified=args.unified,
        swa_full=not args.window_only,
        caches=args.cache or FITTED_TYPES,
        tail=args.tail,
    )
    if all(row.obstacle for row in result.rows):
        raise CacheTypeError(f"{result.info.path.name} can have none of these caches: {result.rows[0].obstacle}")
    if args.json:
        print(to_json(result))
    else:
        render(result)
    return 0 if result.recommended else 1


def render(result: Fit) -> None:
    """Prints the model's facts, a row for each cache, and what to take."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    info = result.info
    console = Console(highlight=False)
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    setup = result.setup
    sequences = f", for {setup.n_seq} sequences {'together' if setup.unified else 'apart'}" if setup.n_seq > 1 else ""
    advice = " (--ctx asks for more)" if result.n_ctx == info.n_ctx_train * setup.n_seq else ""
    memory = size(result.memory) + (f", and {size(result.vram)} of video memory" if result.vram else "")
    for name, value in (
        ("model", f"{info.name} ({info.architecture}), weights {size(result.weights)}"),
        ("memory", memory),
        ("context", f"{result.n_ctx:,} tokens wanted{sequences}; trained for {info.n_ctx_train:,}{advice}"),
        *(("note", note) for note in info.notes),
    ):
        facts.add_row(name, Text(printable(value)))
    print_table(facts, fold=True)
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    states = any(row.plan and row.plan.state for row in result.rows)
    titles = ["cache", "context", "KV cache", *(["states"] if states else []), "compute", "main memory"]
    titles += ["layers on GPU", "video memory"] if result.vram else []
    for title in titles:
        table.add_column(title, justify="left" if title == "cache" else "right", no_wrap=True)
    for row in result.rows:
        table.add_row(*_cells(result, row, states), style="bold" if row is result.recommended else "")
    print_table(table)
    for row in result.rows:
        if row.obstacle:
            console.print(Text(f"{row.cache}: {row.obstacle}"))
    for note in result.notes:
        console.print(Text(f"Note: {note}."))
    console.print()
    best = result.recommended
    if best is None:
        console.print(Text(f"Nothing to recommend: {result.reason}. Give more memory, or take a smaller model."))
        return
    console.print(Text(f"Recommended: {best.cache}, {best.n_ctx:,} tokens: {result.reason}."))
    if setup.n_seq == 1 and setup.swa_full and not result.vram:  # as chat has it
        k, _, v = best.cache.partition("/")
        types = ["--cache-k", k, "--cache-v", v] if v and not best.cache.endswith(".gguf") else ["--cache", best.cache]
        tail = [] if setup.tail == DEFAULT_TAIL else ["--tail", str(setup.tail)]
        command = ["tqgguf", "chat", str(info.path), *types, *tail, "--ctx", str(best.n_ctx)]
        console.print(Text("  " + shlex.join(command)), soft_wrap=True)


def _cells(result: Fit, row: FitRow, states: bool) -> list[str]:
    if row.plan is None:
        return [row.cache, "cannot be used"]
    if not row.n_ctx:
        return [row.cache, "does not fit", size(row.plan.cache)]
    cells = [row.cache, f"{row.n_ctx:,}", size(row.plan.cache)]
    cells += [size(row.plan.state)] if states else []
    cells += [size(row.plan.compute), size(row.memory)]
    return cells + ([str(row.n_gpu_layers), size(row.vram)] if result.vram else [])
