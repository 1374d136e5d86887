"""Loads one `tqgguf.Llama` for long: does its memory stay flat, and does it answer the same to the end?

    python benchmarks/endurance/soak.py --minutes 30       # make soak; saves results/soak.json

In an order drawn from --seed come: short questions whole and as streams; a long question; a text that is gone on with
for longer than the context, which is shifted each time it is full; a session that is loaded, gone on with and saved
over another; a prompt that does not fit; a stream that is left; and, more seldom, an abort from another thread of
whatever is being computed (`Llama.stop`). Every answer is compared with the first one to the same request. The exit
status is 1 if one differs, if a kind never came to its end, if more requests were stopped than aborts explain, or if
memory grows by --max-slope MiB or more per 1,000 requests, by a line fitted to all but the first tenth of the time:
memory that is no file's, for pages of files go when the system needs room. The server is loaded by serve_load.py.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

sys.path.append(str(Path(__file__).parents[1] / "common"))

import machine
import numpy as np

import tqgguf
from tqgguf.demo import model as demo
from tqgguf.errors import ArgumentError, StoppedError

RESULTS: Final = Path(__file__).parents[1] / "results" / "soak.json"
N_CTX: Final = 512
KEPT: Final = 4
"""Tokens at the beginning that a shift keeps."""
COUNTRIES: Final = ("France", "Peru", "Spain", "Japan", "Kenya", "Italy", "Norway", "Chile", "Egypt", "Greece")
MIX: Final = {"whole": 8, "stream": 8, "long": 2, "story": 1, "session": 2, "too long": 1, "leave": 2, "abort": 0.2}
"""Kinds of requests, and how many of each come on average in so many."""


# ---- Requests ----


def story(model: Any, seed: int, n_tokens: int) -> str:
    """Reads a prompt that nearly fills the context and goes on for n_tokens, shifting the context when it is full."""
    model.reset()
    model.eval(model.tokenize(demo.recall_prompt(seed, 65).prompt.encode()))
    return go_on(model, n_tokens)


def go_on(model: Any, n_tokens: int) -> str:
    """The next tokens at temperature 0, also past the end of the text."""
    from llama_cpp import llama_get_logits_ith  # Llama.sample would take the sampler of the last request

    tokens: list[int] = []
    for _ in range(n_tokens):
        if model.n_tokens == model.n_ctx():
            shift(model)
        logits = llama_get_logits_ith(model.ctx, -1)
        tokens.append(int(np.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax()))
        model.eval(tokens[-1:])
    return str(model.detokenize(tokens).decode("utf-8", "replace"))


def shift(model: Any) -> None:
    """Forgets half of what lies behind the first tokens, as llama.cpp's own programs do when a context is full."""
    n, dropped = model.n_tokens, (model.n_tokens - KEPT) // 2
    assert model._ctx.kv_cache_seq_rm(0, KEPT, KEPT + dropped)
    model._ctx.kv_cache_seq_shift(0, KEPT + dropped, -1, -dropped)
    model.input_ids[KEPT : n - dropped] = model.input_ids[KEPT + dropped : n].copy()
    model.n_tokens = n - dropped


def resume(model: Any, folder: Path, seed: int) -> str:
    """Loads a session, goes on, and saves the result over the one before."""
    path = folder / f"{seed}.session"
    tokens = model.tokenize(demo.recall_prompt(seed, 40).prompt.encode())
    if not path.exists():
        model.reset()
        model.eval(tokens[:-1])
        model.save_session(path)
    assert model.load_session(path).n_tokens == len(tokens) - 1
    model.eval(tokens[-1:])  # a session holds no logits
    text = go_on(model, 40)
    model.save_session(folder / "last.session", {"text": text})
    assert model.load_session(folder / "last.session").extra["text"] == text
    return text


def chat(model: Any, text: str, stream: bool = False) -> str:
    """The answer to one message at temperature 0, in one piece or in parts."""
    reply = model.create_chat_completion([{"role": "user", "content": text}], temperature=0, stream=stream)
    if not stream:
        return str(reply["choices"][0]["message"]["content"])
    return "".join(part["choices"][0]["delta"].get("content", "") for part in reply)


def leave(model: Any, n_parts: int) -> str:
    """The first parts of an answer of 200 tokens that nobody waits for."""
    stream = model.create_completion("The", max_tokens=200, temperature=0, stream=True)
    parts = [part["choices"][0]["text"] for part, _ in zip(stream, range(n_parts), strict=False)]
    stream.close()
    return "".join(parts)


