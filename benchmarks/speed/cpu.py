"""Speed on the CPU: single steps of libtqgguf, and llama.cpp with and without a compressed cache.

    python benchmarks/speed/cpu.py micro                   ns per block and GB/s of encode, decode, dot, attention
    python benchmarks/speed/cpu.py llama --bin tqgguf/lib  tokens per second, by llama-bench

llama-bench is in the package; `make stock-tools` builds a stock one for --stock build/stock/cmake/bin.

`llama` runs the patched llama-bench and, for the stock types, the stock one of `--stock DIR` in turn, round by round,
so that a drift of the machine hits all of them alike. f16 runs with flash attention and without. It prints medians, and
ratios of each round to the f16 that is the better one in the test. The model is one of random weights, or one of
real_sources.py (`--model smollm2`), or a file. Figures and machine facts go to benchmarks/results/.

`micro` prints beside them how fast one thread copies memory: GB/s of attention that come near it are all there is.
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
import real_sources
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


def copied() -> float:
    """Bytes per second, in 10^9, that one thread copies between two arrays of 256 MiB: read, and as many written."""
    source = np.ones(2**28, np.uint8)
    to = np.zeros_like(source)
    return float(source.nbytes / _median_seconds(lambda: np.copyto(to, source), 5) / 1e9)


def micro_table(steps: list[Step], memory: float) -> Table:
    kernels = list(dict.fromkeys(s.kernel for s in steps))
    title = f"libtqgguf, one thread: ns per block of 32 values (GB/s of encoded bytes); memory copies {memory:.1f} GB/s"
    table = Table(title=title)
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
        ratio: median over the rounds of this type's figure over the better f16's in the same round.
    """

    shape: str
    threads: int
    test: str
    cache: str
    build: str
    tokens_per_s: float
    ratio: float
    rounds: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """A cache type in one build of llama-bench."""

    cache: str
    build: str
    folder: Path
    flash: bool = True

    @property
    def name(self) -> str:
        return self.cache if self.flash else f"{self.cache}, no flash attention"


