"""Kills a process (SIGKILL) while it saves sessions, again and again, and checks each time that the file is whole.

    python benchmarks/endurance/session_kill.py --kills 1000      # saves results/session_kill.json

A child, forked once the models are loaded, writes two sessions in turn over the same file, first the one that is not
there. It is killed at a random moment; then the file must load, checksum and all, and be one of the two.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "common"))

import machine

import tqgguf
from tqgguf.demo import model as demo

RESULTS = Path(__file__).parents[1] / "results" / "session_kill.json"
TOKENS = (300, 900)


def load(n_tokens: int) -> Any:
    model = tqgguf.Llama(demo.MODEL_PATH, n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False)
    model.eval([5 + i % 900 for i in range(n_tokens)])
    return model


def save(models: list[Any], path: Path, n_times: float) -> int:
    """Starts a process that saves so many times; its number."""
    if child := os.fork():
        return child
    while n_times > 0:
        models.reverse()
        models[0].save_session(path)
        n_times -= 1
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, metavar="N", help="how often (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (default: 0)")
    parser.add_argument("--output", default=str(RESULTS), help="JSON file, - for stdout (default: %(default)s)")
    args = parser.parse_args()
    facts = machine.facts()
    moments = random.Random(args.seed)
    reader = load(0)
    models = [load(n) for n in TOKENS]
    n_whole = n_cut_short = n_replaced = 0
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "s"
        models[0].save_session(path)
        seconds = []
        for _ in range(11):
            start = time.perf_counter()
            os.waitpid(save(models, path, 2), 0)
            seconds.append(time.perf_counter() - start)
        latest = statistics.median(seconds)
        for _ in range(args.kills):
            child = save(models, path, math.inf)
            time.sleep(moments.uniform(0, latest))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            n_tokens = reader.load_session(path).n_tokens  # raises if anything is wrong with it
            n_whole += n_tokens in TOKENS
            if models[0].n_tokens != n_tokens:
                models.reverse()
                n_replaced += 1
            parts = [part for part in path.parent.iterdir() if part != path]
            n_cut_short += bool(parts)
            for part in parts:
                part.unlink()
    result = {
        "machine": facts,
        "kills": args.kills,
        "whole": n_whole,
        "killed_while_writing": n_cut_short,
        "left_the_new_file": n_replaced,
    }
    machine.save(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