def answer(model: Any, folder: Path, kind: str, which: int) -> str:
    """What comes of a request; of one that must be refused, the error."""
    if kind == "story":
        return story(model, which % 3, 300)
    if kind == "session":
        return resume(model, folder, which % 3)
    if kind == "leave":
        return leave(model, 5 + which)
    if kind == "too long":
        try:
            return chat(model, "word " * (N_CTX + which))
        except (ArgumentError, ValueError) as error:
            return str(error)
    text = demo.recall_prompt(which, 50).prompt if kind == "long" else f"What is the capital of {COUNTRIES[which]}?"
    return chat(model, text, stream=kind == "stream")


# ---- The soak ----


class Soak:
    """What was answered, and the memory that it took meanwhile."""

    def __init__(self, model: Any, folder: Path, seed: int, leak: int) -> None:
        self.model, self.folder, self.drawn, self.leak = model, folder, random.Random(seed), leak
        self.kept: list[bytes] = []
        self.first: dict[tuple[str, int], str] = {}
        self.done: Counter[str] = Counter()
        self.stopped = 0
        self.wrong: list[str] = []
        self.samples: list[tuple[float, int, int]] = []  # seconds, requests, bytes

    def run(self, seconds: float) -> None:
        start, turn = time.monotonic(), [*MIX]  # every kind comes, however short the soak is
        while (now := time.monotonic() - start) < seconds and len(self.wrong) < 100:
            kind = turn.pop() if turn else self.drawn.choices([*MIX], [*MIX.values()])[0]
            self._request(kind, self.drawn.randrange(len(COUNTRIES)))
            if not self.samples or now - self.samples[-1][0] >= min(1.0, seconds / 100):
                self.samples.append((now, self.done.total(), own_bytes()))

    def _request(self, kind: str, which: int) -> None:
        if kind == "abort":
            self._abort(which)
            return
        said = answer(self.model, self.folder, kind, which)
        self.kept += [os.urandom(self.leak)] * (kind in ("story", "session"))
        self.done[kind] += 1
        # a question has one answer, in one piece or in parts
        first = self.first.setdefault(("whole" if kind == "stream" else kind, which), said)
        if said != first or not said:
            self.wrong.append(f"{kind} {which}: {said!r}, at first {first!r}")

    def _abort(self, which: int) -> None:
        """Stops a story from another thread, after a moment."""
        timer = threading.Timer(0.002 * (1 + which), self.model.stop)
        timer.start()
        try:
            story(self.model, which % 3, 300)
        except StoppedError:
            self.stopped += 1
        timer.join()
        self.model.resume()
        self.done["abort"] += 1


def own_bytes() -> int:
    """Memory of this process that is no file's (Linux)."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def growth(samples: list[tuple[int, int]]) -> float:
    """The slope of a line through (requests, bytes), in MiB per 1,000 requests."""
    n, rss = np.array(samples, np.float64).T
    return float(np.polyfit(n, rss, 1)[0]) * 1000 / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, metavar="M", help="how long (default: 30)")
    parser.add_argument("--cache", default="pqo3", metavar="TYPE", help="cache of the model (default: pqo3)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the order of requests (default: 0)")
    parser.add_argument("--max-slope", type=float, default=1.0, metavar="MIB", help="per 1,000 requests (default: 1)")
    parser.add_argument("--output", default=str(RESULTS), help="JSON file, - for stdout (default: %(default)s)")
    parser.add_argument("--leak", type=int, default=0, metavar="BYTES", help="leaks, to see that it is noticed")
    args = parser.parse_args()
    facts = machine.facts()
    options = {"n_ctx": N_CTX, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    model = tqgguf.Llama(demo.MODEL_PATH, cache=args.cache, **options)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(model, Path(folder), args.seed, args.leak)
        soak.run(args.minutes * 60)
    model.close()
    last = soak.samples[-1]
    slope = growth([(n, rss) for seconds, n, rss in soak.samples if seconds > last[0] / 10])
    failures = [f"{len(soak.wrong)} answers differ, such as {text}" for text in soak.wrong[:1]]
    failures += [f"no request of the kind {kind!r} came to its end" for kind in MIX if not soak.done[kind]]
    if slope >= args.max_slope:
        failures.append(f"memory grows by {slope:.2f} MiB per 1,000 requests, allowed is less than {args.max_slope}")
    result = {
        "machine": facts,
        "cache": args.cache,
        "seed": args.seed,
        "minutes": round(last[0] / 60, 2),
        "requests": dict(soak.done),
        "requests_in_all": soak.done.total(),
        "wrong": len(soak.wrong),
        "stopped_by_aborts": soak.stopped,
        "slope_mib_per_1000_requests": round(slope, 4),
        "failures": failures,
        "samples": [
            {"minutes": round(seconds / 60, 2), "requests": n, "mib": round(rss / 2**20, 2)}
            for seconds, n, rss in soak.samples[:: max(1, len(soak.samples) // 60)]
        ],
    }
    machine.save(result, args.output)
    print(*failures, sep="\n", end="\n" if failures else "", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