def _llama_bench(run: Run, model: Path, threads: int, tests: list[Test], repeats: int) -> dict[Test, float]:
    """Runs llama-bench once for each kind of test; a figure is the median of its repeats."""
    found: dict[Test, float] = {}
    for kind in ("tg", "pp"):
        mine = [t for t in tests if t.kind == kind]
        if not mine:
            continue
        command = [str(run.folder / "llama-bench"), "-m", str(model), "-t", str(threads), "-fa", str(int(run.flash))]
        command += ["-ctk", run.cache, "-ctv", run.cache]
        command += ["-r", str(repeats), "-o", "json", "-d", ",".join(str(t.depth) for t in mine)]
        command += ["-p", "0", "-n", str(mine[0].n)] if kind == "tg" else ["-n", "0", "-p", str(mine[0].n)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{command[0]} failed: {done.stderr.strip().splitlines()[-1:]}")
        for row in json.loads(done.stdout):
            found[Test(kind, row["n_gen"] or row["n_prompt"], row["n_depth"])] = statistics.median(row["samples_ts"])
    return found


def runs_of(caches: list[str], patched: Path, stock: Path | None, both: bool) -> list[Run]:
    """Stock types run in the stock build if there is one, or in `both`; f16 with flash attention and without."""
    runs = []
    for cache in caches:
        in_stock = stock is not None and cache not in OURS
        builds = [("patched", patched)] if both or not in_stock else []
        builds += [("stock", stock)] if in_stock and stock is not None else []
        for build, folder in builds:
            runs += [Run(cache, build, folder, flash) for flash in ((True, False) if cache == "f16" else (True,))]
    return runs


def llama(
    runs: list[Run], model: Path, shape: str, threads: int, tests: list[Test], rounds: int, repeats: int
) -> list[Speed]:
    """Runs every cache type in every test, round by round."""
    figures: dict[Run, dict[Test, list[float]]] = {run: {} for run in runs}
    with Progress(console=console) as progress:
        task = progress.add_task(f"{shape}, {threads} threads", total=rounds * len(runs))
        for _ in range(rounds):
            for run in runs:
                for test, value in _llama_bench(run, model, threads, tests, repeats).items():
                    figures[run].setdefault(test, []).append(value)
                progress.advance(task)
    bases = {
        test: max((figures[run][test] for run in runs if run.cache == "f16"), key=statistics.median) for test in tests
    }
    return [
        Speed(
            shape=shape,
            threads=threads,
            test=test.name,
            cache=run.name,
            build=run.build,
            tokens_per_s=round(statistics.median(values), 2),
            ratio=round(statistics.median(v / f for v, f in zip(values, bases[test], strict=True)), 3),
            rounds=tuple(round(v, 2) for v in values),
        )
        for run, by_test in figures.items()
        for test, values in by_test.items()
    ]


def llama_table(speeds: list[Speed]) -> Table:
    tests = list(dict.fromkeys(s.test for s in speeds))
    title = f"llama-bench, {speeds[0].shape}, {speeds[0].threads} thread(s): tokens/s (ratio to the better f16)"
    table = Table(title=title)
    for column in ("cache", "build", *tests):
        table.add_column(column, justify="right" if column in tests else "left")
    found = {(s.cache, s.build, s.test): s for s in speeds}
    for cache, build in dict.fromkeys((s.cache, s.build) for s in speeds):
        cells = [found[cache, build, test] for test in tests]
        table.add_row(cache, build, *(f"{s.tokens_per_s:.1f} ({s.ratio:.2f})" for s in cells))
    return table


def save(name: str, key: str, rows: list[Any], **more: Any) -> Path:
    """Writes results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    document = {"command": " ".join(["python", "benchmarks/speed/cpu.py", *words]), "machine": machine.facts()}
    path.write_text(json.dumps({**document, **more, key: [asdict(row) for row in rows]}, indent=1) + "\n")
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
    bench.add_argument("--cache", default="f16,q8_0,q4_0,pqo4,pqt4,pqo3,pqt3")
    bench.add_argument("--threads", type=int, default=1)
    bench.add_argument("--rounds", type=int, default=5)
    bench.add_argument("--both", action="store_true", help="with --stock: stock types in the patched build, too")
    bench.add_argument("--repeats", type=int, default=1, help="timings per round; long depths are filled once for all")
    bench.add_argument("--model", metavar="NAME", help=f"{', '.join(real_sources.MODELS)} or a GGUF file")
    bench.add_argument("--heads", type=int, default=16, help="of the model of random weights")
    bench.add_argument("--heads-kv", type=int, default=8)
    bench.add_argument("--head-dim", type=int, default=128)
    bench.add_argument("--tg", default="0,1024,4096,16384", help="depths at which 32 tokens are generated")
    bench.add_argument("--pp", default="0,4096", help="depths at which 512 tokens are read")
    bench.add_argument("--save", default="cpu_llama", metavar="NAME")
    args = parser.parse_args()
    out = Console()
    if args.command == "micro":
        rows, memory = micro(args.runs), copied()
        out.print(micro_table(rows, memory))
        console.print(f"saved to {save(args.save, 'steps', rows, copied_gb_per_s=round(memory, 2))}")
        return
    tests = [Test("tg", 32, int(d)) for d in args.tg.split(",") if d] + [
        Test("pp", 512, int(d)) for d in args.pp.split(",") if d
    ]
    runs = runs_of(args.cache.split(","), args.bin, args.stock, args.both)
    if not any(run.cache == "f16" for run in runs):
        parser.error(f"--cache is {args.cache}: f16 must be among the types, since ratios are to it")
    with tempfile.TemporaryDirectory() as folder:
        if args.model in real_sources.MODELS:
            model, shape = real_sources.model_path(args.model), real_sources.MODELS[args.model].name
        elif args.model:
            model, shape = Path(args.model), Path(args.model).name
        else:
            random = replace(random_model.Shape(), n_head=args.heads, n_head_kv=args.heads_kv, head_dim=args.head_dim)
            model, shape = Path(folder) / f"{random.name}.gguf", random.name
            random_model.write(model, random)
        speeds = llama(runs, model, shape, args.threads, tests, args.rounds, args.repeats)
    out.print(llama_table(speeds))
    console.print(f"saved to {save(args.save, 'speeds', speeds)}")


if __name__ == "__main__":
    main()
