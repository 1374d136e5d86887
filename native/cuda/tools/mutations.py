"""Takes one barrier, wait, exchange or index of the CUDA kernels away after the other, and runs tests that must notice.

Each time in a copy of native and tests in build/mutated, whose emulated library is built anew. A change that no test
notices is told, and makes this fail. Nothing of the checkout is changed. A minute each, on one core.

Usage: python native/cuda/tools/mutations.py [--only WORD ...]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
COPY = ROOT / "build" / "mutated"


@dataclass(frozen=True)
class Mutation:
    """One change: in a file of native/cuda, the text `old`, which is there once, becomes `new`.

    Attributes:
        tests: what pytest -k selects of tests/native/test_cuda_attention.py, or of `suite`.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    suite: str = "test_cuda_attention.py"


LARGE = "test_large_heads and not kernel"
PQT3 = "pairs_of_types and pqt3"
MUTATIONS = [
    Mutation("team barrier", "attention_warp.cuh", "    tqi_sync_warps<S::TEAM>();\n", "", LARGE),
    Mutation(
        "team barrier, twice the warps",
        "attention_warp.cuh",
        "tqi_sync_warps<S::TEAM>",
        "tqi_sync_warps<2 * S::TEAM>",
        LARGE,
    ),
    Mutation(
        "turns of a team's scores",
        "attention_warp.cuh",
        "    *turn ^= TQI_WARPS * S::NT * TQI_FRAGMENTS_BYTES;\n",
        "",
        LARGE,
    ),
    Mutation(
        "order of a team's sum",
        "attention_warp.cuh",
        "scores[((first + part) * S::NT + i) * 32]",
        "scores[((warp + part) % TQI_WARPS * S::NT + i) * 32]",
        LARGE,
    ),
    Mutation(
        "part of q", "attention_warp.cuh", "(S::TEAM > 1 ? warp % S::TEAM : 0)) * S::BLOCKS", "0) * S::BLOCKS", LARGE
    ),
    Mutation("part of K and V", "attention_warp.cuh", "task.part = S::TEAM > 1 ? warp % S::TEAM : 0;", "", LARGE),
    Mutation(
        "part of a row, where it begins",
        "tiles.cuh",
        "task.kv_head * x.stride_head + task.part * x.part_bytes -",
        "task.kv_head * x.stride_head -",
        LARGE,
    ),
    Mutation(
        "lead of a part",
        "tiles.cuh",
        "(int) (task.kv_head * x.stride_head + task.part * x.part_bytes) & 15",
        "(int) (task.kv_head * x.stride_head) & 15",
        LARGE,
    ),
    Mutation(
        "a team's first key", "attention_warp.cuh", "TQI_WARP_TILE * (warp / S::TEAM)", "TQI_WARP_TILE * warp", LARGE
    ),
    Mutation("one sum for a team", "attention_warp.cuh", "task.part == 0 ? r->sum[i][c] : 0.0f", "r->sum[i][c]", LARGE),
    Mutation(
        "factors of a team",
        "attention_warp.cuh",
        "factor[j % 2].of[i * S::TEAM + part]",
        "factor[j % 2].of[i]",
        LARGE,
    ),
    Mutation(
        "barrier before results",
        "attention_warp.cuh",
        "            tqi_sync();\n            TQI_UNROLL\n            for (int n = 0;",
        "            TQI_UNROLL\n            for (int n = 0;",
        LARGE,
    ),
    Mutation(
        "barrier after results",
        "attention_warp.cuh",
        "            tqi_sync();\n            if (j == 0) {",
        "            if (j == 0) {",
        LARGE,
    ),
    Mutation("lanes of a round", "attention_warp.cuh", "lane / n_lanes == j % n_rounds", "lane / n_lanes == 0", LARGE),
    Mutation("copies of later rows", "attention_warp.cuh", "FIRST / rows_on * x.step", "0 * x.step", LARGE),
    Mutation("copies of the last rows", "attention_warp.cuh", "row < TQI_WARP_TILE - FIRST", "row < 8 - FIRST", LARGE),
    Mutation("the second pair of slices", "products.cuh", "part / 2 + i)", "part / 2)", LARGE),
    Mutation("where results of it are", "products.cuh", "o[i][4 * first + j]", "o[i][j]", LARGE),
    Mutation(
        "bound of q8_0's scales",
        "slices.cuh",
        "? 0x5ffc5ffcu : 0x7bff7bffu",
        "? 0x7bff7bffu : 0x7bff7bffu",
        "hidden_tokens_may_hold",
    ),
    Mutation(
        "hidden values in f16",
        "attention_warp.cuh",
        "keys.plain ? 0xffff : tqi_keys_with_weight<NT>(x, n_vec)",
        "0xffff",
        "test_stock_types_beside_ours or hidden_tokens_may_hold",
    ),
    Mutation(
        "which values in f16",
        "attention_warp.cuh",
        "tqi_halves_of(some, 2 * t + 8)",
        "tqi_halves_of(some, 2 * t)",
        "test_stock_types_beside_ours",
    ),
    Mutation("words of pqt3", "slices.cuh", "turn(words[2], 2 * part - 6)", "turn(words[2], 2 * part - 4)", PQT3),
    Mutation("subsets of odd values", "slices.cuh", "low >> 1, high)", "low, high)", PQT3),
    Mutation("sign of q8_0", "slices.cuh", "^ 0x80808080u", "", "test_stock_types_beside_ours"),
    Mutation(
        "order of q8_0", "slices.cuh", "4 * (i / 16) + i % 4 : i % 8", "i % 8 : i % 8", "test_stock_types_beside_ours"
    ),
    Mutation("who reads the tail", "attention.cuh", "r.row < tqi_owned_until", "0 < tqi_owned_until", "of_a_batch"),
    Mutation("a batch's kernel", "attention_plan.cpp", "pair && made && a.n_own == 0", "pair && made", "of_a_batch"),
    Mutation("which own token", "attention.cuh", "own[order[middle]] <= t", "own[order[middle]] < t", "of_a_batch"),
    Mutation("until when rows are read", "tail.cuh", "&& row < w.until[lane + 32 * j]", "", "of_a_batch"),
    Mutation(
        "cells written anew",
        "tail.cuh",
        "mine = mine && (row >= n_row || tqi_own_token(p, owners, token) < 0);",
        "",
        "own_copy",
        "test_cuda_ggml.py",
    ),
    Mutation("who takes a row", "rows.cuh", "until = i > own &&", "until =", "own_copy", "test_cuda_ggml.py"),
    Mutation(
        "order of own tokens",
        "rows.cuh",
        "owners[2 * n + rank]",
        "owners[2 * n + own]",
        "own_copy",
        "test_cuda_ggml.py",
    ),
]


