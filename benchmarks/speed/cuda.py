"""Speed on a GPU: builds, checks, then times the CUDA kernels beside llama.cpp's f16 attention and a copy.

    make cuda-bench              what it needs, then: make cuda, the tests marked cuda, kernels, llama-bench
    python benchmarks/speed/cuda.py    the same without the first; saves results/cuda_GPU.json
    python benchmarks/speed/cuda.py --only kernels --quick
    python benchmarks/speed/cuda.py --emulate build/cuda-emulated/libtqgguf_cuda.so --output -     a rehearsal

Attention: one layer of 8 KV heads, one query row per sequence, as in decoding. Contenders run in turn, round by round;
a figure is the median over rounds, a ratio the median of the ratios within rounds. K and V are taken from as many
copies as exceed the second-level cache four times: in a model, the other layers' push them out. f16 is upstream's
kernel, through libggml, timed by the wall over a graph of 64 calls or more. Ours are a CUDA graph between two events,
and, if libggml has them, the same way as f16, too (`ggml pqo3`). The steps on llama.cpp need a CUDA build of it;
where there is none they are left out, and it is said. Predictions are those of docs/cuda.md, for an H200.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "common"))

import ggml_attention
import machine
from cuda_clock import Clock, EmulatedClock
from cuda_kernels import N_HEAD_KV, Kernels, Shape
from rich.console import Console
from rich.table import Table

from tqgguf._native.cuda import CudaLibrary, cuda_library_path
from tqgguf._native.library import LIB_DIR
from tqgguf.config import CACHE_TYPES
from tqgguf.errors import OutOfMemoryError, TqggufError

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parents[1] / "results"
OURS = ("pqo3", "pqo4", "pqt3", "pqt4", "pqt2", "pqt5")
MIXED = "pqo4/pqo3"
"""K's type and V's: the pair that people choose."""
EMULATED = "EMULATED KERNELS ON THE CPU: THESE TIMES MEAN NOTHING"
console = Console(stderr=True, width=150)
results = Console(width=150)


# ---- What is measured ----


@dataclass(frozen=True)
class AttentionFigure:
    """One contender on one shape.

    Attributes:
        us: microseconds per call.
        rounds: of each round.
        predicted_us: docs/cuda.md's range, for an H200.
        gb_per_s: bytes of K and V per second, in 10^9.
        of_copy: the same as a part of a copy's bandwidth, bytes read and written.
        speedup: f16's time over this one's, median over rounds; None where f16 was not measured.
    """

    n_kv: int
    group: int
    batch: int
    head_dim: int
    contender: str
    us: float
    rounds: tuple[float, ...]
    predicted_us: tuple[float, float] | None
    gb_per_s: float
    of_copy: float
    speedup: float | None


@dataclass(frozen=True)
class RowsFigure:
    """Encoding from f32, or decoding to f16, of n_tokens tokens of 8 heads of 128: of K, or of V.

    Attributes:
        us: microseconds per call.
        gb_per_s: bytes read and written per second, in 10^9.
        of_copy: the same as a part of a copy's bandwidth.
    """

    step: str
    type: str
    n_tokens: int
    us: float
    predicted_us: tuple[float, float] | None
    gb_per_s: float
    of_copy: float


@dataclass(frozen=True)
class LlamaFigure:
    """llama-bench: tokens per second, and the ratio to f16 in the same round; medians over rounds."""

    test: str
    cache: str
    tokens_per_s: float
    ratio: float
    rounds: tuple[float, ...]


AT_32K = {
    "pqo3": (13, 15),
    MIXED: (13, 16),
    "pqo4": (14, 16),
    "pqt3": (21, 25),
    "pqt4": (34, 40),
    "f16": (31, 37),
}
"""Microseconds expected of 32,768 tokens, 8 KV heads of 128, batch 1, groups of up to 8. The instructions of pqt2 and
pqt5 have not been counted."""
MERGING = (2, 4)
ENCODE_512 = {"pqo3": (4, 6), "pqo4": (4, 6), "pqt3": (40, 40), "pqt4": (40, 40)}


def predicted(contender: str, shape: Shape) -> tuple[float, float] | None:
    """docs/cuda.md's figures at 32k tokens, in proportion to the values of K and V, and the merging of splits."""
    name = contender.removeprefix("ggml ")
    if name not in AT_32K:
        return None
    part = shape.n_kv * shape.batch * shape.head_dim / (32768 * 128)
    low, high = (part * us for us in AT_32K[name])
    return (low, high) if name == "f16" else (low + MERGING[0], high + MERGING[1])


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        shapes: of attention.
        tokens: of encode and decode.
        rounds: that all contenders run in turn.
        enough: seconds that a contender runs in a round, at least.
        copied: bytes of the copy that bandwidth is taken from.
    """

    shapes: tuple[Shape, ...]
    tokens: tuple[int, ...]
    rounds: int
    enough: float
    copied: int


def plan(quick: bool, emulated: bool) -> Plan:
    if emulated:
        return Plan((Shape(256, 2, 1, 64), Shape(256, 1, 2, 64)), (8,), 2, 0.0, 1 << 16)
    lengths, dims = ((4096, 32768), (128,)) if quick else ((2048, 4096, 32768, 131072), (128, 64))
    shapes = tuple(
        Shape(n, group, batch, dim) for dim in dims for n in lengths for batch in (1, 4) for group in (1, 4, 8)
    )
    return Plan(shapes, (512, 4096, 32768) if quick else (512, 4096, 32768, 131072), 5 if quick else 9, 2e-3, 1 << 28)


class Contender:
    """Something timed in turn with others: `run()` gives the seconds of n_calls calls."""

    def __init__(self, name: str, run: Callable[[], float], n_calls: int) -> None:
        self.name, self.run, self.n_calls = name, run, n_calls
        self.seconds: list[float] = []

    def round(self) -> None:
        self.seconds.append(self.run() / self.n_calls)


def record(kernels: Kernels, name: str, launch: Callable[[int, int], None], enough: float, unit: int = 1) -> Contender:
    """A contender of as many calls as take `enough` seconds, a multiple of unit."""

    def several(n: int) -> Callable[[], float]:
        return kernels.clock.record(lambda stream: [launch(i, stream) for i in range(n)] and None)

    first = several(unit)
    first()
    once = first() / unit
    n = unit * max(1, min(int(enough / max(once, 1e-9) / unit), 2000 // unit))
    run = several(n)
    run()
    return Contender(name, run, n)


def in_turn(contenders: list[Contender], rounds: int) -> None:
    for i in range(rounds):
        for contender in contenders if i % 2 else contenders[::-1]:
            contender.round()


def predicted_encode(type: str, n_tokens: int) -> tuple[float, float] | None:
    """docs/cuda.md's figures for encoding 512 tokens, in proportion."""
    if type not in ENCODE_512:
        return None
    low, high = ENCODE_512[type]
    return low * n_tokens / 512, high * n_tokens / 512


