"""Speed of cache types in two real language models: tokens per second, and relative to the better f16.

    python benchmarks/speed/real_speed.py

Every cache has a context of its own, filled once, and all take turns, round by round, so that a drift of the machine
hits them alike. A test reads a prompt of 256 tokens at once, or 32 tokens one at a time, behind 0, 4,096 or (Gemma)
16,384 tokens, with 1 and 2 threads; then these tokens are removed again. f16 runs without flash attention and with it;
ratios are to the better one of that test. All run in the patched llama.cpp, whose stock types are as fast as in a stock
one: `cpu.py llama --both` compares them. Figures are medians; they are saved in benchmarks/results/real_speed.json.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.append(str(Path(__file__).parents[1] / "common"))

import decoding
import machine
import real_sources

import tqgguf
from tqgguf._native import import_llama_cpp

llama_cpp: Any = import_llama_cpp()
RESULTS: Final = Path(__file__).parents[1] / "results" / "real_speed.json"

DEPTHS: Final = {"smollm2": (0, 4096), "gemma3": (0, 4096, 16384)}
PROMPT: Final = 256
ANSWER: Final = 32
N_BATCH: Final = 512


@dataclass(frozen=True)
class Setting:
    """A cache as it is measured."""

    cache: str
    flash: bool = True
    tail: int = 0
    calibrated: bool = False

    @property
    def name(self) -> str:
        words = f"{self.cache}{f'+{self.tail}' if self.tail else ''}"
        return f"{words}{' calibrated' if self.calibrated else ''}{'' if self.flash else ', no flash attention'}"


F16: Final = (Setting("f16", flash=False), Setting("f16"))
SETTINGS: Final = (
    *F16,
    Setting("q8_0"),
    Setting("q4_0"),
    Setting("q4_0", tail=128),
    *(Setting(kind, tail=128, calibrated=True) for kind in ("pqt5", "pqt4", "pqo4", "pqt3", "pqo3", "pqt2")),
    *(Setting(pair, tail=128, calibrated=True) for pair in ("pqt5/pqt4", "pqt4/pqt3", "pqt3/pqt2")),
    *(Setting(kind, tail=tail) for kind in ("pqt4", "pqt3") for tail in (0, 128)),
)
"""As `Llama` has them by default, which is with a tail and calibrated keys for types of tqgguf; the last four show what
each of the two costs."""


class Runner:
    """A model with one cache."""

    def __init__(self, path: Path, setting: Setting, n_ctx: int, calibration: tqgguf.Calibration) -> None:
        self.model = tqgguf.Llama(
            path,
            cache=tuple(setting.cache.split("/")) if "/" in setting.cache else setting.cache,
            tail=setting.tail,
            calibration=calibration if setting.calibrated else "off",
            n_ctx=n_ctx,
            n_batch=N_BATCH,
            flash_attn=setting.flash,
            swa_full=False,
            verbose=False,
        )

    def read(self, tokens: np.ndarray, n_batch: int) -> float:
        """Reads tokens (n,) behind those that are there; seconds."""
        return decoding.read(self.model.ctx, tokens, n_batch)

    def forget_from(self, depth: int) -> None:
        """Removes the tokens from position `depth` on."""
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.model.ctx), -1, depth, -1)

    def use_threads(self, n: int) -> None:
        llama_cpp.llama_set_n_threads(self.model.ctx, n, n)


def speeds(path: Path, tokens: np.ndarray, depths: tuple[int, ...], threads: list[int], rounds: int) -> Iterator[dict]:
    """A row for each depth, number of threads, test and setting."""
    with contextlib.ExitStack() as stack, Progress(console=Console(stderr=True)) as progress:
        n_ctx = depths[-1] + PROMPT + ANSWER
        calibration = tqgguf.calibrate(path)
        runners = {setting: Runner(path, setting, n_ctx, calibration) for setting in SETTINGS}
        for runner in runners.values():
            stack.enter_context(contextlib.closing(runner.model))
        task = progress.add_task(path.name, total=len(depths) * len(runners) * (1 + rounds * len(threads)))
        there = 0
        for depth in depths:
            for runner in runners.values():
                runner.use_threads(max(threads))
                runner.read(tokens[there:depth], N_BATCH)
                progress.advance(task)
            there = depth
            for n in threads:
                found: dict[tuple[str, Setting], list[float]] = {}
                for _ in range(rounds):
                    for setting, runner in runners.items():
                        runner.use_threads(n)
                        for test, n_tokens, n_batch in (("read", PROMPT, N_BATCH), ("answer", ANSWER, 1)):
                            seconds = runner.read(tokens[depth : depth + n_tokens], n_batch)
                            found.setdefault((test, setting), []).append(n_tokens / seconds)
                            runner.forget_from(depth)
                        progress.advance(task)
                yield from rows(found, depth, n)


def rows(found: dict[tuple[str, Setting], list[float]], depth: int, threads: int) -> Iterator[dict[str, Any]]:
    """Medians, and medians of each round's ratio to the better f16 of the test."""
    for (test, setting), values in found.items():
        best = max(F16, key=lambda f16: statistics.median(found[test, f16]))
        ratios = [value / base for value, base in zip(values, found[test, best], strict=True)]
        yield {
            "depth": depth,
            "threads": threads,
            "test": test,
            "cache": setting.name,
            "tokens_per_s": round(statistics.median(values), 2),
            "ratio": round(statistics.median(ratios), 3),
            "rounds": [round(value, 2) for value in values],
        }


def table(model: str, found: list[dict[str, Any]]) -> Table:
    """Caches in rows, tests in columns."""
    tests = list(dict.fromkeys((row["test"], row["depth"], row["threads"]) for row in found))
    names = [f"{test} @ {depth}, {n} thread{'s'[: n > 1]}" for test, depth, n in tests]
    shown = Table("cache", *names, title=f"{model}: tokens/s (ratio to the better f16)")
    for cache in dict.fromkeys(row["cache"] for row in found):
        mine = {(row["test"], row["depth"], row["threads"]): row for row in found if row["cache"] == cache}
        shown.add_row(cache, *(f"{mine[t]['tokens_per_s']:.1f} ({mine[t]['ratio']:.2f})" for t in tests))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(DEPTHS), default=list(DEPTHS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--deepest", type=int, default=16384, help="most tokens in the cache (default: 16384)")
    parser.add_argument("--output", default=str(RESULTS), help="file for the results, or - (default: %(default)s)")
    args = parser.parse_args()
    command = " ".join(["python", "benchmarks/speed/real_speed.py", *sys.argv[1:]])
    result: dict[str, Any] = {"command": command, "machine": machine.facts(), "models": []}
    try:
        for key in args.models:
            path, name = real_sources.model_path(key), real_sources.MODELS[key].name
            with contextlib.closing(tqgguf.Llama(path, vocab_only=True, verbose=False)) as model:
                tokens = np.array(model.tokenize(real_sources.text("prose").encode()), np.int32)
            depths = tuple(depth for depth in DEPTHS[key] if depth <= args.deepest)
            found = list(speeds(path, tokens, depths, args.threads, args.rounds))
            result["models"].append({"model": name, "rows": found})
            Console(width=200).print(table(name, found))
            machine.save(result, args.output)
    except (real_sources.SourceError, tqgguf.TqggufError) as error:
        sys.exit(f"real_speed.py: {error}")


if __name__ == "__main__":
    main()
