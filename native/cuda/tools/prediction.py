"""Predicts attention's time on a GPU by counting: bytes from memory, and instructions by unit (instructions.py).

The slowest of memory, issue, integer unit and shared memory bounds a kernel; it is expected to reach 60 to 70 % of what
bounds it among the units, and memory's time at the least, at the bandwidth that a copy reaches. f16 is taken at its
best: its bytes at the bandwidth of the datasheet. Says which kernels keep a bar: so many times as fast as that at 60 %.
Needs nvcc and cuobjdump; nothing is run.

Usage: python native/cuda/tools/prediction.py [--tokens 32768] [--kv-heads 4] [--heads 256] [--types pqo3 q8_0/pqt3]
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass

import instructions
import resources

BLOCK_BYTES = {"f16": 64, "q8_0": 34, "pqo3": 14, "pqo4": 18, "pqt2": 10, "pqt3": 14, "pqt4": 18, "pqt5": 22}
"""Bytes of 32 values."""

WARPS = 8
"""Of a block of threads."""


@dataclass(frozen=True)
class Device:
    """An H200: multiprocessors, clock, and bandwidth of its datasheet and of a copy."""

    n_sm: int = 132
    clock: float = 1.755e9
    peak: float = 4.8e12
    copy: float = 4.3e12


@dataclass(frozen=True)
class Prediction:
    """Seconds of one layer's attention, query vectors of one tile, batch 1."""

    n_bytes: int
    memory: float
    issue: float
    integer: float
    shared: float
    f16: float

    @property
    def expected(self) -> tuple[float, float]:
        """At 70 and at 60 % of what bounds it."""
        units = max(self.issue, self.integer, self.shared)
        return max(self.memory, units / 0.7), max(self.memory, units / 0.6)

    @property
    def times_as_fast(self) -> float:
        return self.f16 / self.expected[1]


def predict(
    count: instructions.Count, n_tokens: int, n_kv_heads: int, blocks_per_sm: int, device: Device
) -> Prediction:
    """n_tokens: keys, each with n_kv_heads heads."""
    k_type, _, v_type = count.types.partition("/")
    n_bytes = n_tokens * n_kv_heads * count.head // 32 * (BLOCK_BYTES[k_type] + BLOCK_BYTES[v_type or k_type])
    f16_bytes = n_tokens * n_kv_heads * count.head * 4
    # attention_plan.cpp: whole tiles of all warps, as many ranges as blocks of threads run at once
    steps = math.ceil(n_tokens / (16 * WARPS // count.team))
    ranges = max(1, min(steps, device.n_sm * blocks_per_sm // n_kv_heads))
    ranges = math.ceil(steps / math.ceil(steps / ranges))
    tiles, warps = math.ceil(n_tokens / 16) * n_kv_heads * count.team, ranges * n_kv_heads * WARPS
    cycles = device.n_sm * device.clock
    executed = tiles * len(count.tile) + warps * count.around
    return Prediction(
        n_bytes,
        n_bytes / device.copy,
        executed / 4 / cycles,
        tiles * count.units["integer"] / 2 / cycles,
        tiles * count.shared_cycles / cycles,
        f16_bytes / device.peak,
    )


def main() -> int:
    device = Device()
    parser = argparse.ArgumentParser(description="predict attention's time on an H200 by counting")
    parser.add_argument("--arch", default="sm_90", help="architecture (default: sm_90)")
    parser.add_argument("--source", nargs="+", default=list(resources.WARP_SOURCES), help="files (default: all)")
    parser.add_argument("--tokens", type=int, default=32768, help="keys (default: 32768)")
    parser.add_argument("--kv-heads", type=int, default=4, help="KV heads (default: 4)")
    parser.add_argument("--heads", type=int, nargs="+", default=[256], help="head sizes (default: 256)")
    parser.add_argument("--types", nargs="+", help="types, q8_0/pqt3 for instance (default: all)")
    parser.add_argument("--blocks-per-sm", type=int, default=2, help="blocks of threads that fit (default: 2)")
    parser.add_argument("--bar", type=float, default=1.5, help="times as fast as f16's bytes (default: 1.5)")
    args = parser.parse_args()
    print(f"{args.tokens} tokens, {args.kv_heads} KV heads, up to 8 query heads each; {args.arch}, {device.n_sm}")
    print(f"multiprocessors at {device.clock / 1e9} GHz, {device.peak / 1e12} TB/s, {device.copy / 1e12} by a copy")
    heads = ["types", "head", "vectors", "a key", "MB", "memory", "issue", "integer", "shared", "expected, us"]
    heads += ["f16's bytes", "times as fast", "bar"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for count in (each for source in args.source for each in instructions.counts(args.arch, source)):
        if count.head not in args.heads or (args.types and count.types not in args.types):
            continue
        p = predict(count, args.tokens, args.kv_heads, args.blocks_per_sm, device)
        us = [f"{1e6 * x:.1f}" for x in (p.memory, p.issue, p.integer, p.shared)]
        cells = [count.types, count.head, count.vectors, f"{count.per_key:.1f}", f"{p.n_bytes / 1e6:.1f}", *us]
        cells += [f"{1e6 * p.expected[0]:.1f} to {1e6 * p.expected[1]:.1f}", f"{1e6 * p.f16:.1f}"]
        cells += [f"{p.times_as_fast:.2f}", "kept" if p.times_as_fast >= args.bar else "missed"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
