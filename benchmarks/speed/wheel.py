"""Speed of several builds of tqgguf, in turn: prefill and decode of the demo model and of random weights.

    unzip -q dist/tqgguf-*.whl -d build/unpacked
    python benchmarks/speed/wheel.py native=. wheel=build/unpacked                      # saves results/wheel.json
    python benchmarks/speed/wheel.py native=. haswell=build/unpacked@haswell --output -  # a variant, prints only

A build is NAME=DIRECTORY, where the package `tqgguf` lies in DIRECTORY (a checkout, an unpacked wheel); @VARIANT sets
TQGGUF_CPU. The others are compared with the first. Every round runs each build in a process of its own, so that slow
and fast moments of the machine meet all of them. Seconds are the processor's with one thread, which a busy machine
disturbs least, and the clock's with more. Figures are medians over rounds, ratios are those within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "common"))

RESULTS = Path(__file__).parents[1] / "results" / "wheel.json"
WEIGHTS = ("f16", "q8_0", "q4_0")
CACHES = ("f16", "pqo3")
LAYERS = 2
N_PREFILL, N_DECODE = 256, 48


@dataclass(frozen=True)
class Build:
    """A build of tqgguf: what to call it, where the package lies, and the variant of ggml-cpu to force, or none."""

    name: str
    directory: Path
    variant: str | None

    @classmethod
    def parse(cls, text: str) -> Build:
        """From NAME=DIRECTORY[@VARIANT]."""
        name, found, rest = text.partition("=")
        directory, _, variant = rest.partition("@")
        if not found or not (Path(directory) / "tqgguf" / "__init__.py").is_file():
            raise argparse.ArgumentTypeError(f"{text}: give NAME=DIRECTORY[@VARIANT], DIRECTORY holding tqgguf")
        return cls(name, Path(directory).resolve(), variant or None)

    def run(self, models: list[Path], n_threads: int) -> dict[str, Any]:
        """A process of its own: {"model/cache": {"prefill": tokens/s, "decode": tokens/s}, "backend": file}."""
        environment = {**os.environ, "PYTHONPATH": str(self.directory), "PYTHONDONTWRITEBYTECODE": "1"}
        environment.update({"TQGGUF_CPU": self.variant} if self.variant else {})
        command = [sys.executable, __file__, "--worker", str(n_threads), *map(str, models)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def measure(models: list[str], n_threads: int) -> dict[str, Any]:
    """What one build does, in this process."""
    import numpy as np
    from decoding import read

    import tqgguf
    from tqgguf import _native

    llama_cpp: Any = _native.import_llama_cpp()
    clock = time.process_time if n_threads == 1 else time.perf_counter

    found: dict[str, Any] = {}
    for path in models:
        for cache in CACHES:
            options: dict[str, Any] = {"n_batch": 128, "n_threads": n_threads, "n_threads_batch": n_threads}
            model = tqgguf.Llama(path, cache=cache, n_ctx=N_PREFILL + N_DECODE, verbose=False, **options)
            tokens = np.random.default_rng(0).integers(10, 200, N_PREFILL + N_DECODE).astype(np.int32)
            read(model.ctx, tokens[:64], 64)  # the first tokens also read the weights, and the f16 tables
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), True)
            prefill = read(model.ctx, tokens[:N_PREFILL], 128, clock)
            decode = read(model.ctx, tokens[N_PREFILL:], 1, clock)
            speeds = {"prefill": N_PREFILL / prefill, "decode": N_DECODE / decode}
            found[f"{Path(path).stem}/{cache}"] = speeds
            model.close()
    return {"speeds": found, "backend": str((_native.cpu_backend_path() or Path("?")).name)}


def main() -> None:
    """Runs the builds in turn, prints a table and saves it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builds", nargs="+", type=Build.parse, metavar="NAME=DIRECTORY[@VARIANT]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--weights", nargs="*", default=WEIGHTS, choices=WEIGHTS, help="random models to write")
    parser.add_argument("--output", default=str(RESULTS), help="a JSON file, or - to print only")
    args = parser.parse_args()

    import machine
    import random_model

    demo = Path(__file__).parents[2] / "tqgguf" / "demo" / "demo.gguf"
    with tempfile.TemporaryDirectory() as directory:
        models = [demo, *(Path(directory) / f"{weights}.gguf" for weights in args.weights)]
        for path in models[1:]:
            random_model.write(path, random_model.Shape(n_layer=LAYERS), weights=path.stem)
        rounds: list[dict[str, Any]] = []
        for i in range(args.rounds):
            order = args.builds if i % 2 == 0 else args.builds[::-1]
            rounds.append({build.name: build.run(models, args.threads) for build in order})
            print(f"round {i + 1} of {args.rounds}", file=sys.stderr)
    names = [build.name for build in args.builds]
    base = names[0]
    rows = []
    for case in rounds[0][base]["speeds"]:
        for phase in ("prefill", "decode"):
            row: dict[str, Any] = {"case": case, "phase": phase}
            for name in names:
                speeds = [r[name]["speeds"][case][phase] for r in rounds]
                bases = [r[base]["speeds"][case][phase] for r in rounds]
                ratio = median(a / b for a, b in zip(speeds, bases, strict=True))
                row[name] = {"tokens_per_s": round(median(speeds), 1), "ratio": round(ratio, 3)}
            rows.append(row)
            said = "  ".join(f"{name} {row[name]['tokens_per_s']:9.1f} ({row[name]['ratio']:.3f})" for name in names)
            print(f"{case:12} {phase:8} {said}")
    if args.output != "-":
        backends = {build.name: rounds[0][build.name]["backend"] for build in args.builds}
        data = {"machine": machine.facts(), "threads": args.threads, "rounds": args.rounds, "backends": backends}
        Path(args.output).write_text(json.dumps({**data, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        json.dump(measure(sys.argv[3:], int(sys.argv[2])), sys.stdout)
    else:
        main()
