"""What `tqgguf tune` prints."""

from __future__ import annotations

from pathlib import Path

from ...config import CACHE_TYPES
from ...diagnostics.tune import Tuning
from .compare import print_qualities
from .table import new_table, print_table


def print_tuning(tuning: Tuning, output: Path) -> None:
    """Prints the types and the cost of the smallest type in every layer, then the policy beside single types."""
    n = tuning.n_tuning
    held_out = "tuning did not read" if tuning.max_kld is None else "told tuning where to stop, and nothing else"
    print(
        f"{tuning.model}: chunks of {tuning.n_ctx:,} tokens; tuned on {_chunks(1, n)}, "
        f"measured on {_chunks(n + 1, n + tuning.n_held_out)}, which {held_out}"
        + (f"; {_tailed(tuning)} caches with a tail of {tuning.tail} tokens in f16\n" if tuning.tail else "\n")
    )
    policy, smallest = tuning.policy, tuning.types[0]
    table = new_table("layer", "K", f"KLD at {smallest}", "centred", "V", f"KLD at {smallest}")
    cost = {(s.layer, s.side): s.kld for s in tuning.sensitivities if s.type == smallest}
    for layer in sorted({layer for layer, _ in cost}):
        table.add_row(
            str(layer),
            policy.types_k[layer],
            f"{cost[layer, 'K']:#.3g}",
            "yes" if layer in policy.k_means else "",
            policy.types_v[layer],
            f"{cost[layer, 'V']:#.3g}",
        )
    print_table(table)
    print(
        f"\npolicy on the tuning part: mean KLD {tuning.measured:#.3g} measured, "
        f"{tuning.predicted:#.3g} as the sum over layers and sides; on the part held out:\n"
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
    print(f"\nwritten to {output}: {bits:.4g} bits per value, {policy_row.bytes_per_token:,} bytes per token{tail}")


def _tailed(tuning: Tuning) -> str:
    """Which caches were measured with a tail."""
    stock = any(row.tail and row.type in CACHE_TYPES and not CACHE_TYPES[row.type].ours for row in tuning.rows)
    return "quantized" if stock else "pqo and pqt"


def _chunks(first: int, last: int) -> str:
    return f"chunk {first}" if first == last else f"chunks {first} to {last}"