def prepare() -> None:
    """The copy, as the checkout is."""
    for name in ("native", "tests"):
        shutil.rmtree(COPY / name, ignore_errors=True)
        shutil.copytree(ROOT / name, COPY / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", COPY)
    (COPY / "build").mkdir(exist_ok=True)
    upstream = COPY / "build" / "upstream"
    if not upstream.is_symlink():
        upstream.symlink_to((ROOT / "build" / "upstream").resolve())


def run(suite: str, tests: str) -> bool:
    """Whether the tests pass."""
    pytest = [str(Path(sys.executable).with_name("pytest")), "-q", "-x", "-p", "no:cacheprovider"]
    command = [*pytest, f"tests/native/{suite}", "-k", tests]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run(command, cwd=COPY, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    if done.returncode not in (0, 1) and "emulated kernel" not in done.stderr + done.stdout and done.returncode > 0:
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout}{done.stderr}")
    if "error:" in done.stdout:
        raise RuntimeError(f"the changed kernels do not compile: {done.stdout}")
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description="change the CUDA kernels, and see whether tests notice")
    parser.add_argument("--only", nargs="+", default=[""], help="changes whose name has one of these words")
    args = parser.parse_args()
    COPY.mkdir(parents=True, exist_ok=True)
    prepare()
    missed = []
    for mutation in MUTATIONS:
        if not any(word in mutation.name for word in args.only):
            continue
        path = COPY / "native" / "cuda" / mutation.file
        original = path.read_text()
        if original.count(mutation.old) != 1:
            raise ValueError(f"{mutation.name}: {mutation.file} has the text {original.count(mutation.old)} times")
        path.write_text(original.replace(mutation.old, mutation.new))
        start = time.monotonic()
        passed = run(mutation.suite, mutation.tests)
        path.write_text(original)
        print(f"{'MISSED' if passed else 'noticed'} {mutation.name} ({time.monotonic() - start:.0f} s)", flush=True)
        if passed:
            missed.append(mutation.name)
    if missed:
        print(f"no test notices: {', '.join(missed)}", file=sys.stderr)
    return bool(missed)


if __name__ == "__main__":
    raise SystemExit(main())
