"""Speed on the CPU: single steps of libtqgguf, and llama.cpp with and without a compressed cache.

    python benchmarks/speed/cpu.py micro                   ns per block and GB/s of encode, decode, dot, attention
    python benchmarks/speed/cpu.py llama --bin build/bin   tokens per second, by llama-bench

`make tools` builds the patched llama-bench, `make stock-tools` a stock one for --stock build/stock/cmake/bin.

`llama` runs the patched llama-bench and, for the stock types, the stock one of `--stock DIR` in turn, round by round,
so that a drift of the machine hits all of them alike; it prints medians, and ratios of each round to f16 in that
round. Figures and machine facts go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "common"))

import machine
import numpy as np
import random_model
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tqgguf._native import library
from tqgguf.config import CACHE_TYPES

RESULTS = Path(__file__).parents[1] / "results"
OURS = {name: kind for name, kind in CACHE_TYPES.items() if kind.ours}
console = Console(stderr=True)


# ---- Steps ----


@dataclass(frozen=True)
class Step:
    """One step of one kernel, as the median over runs.

    Attributes:
        ns_per_block: nanoseconds per block of 32 values (attention: per K or V block, all query heads of its group).
        gb_per_s: encoded bytes read (encode: written) per second, in 10^9.
    """

    kernel: str
    type: str
    step: str
    ns_per_block: float
    gb_per_s: float


def _median_seconds(call: Callable[[], object], runs: int) -> float:
    call()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


class Micro:
    """Calls libtqgguf as its C users do, on arrays that outlive the call."""

    def __init__(self, runs: int) -> None:
        self.runs = runs
        self.native = library()
        self.ffi, self.lib = self.native.ffi, self.native.lib
        self.random = np.random.default_rng(0)

    def pointer(self, x: np.ndarray, kind: str = "void *") -> Any:
        return self.ffi.cast(kind, x.ctypes.data)

    def encoded(self, type_number: int, n: int) -> np.ndarray:
        x = self.random.standard_normal(n, dtype=np.float32)
        blocks = np.zeros(self.lib.tq_row_bytes(type_number, n), dtype=np.uint8)
        self.native.check(self.lib.tq_encode(type_number, 0, self.pointer(x, "float *"), n, self.pointer(blocks)))
        return blocks

    def blocks(self, number: int) -> Iterable[tuple[str, float]]:
        """Seconds per block of encode (each mode), decode and dot, over 4,096 blocks (L2-resident)."""
        n = 4096 * 32
        x = self.random.standard_normal(n, dtype=np.float32)
        px, blocks = self.pointer(x, "float *"), self.encoded(number, n)
        pb = self.pointer(blocks)
        for mode, mode_name in enumerate(("search", "maxnorm", "l2norm")):
            if self.lib.tq_codebook(number, mode, self.ffi.NULL, self.ffi.NULL) < 0:
                continue
            yield (
                f"encode {mode_name}",
                _median_seconds(lambda mode=mode: self.lib.tq_encode(number, mode, px, n, pb), self.runs) / 4096,
            )
        blocks = self.encoded(number, n)
        pb = self.pointer(blocks)
        yield "decode", _median_seconds(lambda: self.lib.tq_decode(number, 0, pb, n, px), self.runs) / 4096
        yield "dot", _median_seconds(lambda: self.lib.tq_dot(number, 0, pb, px, n), self.runs) / 4096

    def attention(self, number: int, head_dim: int, group: int, n_q: int, n_kv: int) -> float:
        """Seconds per K or V block of one layer of 8 KV heads, one thread."""
        n_head_kv, ffi = 8, self.ffi
        n_head = n_head_kv * group
        k, v = (self.encoded(number, n_kv * n_head_kv * head_dim) for _ in range(2))
        q = self.random.standard_normal((n_q, n_head, head_dim), dtype=np.float32)
        out = np.zeros_like(q)
        args = ffi.new("tq_attn *")
        row = self.lib.tq_row_bytes(number, head_dim)
        for operand, data, kind, heads, size in (
            (args.q, q, 0, n_head, 4 * head_dim),
            (args.k, k, number, n_head_kv, row),
            (args.v, v, number, n_head_kv, row),
        ):
            operand.data, operand.type, operand.head_dim = self.pointer(data), kind, head_dim
            operand.n_head, operand.n_stream = heads, 1
            operand.stride_token, operand.stride_head = heads * size, size
        args.n_q, args.n_kv, args.scale = n_q, n_kv, head_dim**-0.5
        args.out = self.pointer(out, "float *")
        args.out_stride_row, args.out_stride_head = 4 * n_head * head_dim, 4 * head_dim
        work = np.zeros(self.lib.tq_attn_work_bytes(args, 1), dtype=np.uint8)

        def run() -> None:
            for phase in (0, 1):
                self.native.check(self.lib.tq_attn_compute(args, phase, 0, 1, self.pointer(work)))

        runs = self.runs if n_q == 1 else max(3, self.runs // 5)
        return _median_seconds(run, runs) / (2 * n_kv * n_head_kv * head_dim / 32)

    def steps(self) -> Iterable[Step]:
        kernels = [name for name, usable in self.native.kernels().items() if usable]
        shapes = [(128, group, 1, 4096) for group in (1, 2, 4, 8)]
        shapes += [(64, 2, 1, 4096), (256, 2, 1, 4096), (128, 2, 1, 16384), (128, 2, 512, 4096)]
        for kernel in kernels:
            self.native.force_kernel(kernel)
            for name, kind in OURS.items():
                timings = list(self.blocks(kind.number))
                for dim, group, n_q, n_kv in shapes:
                    if kernel != "portable" or n_q == 1:
                        label = f"attention d{dim} gqa{group} {n_q}x{n_kv}"
                        timings.append((label, self.attention(kind.number, dim, group, n_q, n_kv)))
                for step, seconds in timings:
                    yield Step(kernel, name, step, round(seconds * 1e9, 2), round(kind.bytes / seconds / 1e9, 3))
        self.native.force_kernel("auto")


def micro(runs: int) -> list[Step]:
    """Times every step of every kernel this machine can run."""
    return list(Micro(runs).steps())


def micro_table(steps: list[Step]) -> Table:
    kernels = list(dict.fromkeys(s.kernel for s in steps))
    table = Table(title="libtqgguf, one thread: ns per block of 32 values (GB/s of encoded bytes)")
    for column in ("type", "step", *kernels):
        table.add_column(column, justify="left" if column in ("type", "step") else "right")
    found = {(s.type, s.step, s.kernel): s for s in steps}
    for kind, step in dict.fromkeys((s.type, s.step) for s in steps):
        cells = [found.get((kind, step, kernel)) for kernel in kernels]
        table.add_row(kind, step, *(f"{s.ns_per_block:.1f} ({s.gb_per_s:.2f})" if s else "" for s in cells))
    return table


# ---- llama.cpp ----


@dataclass(frozen=True)
class Test:
    """One llama-bench test.

    Attributes:
        kind: "tg" (tokens generated one by one) or "pp" (a prompt at once).
        n: tokens.
        depth: tokens in the cache before.
    """

    kind: str
    n: int
    depth: int

    @property
    def name(self) -> str:
        return f"{self.kind}{self.n} @ {self.depth}"


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one cache type in one test.

    Attributes:
        rounds: one figure per round, the median of its repeats.
        ratio: median over the rounds of this type's figure over f16's in the same round.
    """

    shape: str
    threads: int
    test: str
    cache: str
    build: str
    tokens_per_s: float
    ratio: float
    rounds: tuple[float, ...]


