"""What `tqgguf inspect` prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from ...diagnostics.cache_contents import CacheContents, TensorContents
from ...diagnostics.model_cache import ModelCache
from .format import size
from .table import new_table, print_facts, print_table, print_text

LAYER_FIGURES: Final = ("layer", "", "type", "norm", "scale", "entropy", "outliers", "offset", "3 bits", "4 bits")
"""Titles of the cells of `layer_figures`."""


def layer_figures(tensor: TensorContents) -> list[str]:
    """K or V of one layer: means over its heads, the sum of outlier channels, the largest offset."""
    heads = tensor.heads
    scales = [head.scale for head in heads if head.scale is not None]
    entropies = [head.entropy for head in heads if head.entropy is not None]
    return [
        str(tensor.layer),
        tensor.side,
        tensor.type,
        f"{mean([head.norm for head in heads]):.3g}",
        f"{mean(scales):.3g}" if scales else "",
        f"{mean(entropies):.2f}" if entropies else "",
        str(sum(len(head.outliers) for head in heads)),
        f"{max(head.offset for head in heads):.2f}",
        f"{mean([head.nmse_3 for head in heads]):.4f}",
        f"{mean([head.nmse_4 for head in heads]):.4f}",
    ]


def mean(values: Sequence[float]) -> float:
    """The mean of values; 0 of none."""
    return sum(values) / len(values) if values else 0.0


def print_contents(result: CacheContents) -> None:
    """Prints a line for K and for V of each layer."""
    print_text(
        f"{result.info.name} ({result.info.architecture}): {result.n_cells:,} cells with tokens, "
        f"{size(result.bytes)}; {result.n_sampled:,} looked at"
    )
    for note in result.notes:
        print_text(note)
    print()
    table = new_table(*LAYER_FIGURES, "gain")
    for tensor in result.tensors:
        table.add_row(*layer_figures(tensor), f"{mean([head.bit_gain for head in tensor.heads]):.1f}")
    print_table(table)
    print()
    print_text(
        "Means over a layer's heads; of outlier channels the sum, of offsets the largest. Entropy in bits per index. "
        "Errors are squared and relative to the squared values. They are estimated, because a compressed value is "
        "known only as decoded. Gain: the error at 3 bits divided by that at 4 bits."
    )
    _print_calibration(result)


def _print_calibration(result: CacheContents) -> None:
    """Prints a line for each KV head whose keys are stored less a mean or times a gain."""
    heads = [(tensor.layer, head) for tensor in result.side("K") for head in tensor.heads]
    heads = [(layer, head) for layer, head in heads if head.mean or head.gain != (1.0, 1.0)]
    if not heads:
        return
    print()
    table = new_table("layer", "KV head", "mean m", "gain D")
    for layer, head in heads:
        low, high = head.gain
        table.add_row(str(layer), str(head.head), f"{head.mean:.2f}", f"{low:.2g} to {high:.2g}")
    print_table(table)
    print()
    print_text(
        "Keys k are stored as D (k - m), queries q read as q / D. Mean: the norm of m relative to the keys' RMS norm. "
        "Gain: of the channel with the smallest D, and with the largest."
    )


def print_model_cache(result: ModelCache) -> None:
    """Prints the model's facts, then the table."""
    info = result.info
    facts = (
        ("model", f"{info.name} ({info.architecture}, {size(info.file_bytes)})"),
        ("trained context", f"{info.n_ctx_train:,} tokens"),
        ("layers", f"{info.n_layer}, of which {len(info.layers)} have a KV cache"),
        ("heads", f"{info.n_head} for Q; KV: {_each(layer.n_head_kv for layer in info.layers)}"),
        ("head size", f"K {_each(r.head_dim_k for r in info.layers)}, V {_each(r.head_dim_v for r in info.layers)}"),
        *(("note", note) for note in info.notes),
    )
    print_facts(facts)
    print()
    table = new_table("cache", "bits/value", "bytes/token", *(f"{n:,} tokens" for n in result.contexts))
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
        print_text(reason)


def _each(values: Iterable[int]) -> str:
    """The distinct values."""
    distinct = sorted(set(values))
    return ", ".join(map(str, distinct)) if distinct else "none"
