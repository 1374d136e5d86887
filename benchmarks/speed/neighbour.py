"""Tokens per second beside other programs that take a processor each: what threads that wait for each other do then.

    python benchmarks/speed/neighbour.py                              # saves results/neighbour.json
    python benchmarks/speed/neighbour.py --other NAME=PATH/llama-bench --other "spins=PATH/llama-bench GOMP_SPINCOUNT=9"

llama-bench of the package reads and continues a text of SmolLM2 in a pqo3 cache. The busy programs are Python loops in
sessions of their own, as another user's would be. Each round asks all programs in turn. Figures are medians of the
rounds, ratios those of each round to one thread of the package beside as many busy programs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

sys.path.append(str(Path(__file__).parents[1] / "common"))

import machine
import real_sources
from rich.console import Console
from rich.table import Table

from tqgguf._native.programs import end_with_parent, program

RESULTS: Final = Path(__file__).parents[1] / "results" / "neighbour.json"
OURS: Final = "tqgguf"
N_READ: Final = 256
N_ANSWER: Final = 48
DEPTH: Final = 512


@contextlib.contextmanager
def busy(n: int) -> Iterator[None]:
    """So many programs that never wait."""
    command = [sys.executable, "-c", "while True: pass"]
    loops = [subprocess.Popen(command, start_new_session=True, preexec_fn=end_with_parent()) for _ in range(n)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def speeds(command: Sequence[str], model: Path, threads: int, cache: str) -> tuple[float, float]:
    """Tokens per second of reading and of answering.

    Args:
        command: the program, then NAME=VALUE of its environment.
        model: a GGUF file.
        threads: threads.
        cache: type of K and V.
    """
    words = f"-ctk {cache} -ctv {cache} -fa 1 -t {threads} -p {N_READ} -n {N_ANSWER} -d {DEPTH} -r 1 -o json".split()
    env = {**os.environ, **dict(word.split("=", 1) for word in command[1:])}
    done = subprocess.run([command[0], "-m", str(model), *words], env=env, capture_output=True, text=True, check=True)
    read, answer = (float(row["avg_ts"]) for row in json.loads(done.stdout))
    return read, answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(default: all processors)")
    parser.add_argument("--busy", type=int, nargs="*", default=[0, 1, 2], help="busy programs (default: 0 1 2)")
    parser.add_argument("--cache", default="pqo3")
    parser.add_argument("--other", action="append", default=[], metavar="NAME=COMMAND", help="another llama-bench")
    parser.add_argument("--output", default=str(RESULTS), help="file for the results, or - (default: %(default)s)")
    args = parser.parse_args()
    model, facts = real_sources.model_path("smollm2"), machine.facts()
    commands = {OURS: [str(program("llama-bench"))]}
    commands |= {name: words.split() for name, words in (each.split("=", 1) for each in args.other)}
    kinds = [(OURS, 1), *((name, args.threads) for name in commands)]
    found: dict[tuple[int, str, int], list[tuple[float, float]]] = {}
    for _ in range(args.rounds):
        for n in args.busy:
            for name, threads in kinds:
                with busy(n):
                    once = speeds(commands[name], model, threads, args.cache)
                found.setdefault((n, name, threads), []).append(once)
    rows = [row(n, name, threads, rounds, found[n, OURS, 1]) for (n, name, threads), rounds in found.items()]
    machine.save({"command": " ".join(sys.argv), "machine": facts, "cache": args.cache, "rows": rows}, args.output)
    show(rows)


def row(
    n: int, name: str, threads: int, rounds: list[tuple[float, float]], alone: list[tuple[float, float]]
) -> dict[str, Any]:
    """Medians of one program, and of its ratios to one thread."""
    entry: dict[str, Any] = {"busy": n, "program": name, "threads": threads}
    for i, test in enumerate(("read", "answer")):
        entry[test] = round(statistics.median(each[i] for each in rounds), 1)
        ratios = (each[i] / one[i] for each, one in zip(rounds, alone, strict=True))
        entry[f"{test}_of_one_thread"] = round(statistics.median(ratios), 2)
        entry[f"{test}_rounds"] = [round(each[i], 1) for each in rounds]
    return entry


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    table = Table("busy programs", "program", "threads", "read, tokens/s", "of 1 thread", "answer", "of 1 thread")
    for each in rows:
        cells = (each[key] for key in ("read", "read_of_one_thread", "answer", "answer_of_one_thread"))
        table.add_row(str(each["busy"]), each["program"], str(each["threads"]), *map(str, cells))
    Console().print(table)


if __name__ == "__main__":
    main()