def _llama_bench(
    binary: Path, model: Path, cache: str, threads: int, tests: list[Test], repeats: int
) -> dict[Test, float]:
    """Runs llama-bench once for each kind of test; a figure is the median of its repeats."""
    found: dict[Test, float] = {}
    for kind in ("tg", "pp"):
        mine = [t for t in tests if t.kind == kind]
        if not mine:
            continue
        command = [str(binary), "-m", str(model), "-t", str(threads), "-fa", "1", "-ctk", cache, "-ctv", cache]
        command += ["-r", str(repeats), "-o", "json", "-d", ",".join(str(t.depth) for t in mine)]
        command += ["-p", "0", "-n", str(mine[0].n)] if kind == "tg" else ["-n", "0", "-p", str(mine[0].n)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0:
            raise SystemExit(f"{binary} failed: {run.stderr.strip().splitlines()[-1:]}")
        for row in json.loads(run.stdout):
            found[Test(kind, row["n_gen"] or row["n_prompt"], row["n_depth"])] = statistics.median(row["samples_ts"])
    return found


def llama(
    patched: Path,
    stock: Path | None,
    shape: random_model.Shape,
    caches: list[str],
    threads: int,
    tests: list[Test],
    rounds: int,
    repeats: int,
    both: bool,
) -> list[Speed]:
    """Runs every cache type in every test, round by round. Stock types run in the stock build, or in `both`."""
    stock_types = [cache for cache in caches if cache not in OURS] if stock is not None else []
    runs = [(cache, "patched", patched) for cache in caches if both or cache not in stock_types]
    runs += [(cache, "stock", stock) for cache in stock_types if stock is not None]
    base = ("f16", "stock" if stock is not None else "patched")
    figures: dict[tuple[str, str], dict[Test, list[float]]] = {(cache, build): {} for cache, build, _ in runs}
    with tempfile.TemporaryDirectory() as folder, Progress(console=console) as progress:
        model = Path(folder) / f"{shape.name}.gguf"
        random_model.write(model, shape)
        task = progress.add_task(f"{shape.name}, {threads} threads", total=rounds * len(runs))
        for _ in range(rounds):
            for cache, build, folder_of in runs:
                for test, value in _llama_bench(
                    folder_of / "llama-bench", model, cache, threads, tests, repeats
                ).items():
                    figures[cache, build].setdefault(test, []).append(value)
                progress.advance(task)
    return [
        Speed(
            shape=shape.name,
            threads=threads,
            test=test.name,
            cache=cache,
            build=build,
            tokens_per_s=round(statistics.median(values), 2),
            ratio=round(statistics.median(v / f for v, f in zip(values, figures[base][test], strict=True)), 3),
            rounds=tuple(round(v, 2) for v in values),
        )
        for (cache, build), by_test in figures.items()
        for test, values in by_test.items()
    ]


def llama_table(speeds: list[Speed]) -> Table:
    tests = list(dict.fromkeys(s.test for s in speeds))
    table = Table(title=f"llama-bench, {speeds[0].shape}, {speeds[0].threads} thread(s): tokens/s (ratio to f16)")
    for column in ("cache", "build", *tests):
        table.add_column(column, justify="right" if column in tests else "left")
    found = {(s.cache, s.build, s.test): s for s in speeds}
    for cache, build in dict.fromkeys((s.cache, s.build) for s in speeds):
        cells = [found[cache, build, test] for test in tests]
        table.add_row(cache, build, *(f"{s.tokens_per_s:.1f} ({s.ratio:.2f})" for s in cells))
    return table


def save(name: str, key: str, rows: list[Any]) -> Path:
    """Writes results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    document = {"command": " ".join(["python", "benchmarks/speed/cpu.py", *words]), "machine": machine.facts()}
    path.write_text(json.dumps({**document, key: [asdict(row) for row in rows]}, indent=1) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    steps = commands.add_parser("micro", help="single steps of libtqgguf")
    steps.add_argument("--runs", type=int, default=25)
    steps.add_argument("--save", default="cpu_micro", metavar="NAME")
    bench = commands.add_parser("llama", help="llama-bench, cache types in turn")
    bench.add_argument("--bin", type=Path, required=True, help="folder with the patched llama-bench")
    bench.add_argument("--stock", type=Path, help="folder with the stock llama-bench")
    bench.add_argument("--cache", default="f16,q8_0,q4_0,pqo4,pqo3")
    bench.add_argument("--threads", type=int, default=1)
    bench.add_argument("--rounds", type=int, default=5)
    bench.add_argument("--both", action="store_true", help="with --stock: stock types in the patched build, too")
    bench.add_argument("--repeats", type=int, default=1, help="timings per round; long depths are filled once for all")
    bench.add_argument("--heads", type=int, default=16)
    bench.add_argument("--heads-kv", type=int, default=8)
    bench.add_argument("--head-dim", type=int, default=128)
    bench.add_argument("--tg", default="0,512,4096,16384", help="depths at which 32 tokens are generated")
    bench.add_argument("--pp", default="0,4096", help="depths at which 1024 tokens are read")
    bench.add_argument("--save", default="cpu_llama", metavar="NAME")
    args = parser.parse_args()
    out = Console()
    if args.command == "micro":
        rows = micro(args.runs)
        out.print(micro_table(rows))
        console.print(f"saved to {save(args.save, 'steps', rows)}")
        return
    shape = replace(random_model.Shape(), n_head=args.heads, n_head_kv=args.heads_kv, head_dim=args.head_dim)
    tests = [Test("tg", 32, int(d)) for d in args.tg.split(",") if d] + [
        Test("pp", 1024, int(d)) for d in args.pp.split(",") if d
    ]
    speeds = llama(
        args.bin, args.stock, shape, args.cache.split(","), args.threads, tests, args.rounds, args.repeats, args.both
    )
    out.print(llama_table(speeds))
    console.print(f"saved to {save(args.save, 'speeds', speeds)}")


if __name__ == "__main__":
    main()
