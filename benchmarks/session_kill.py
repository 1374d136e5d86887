"""Kills a process (SIGKILL) while it saves sessions, again and again, and checks each time that the file is whole.

    python benchmarks/session_kill.py --kills 1000

A child, forked once the models are loaded, writes two sessions in turn over the same file. It is killed at a random
moment; then the file must load, checksum and all, and be one of the two.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tqgguf
from tqgguf import demo

TOKENS = (300, 900)
LATEST = 0.02
"""Seconds within which a child is killed; saving takes it some milliseconds."""


def load(n_tokens: int) -> Any:
    model = tqgguf.Llama(demo.MODEL_PATH, n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False)
    model.eval([5 + i % 900 for i in range(n_tokens)])
    return model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, metavar="N", help="how often (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args()
    moments = random.Random(args.seed)
    reader = load(0)
    models = [load(n) for n in TOKENS]
    found = dict.fromkeys(TOKENS, 0)
    n_cut_short = 0
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "s"
        models[0].save_session(path)
        for _ in range(args.kills):
            if not (child := os.fork()):
                while True:
                    for model in models:
                        model.save_session(path)
            time.sleep(moments.uniform(0, LATEST))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            found[reader.load_session(path).n_tokens] += 1  # raises if anything is wrong with it
            parts = [part for part in path.parent.iterdir() if part != path]
            n_cut_short += bool(parts)
            for part in parts:
                part.unlink()
    result = {"kills": args.kills, "whole": sum(found.values()), "killed_while_writing": n_cut_short}
    print(json.dumps(result) if args.json else f"{result['whole']} whole, {n_cut_short} of them killed while writing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
