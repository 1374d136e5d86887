"""What `tqgguf fit` prints."""

from __future__ import annotations

import shlex

from ...config import CACHE_TYPES, PRESETS
from ...diagnostics.fit import Fit, FitRow
from .format import size
from .table import new_table, print_facts, print_table, print_text


def print_fit(result: Fit) -> None:
    """Prints the model's facts, a row for each cache, and what to take."""
    info = result.info
    setup = result.setup
    sequences = f", for {setup.n_seq} sequences {'together' if setup.unified else 'apart'}" if setup.n_seq > 1 else ""
    advice = " (--ctx asks for more)" if result.n_ctx == info.n_ctx_train * setup.n_seq else ""
    memory = size(result.memory) + (f", and {size(result.vram)} of video memory" if result.vram else "")
    print_facts(
        (
            ("model", f"{info.name} ({info.architecture}), weights {size(result.weights)}"),
            ("memory", memory),
            ("context", f"{result.n_ctx:,} tokens wanted{sequences}; trained for {info.n_ctx_train:,}{advice}"),
            *(("note", note) for note in info.notes),
        )
    )
    print()
    states = any(row.plan and row.plan.state for row in result.rows)
    titles = ["cache", "KLD", "context", "KV cache", *(["states"] if states else []), "compute", "main memory"]
    titles += ["layers on GPU", "video memory"] if result.vram else []
    table = new_table(*titles)
    for row in result.rows:
        table.add_row(*_cells(result, row, states), style="bold" if row is result.recommended else "")
    print_table(table)
    for row in result.rows:
        if row.obstacle:
            print_text(f"{row.cache}: {row.obstacle}")
    for note in result.notes:
        print_text(f"Note: {note}.")
    on = result.measured
    print_text(
        f"KLD: the median divergence of predictions from f16's, in nats, of {' and '.join(on.models)} on {on.text} of "
        f"{on.n_ctx:,} tokens. `tqgguf compare` measures it on this model. Low bits cost look-ups and reasoning first."
    )
    print()
    best = result.recommended
    if best is None:
        print_text(f"Nothing to recommend: {result.reason}. Give more memory, or take a smaller model.")
        return
    print_text(f"Recommended: {best.cache}, {best.n_ctx:,} tokens: {result.reason}.")
    if setup.n_seq == 1 and setup.swa_full and not result.vram:  # the settings of `tqgguf chat`
        k, _, v = best.cache.partition("/")
        types = ["--cache-k", k, "--cache-v", v] if v and not best.cache.endswith(".gguf") else ["--cache", best.cache]
        if preset := next((name for name, pair in PRESETS.items() if pair == (k, v)), None):
            types = ["--cache", preset]
        unlike_f16 = any(kind not in CACHE_TYPES or CACHE_TYPES[kind].quantized for kind in best.cache.split("/"))
        tail = [] if setup.tail is None or not unlike_f16 else ["--tail", str(setup.tail)]
        command = ["tqgguf", "chat", str(info.path), *types, *tail, "--ctx", str(best.n_ctx)]
        print_text("  " + shlex.join(command), wrap=False)


def _cells(result: Fit, row: FitRow, states: bool) -> list[str]:
    name = [row.cache, "" if row.kld is None else ", ".join(f"{value:.4f}" if value else "0" for value in row.kld)]
    if row.plan is None:
        return [*name, "cannot be used"]
    if not row.n_ctx:
        return [*name, "does not fit", size(row.plan.cache)]
    cells = [*name, f"{row.n_ctx:,}", size(row.plan.cache)]
    cells += [size(row.plan.state)] if states else []
    cells += [size(row.plan.compute), size(row.memory)]
    return cells + ([str(row.n_gpu_layers), size(row.vram)] if result.vram else [])