def copy_bandwidth(kernels: Kernels, settings: Plan) -> float:
    """Bytes read plus bytes written per second of a copy within the device: the median."""
    contender = record(kernels, "copy", kernels.copy(settings.copied), settings.enough)
    in_turn([contender], settings.rounds)
    kernels.clock.forget()
    return 2 * settings.copied / statistics.median(contender.seconds)


def attention_figures(
    kernels: Kernels, ggml: ggml_attention.Ggml | None, shape: Shape, settings: Plan, copy: float
) -> list[AttentionFigure]:
    l2 = kernels.clock.l2_bytes()
    contenders: list[Contender] = []
    with ExitStack() as resources:
        for type in (*OURS, MIXED, "f16"):
            n_copies = max(1, min(64, -(-4 * l2 // shape.kv_bytes(type))))
            if type != "f16":
                launch = kernels.attention(type, shape, n_copies)
                contenders.append(record(kernels, type, launch, settings.enough, n_copies))
            if ggml is not None and type != MIXED:
                blocks = kernels.encoded(type, shape.head_dim, min(shape.n_kv, 1024))
                n_calls = 2 if kernels.native.emulated else max(n_copies, 64)
                try:
                    graph = ggml_attention.Attention(
                        ggml,
                        CACHE_TYPES[type].number,
                        blocks,
                        head_dim=shape.head_dim,
                        n_head=N_HEAD_KV * shape.group,
                        n_head_kv=N_HEAD_KV,
                        n_kv=shape.n_kv,
                        n_stream=shape.batch,
                        n_copies=n_copies,
                        n_calls=n_calls,
                    )
                except RuntimeError as error:
                    console.print(f"left out: {type} by ggml at {shape}: {error}")
                    continue
                resources.callback(graph.close)
                for _ in range(3):  # ggml captures a graph once it has seen it
                    graph.seconds()
                contenders.append(Contender("f16" if type == "f16" else f"ggml {type}", graph.seconds, n_calls))
        in_turn(contenders, settings.rounds)
        kernels.clock.forget()
    base = next((c.seconds for c in contenders if c.name == "f16"), None)
    figures = []
    for contender in contenders:
        seconds = statistics.median(contender.seconds)
        rate = shape.kv_bytes(contender.name.removeprefix("ggml ")) / seconds
        figures.append(
            AttentionFigure(
                **asdict(shape),
                contender=contender.name,
                us=round(seconds * 1e6, 2),
                rounds=tuple(round(s * 1e6, 2) for s in contender.seconds),
                predicted_us=predicted(contender.name, shape),
                gb_per_s=float(f"{rate / 1e9:.4g}"),
                of_copy=round(rate / copy, 3),
                speedup=None
                if base is None
                else round(statistics.median(b / s for b, s in zip(base, contender.seconds, strict=True)), 3),
            )
        )
    return figures


def rows_figures(kernels: Kernels, settings: Plan, copy: float) -> list[RowsFigure]:
    figures = []
    for n_tokens in settings.tokens:
        for step in ("encode", "decode"):
            made = {type: kernels.rows(step, type, n_tokens) for type in OURS}
            contenders = [record(kernels, type, launch, settings.enough) for type, (launch, _) in made.items()]
            in_turn(contenders, settings.rounds)
            kernels.clock.forget()
            for contender in contenders:
                seconds, n_bytes = statistics.median(contender.seconds), made[contender.name][1]
                figures.append(
                    RowsFigure(
                        step,
                        contender.name,
                        n_tokens,
                        us=round(seconds * 1e6, 2),
                        predicted_us=predicted_encode(contender.name, n_tokens) if step == "encode" else None,
                        gb_per_s=round(n_bytes / seconds / 1e9, 1),
                        of_copy=round(n_bytes / seconds / copy, 3),
                    )
                )
    return figures


# ---- llama.cpp ----


def llama_figures(binary: Path, rounds: int) -> list[LlamaFigure]:
    """llama-bench with a model of random weights, cache types in turn."""
    import random_model

    shape = random_model.Shape(n_layer=8)
    tests = {"tg64 @ 0": (0, 64, 0), "tg64 @ 32768": (0, 64, 32768), "pp2048 @ 0": (2048, 0, 0)}
    found: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "random.gguf"
        random_model.write(model, shape)
        for _ in range(rounds):
            for cache in ("f16", "pqo3", "pqo4"):
                for name, (n_prompt, n_gen, depth) in tests.items():
                    command = [str(binary), "-m", str(model), "-ngl", "99", "-fa", "1", "-ctk", cache, "-ctv", cache]
                    command += ["-p", str(n_prompt), "-n", str(n_gen), "-d", str(depth), "-r", "3", "-o", "json"]
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode != 0:
                        raise SystemExit(f"{binary} failed with cache {cache}: {done.stderr.strip()[-500:]}")
                    rows = json.loads(done.stdout)
                    if "CUDA" not in rows[0].get("backends", ""):
                        raise SystemExit(f"{binary} ran on {rows[0].get('backends')}, not on CUDA")
                    found.setdefault((name, cache), []).append(statistics.median(rows[0]["samples_ts"]))
    return [
        LlamaFigure(
            name,
            cache,
            round(statistics.median(speeds), 1),
            round(statistics.median(s / b for s, b in zip(speeds, found[name, "f16"], strict=True)), 3),
            tuple(round(s, 1) for s in speeds),
        )
        for (name, cache), speeds in found.items()
    ]


# ---- Machine ----


def gpu_facts(native: CudaLibrary, clock: Clock) -> dict[str, Any]:
    """The device, its driver, the compiler and the clocks, as far as they can be asked for."""
    info = native.ffi.new("tq_cuda_device *")
    native.check(native.lib.tq_cuda_device_use(0, info))
    facts: dict[str, Any] = {
        "gpu": native.ffi.string(info.name).decode(),
        "compute_capability": info.cc / 10,
        "multiprocessors": info.n_sm,
        "l2_bytes": clock.l2_bytes(),
        "memory_bytes": int(info.total_bytes),
    }
    if native.emulated:
        return facts
    wanted = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
    for name, command in (
        ("nvidia_smi", ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(wanted)}", "--format=csv,noheader"]),
        ("nvcc", ["nvcc", "--version"]),
    ):
        if shutil.which(command[0]):
            out = subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()
            if out:
                last = out[-1]
                facts[name] = dict(zip(wanted, last.split(", "), strict=False)) if name == "nvidia_smi" else last
    return facts


# ---- Reports ----


def in_words(predicted_us: tuple[float, float] | None) -> str:
    return "" if predicted_us is None else f"{predicted_us[0]:.0f} to {predicted_us[1]:.0f}"


def attention_table(figures: list[AttentionFigure]) -> Table:
    table = Table(title="attention over one layer of 8 KV heads: microseconds per call; speed beside f16's")
    for column in ("tokens", "GQA", "batch", "head", "cache", "us", "predicted (H200)", "GB/s", "of copy", "x f16"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    for f in figures:
        table.add_row(
            *(f"{n:,}" for n in (f.n_kv, f.group, f.batch, f.head_dim)),
            f.contender,
            f"{f.us:.1f}",
            in_words(f.predicted_us),
            f"{f.gb_per_s:.0f}",
            f"{f.of_copy:.0%}",
            "" if f.speedup is None else f"{f.speedup:.2f}",
        )
    return table


def rows_table(figures: list[RowsFigure]) -> Table:
    table = Table(title="K or V of 8 heads of 128: from f32, to f16; microseconds per call")
    for column in ("step", "type", "tokens", "us", "predicted (H200)", "GB/s", "of copy"):
        table.add_column(column, justify="left" if column in ("step", "type") else "right")
    for f in figures:
        expected = in_words(f.predicted_us)
        table.add_row(
            f.step, f.type, f"{f.n_tokens:,}", f"{f.us:.1f}", expected, f"{f.gb_per_s:.0f}", f"{f.of_copy:.0%}"
        )
    return table


def llama_table(figures: list[LlamaFigure]) -> Table:
    table = Table(title="llama-bench, random weights: tokens per second; ratio to f16")
    for column in ("test", "cache", "tokens/s", "x f16"):
        table.add_column(column, justify="left" if column in ("test", "cache") else "right")
    for f in figures:
        table.add_row(f.test, f.cache, f"{f.tokens_per_s:,.1f}", f"{f.ratio:.3f}")
    return table


def bars(attention: list[AttentionFigure], llama: list[LlamaFigure]) -> list[str]:
    """The aims of docs/cuda.md, and what was measured."""
    found: dict[tuple[int, ...], tuple[str, float | None]] = {}
    for name in ("pqo3", "ggml pqo3"):  # the latter, if there is one: timed as f16 is
        found |= {(f.n_kv, f.group, f.batch, f.head_dim): (name, f.speedup) for f in attention if f.contender == name}
    aims = [((32768, 4, 1, 128), 2.0), ((32768, 8, 1, 128), 2.0), ((32768, 1, 1, 128), 1.5)]
    aims += [((2048, group, 1, 128), 1.0) for group in (1, 4, 8)]
    lines = []
    for (n_kv, group, batch, dim), aim in aims:
        name, ratio = found.get((n_kv, group, batch, dim), ("pqo3", None))
        said = "not measured" if ratio is None else f"{ratio:.2f}, {'met' if ratio >= aim else 'MISSED'}"
        lines.append(f"{name} attention at {n_kv:,} tokens, GQA {group}: {aim} x f16 or more: {said}")
    for test, aim in (("tg64 @ 32768", 1.0), ("pp2048 @ 0", 0.95)):
        ratios = [f.ratio for f in llama if f.test == test and f.cache == "pqo3"]
        said = f"{ratios[0]:.3f}, {'met' if ratios[0] >= aim else 'MISSED'}" if ratios else "not measured"
        lines.append(f"llama-bench {test}, pqo3: {aim} x f16 or more: {said}")
    return lines


# ---- The command ----


def build_and_check(steps: set[str]) -> None:
    """`make cuda`, then the tests on the GPU; ends the program where one fails."""
    for step, command in (
        ("build", ["make", "cuda"]),
        ("check", [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests/native"]),
    ):
        if step in steps:
            console.rule(f"{step}: {' '.join(command)}")
            if subprocess.run(command, cwd=ROOT).returncode != 0:
                raise SystemExit(f"the {step} failed, and nothing was timed")


def find_ggml(folder: Path, emulated: bool) -> ggml_attention.Ggml | None:
    """libggml with CUDA; of an emulated run the CPU's."""
    if emulated:
        return ggml_attention.Ggml(LIB_DIR, ggml_attention.CPU)
    for place in (folder, LIB_DIR):
        if (place / "libggml-cuda.so").exists():
            try:
                return ggml_attention.Ggml(place, ggml_attention.GPU)
            except (OSError, RuntimeError) as error:
                console.print(f"left out: f16 attention: {error}")
                return None
    console.print(f"left out: f16 attention and all ratios to it: no libggml-cuda.so in {folder} or tqgguf/lib")
    return None


def parse_arguments() -> argparse.Namespace:
    """The command line; steps is a set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="build,check,kernels,llama", help="steps: build,check,kernels,llama")
    parser.add_argument("--bin", type=Path, default=ROOT / "build" / "bin", help="where llama.cpp's CUDA build is")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--rounds", type=int, default=3, help="of llama-bench")
    parser.add_argument("--emulate", type=Path, metavar="LIB", help="tests/native's emulated library: a rehearsal")
    parser.add_argument("--output", metavar="FILE", help="- prints only; default benchmarks/results/cuda_GPU.json")
    args = parser.parse_args()
    args.steps, args.emulated = set(args.only.split(",")), args.emulate is not None
    unknown = args.steps - {"build", "check", "kernels", "llama"}
    if unknown:
        parser.error(f"unknown step {', '.join(sorted(unknown))}; steps are build, check, kernels, llama")
    if args.emulated:
        if args.output is None:
            parser.error("--emulate needs --output: what it prints is no result")
        args.steps = {"kernels"}
    return args


def make_clock(emulated: bool) -> Clock:
    """The clock of the first GPU; ends the program where there is none."""
    try:
        clock = EmulatedClock() if emulated else Clock()
        if not emulated and clock.device_count() == 0:
            raise RuntimeError("the driver finds no device")
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"no NVIDIA GPU can be used here: {error}. Nothing was built, checked or timed.") from None
    return clock


def load(emulate: Path | None) -> CudaLibrary:
    """The kernels to be timed; ends the program where they cannot run."""
    if emulate is not None:
        os.environ["TQGGUF_CUDA_LIB"] = str(emulate)
    try:
        native = CudaLibrary(cuda_library_path())
        native.queue(0)
    except TqggufError as error:
        raise SystemExit(f"nothing was timed: {error}") from None
    if native.emulated != (emulate is not None):
        raise SystemExit(f"nothing was timed: {native.path} is {'' if native.emulated else 'not '}emulated")
    return native


def time_kernels(kernels: Kernels, settings: Plan, ggml: ggml_attention.Ggml | None) -> dict[str, Any]:
    """The part of the document about the kernels; prints it, too."""
    start = time.monotonic()
    attention: list[AttentionFigure] = []
    copy = copy_bandwidth(kernels, settings)
    rows = rows_figures(kernels, settings, copy)
    for shape in settings.shapes:
        console.print(f"{time.monotonic() - start:4.0f} s: {shape}")
        try:
            attention += attention_figures(kernels, ggml, shape, settings, copy)
        except OutOfMemoryError as error:
            console.print(f"left out: {shape}: {error}")
    results.print(
        f"copy within the device: {copy / 1e9:,.0f} GB/s, read and written",
        rows_table(rows),
        attention_table(attention),
    )
    return {"copy_gb_per_s": round(copy / 1e9, 1), "rows": rows, "attention": attention}


def time_llama(folder: Path, rounds: int) -> list[LlamaFigure]:
    """llama-bench's figures, which are printed, too; none where there is no CUDA build of it."""
    binary = folder / "llama-bench"
    if not binary.exists() or not (folder / "libggml-cuda.so").exists():
        console.print(f"left out: llama-bench: no CUDA build of it (llama-bench, libggml-cuda.so) in {folder}")
        return []
    figures = llama_figures(binary, rounds)
    results.print(llama_table(figures))
    return figures


def main() -> None:
    args = parse_arguments()
    start = time.monotonic()
    clock = make_clock(args.emulated)
    if args.emulated:
        console.print(f"{EMULATED}; left out: build, check, llama")
    build_and_check(args.steps)
    native = load(args.emulate)
    document: dict[str, Any] = {
        "warning": EMULATED if args.emulated else None,
        "command": " ".join(["python", "benchmarks/speed/cuda.py", *(w for w in sys.argv[1:] if "/" not in w)]),
        "machine": {} if args.emulated else machine.facts(),
        "gpu": gpu_facts(native, clock),
        "attention": [],
        "llama": [],
    }
    if "kernels" in args.steps:
        ggml = find_ggml(args.bin, args.emulated)
        document |= time_kernels(Kernels(native, clock), plan(args.quick, args.emulated), ggml)
    if "llama" in args.steps:
        document["llama"] = time_llama(args.bin, args.rounds)
    if args.emulated:
        results.print(EMULATED)
    else:
        document["aims"] = bars(document["attention"], document["llama"])
        results.print(*document["aims"], sep="\n")
        document["gpu_after"] = gpu_facts(native, clock)
    document["seconds"] = round(time.monotonic() - start)
    if args.output != "-":
        name = re.sub(r"\W+", "_", document["gpu"]["gpu"]).strip("_").lower()
        path = Path(args.output) if args.output else RESULTS / f"cuda_{name}.json"
        path.write_text(json.dumps(document, indent=1, default=asdict) + "\n")
        console.print(f"saved to {path}")


if __name__ == "__main__":
    main()
