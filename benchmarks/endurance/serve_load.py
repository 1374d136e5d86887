"""Loads `tqgguf serve` with many clients at once: is every request answered, the same as alone, in the same memory?

    python benchmarks/endurance/serve_load.py       # 10,000 requests of 32 clients; saves results/serve_load.json

The demo model is asked questions of mixed length, every second time as a stream, and goes on with texts. A fifth of the
clients go away after the first part of their answer. Every other answer is compared with the one to a single client of
a server with one slot, token by token. Where tokens of several clients are computed in one batch, llama.cpp adds in
another order than for one token alone, so that a choice between two tokens that are as good as equally likely can fall
out otherwise: such answers are counted apart, if the first token that differs was at most `--close` less likely. With
--reuse a slot keeps what a request has in common with the one before. The newest of these tokens may have lost their
rows of the tail to the tokens that came behind them, so that more answers differ.

Needs openai.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

sys.path.append(str(Path(__file__).parents[1] / "common"))

import machine
import numpy as np
from server_process import ServerProcess

from tqgguf.demo import model as demo

COUNTRIES: Final = ("France", "Peru", "Spain", "Japan", "Kenya", "Italy", "Norway", "Chile", "Egypt", "Greece")
RESULTS: Final = Path(__file__).parents[1] / "results" / "serve_load.json"


def prompts() -> list[tuple[str, int]]:
    """Texts to go on with, and tokens of the answer."""
    short = [(f"The capital of {country} is", 8) for country in COUNTRIES]
    return short + [(demo.recall_prompt(seed, 4 + 3 * seed).prompt, 6 + 6 * seed) for seed in range(10)]


Answer = tuple[list[str], list[dict[str, float]]]
"""Tokens, and the most likely tokens in the place of each, with their log-probability."""


def ask(client: Any, prompt: str, n: int, *, stream: bool = False, leave: bool = False, reuse: bool = False) -> Answer:
    """The answer to a prompt; nothing if the client leaves after its first part."""
    reply = client.completions.create(
        model="demo",
        prompt=prompt,
        max_tokens=n,
        temperature=0,
        logprobs=5,
        stream=stream or leave,
        extra_body={"ignore_eos": True, "cache_prompt": reuse},
    )
    parts = []
    if leave:
        with reply:
            for _ in reply:
                return [], []
    parts = list(reply) if stream else [reply]
    found = [part.choices[0].logprobs.model_extra["content"] for part in parts if part.choices[0].logprobs]
    tokens = [token for content in found for token in content]
    top = [{each["token"]: each["logprob"] for each in token["top_logprobs"]} for token in tokens]
    return [token["token"] for token in tokens], top


class Load:
    """Answers of one server, compared with those of another."""

    def __init__(self, server: ServerProcess, wanted: list[Answer], close: float, reuse: bool) -> None:
        self.server, self.wanted, self.close, self.reuse = server, wanted, close, reuse
        self.lock = threading.Lock()
        self.samples: list[tuple[int, int]] = []  # requests answered, bytes
        self.seconds: list[float] = []
        self.left = self.near = self.n_tokens = 0
        self.wrong: list[str] = []

    def work(self, todo: Any, texts: list[tuple[str, int]]) -> None:
        client = self.server.client()
        while True:
            with self.lock:
                job = next(todo, None)
            if job is None:
                return
            drawn = random.Random(job)
            which, leave = drawn.randrange(len(texts)), drawn.random() < 0.2
            start = time.perf_counter()
            try:
                tokens, _ = ask(client, *texts[which], stream=job % 2 == 1, leave=leave, reuse=self.reuse)
                said = "" if leave else self._compare(which, tokens)
            except Exception as error:
                said = repr(error)
            with self.lock:
                self.seconds.append(time.perf_counter() - start)
                self.left += leave
                self.n_tokens += 0 if leave else len(tokens)
                if said:
                    self.wrong.append(said)
                if len(self.seconds) % 100 == 0:
                    self.samples.append((len(self.seconds), self.server.resident_bytes()))

    def _compare(self, which: int, tokens: list[str]) -> str:
        """Why an answer is wrong; "" if it is not."""
        wanted, top = self.wanted[which]
        if tokens == wanted:
            return ""
        i = next((i for i, pair in enumerate(zip(tokens, wanted, strict=False)) if pair[0] != pair[1]), -1)
        if i >= 0 and tokens[i] in top[i] and top[i][wanted[i]] - top[i][tokens[i]] <= self.close:
            with self.lock:
                self.near += 1
            return ""
        return f"token {i} of text {which}: {tokens[i]!r} instead of {top[i]}"

    def slope(self) -> float:
        """Growth of memory after the first fifth, in MiB per 1,000 requests."""
        later = self.samples[len(self.samples) // 5 :]
        n, rss = np.array(later, np.float64).T
        return float(np.polyfit(n, rss, 1)[0]) * 1000 / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10000, metavar="N", help="in all (default: 10000)")
    parser.add_argument("--clients", type=int, default=32, metavar="N", help="at once (default: 32)")
    parser.add_argument("--parallel", type=int, default=8, metavar="N", help="conversations at once (default: 8)")
    parser.add_argument("--cache", default="pqo3", metavar="TYPE", help="cache of the server (default: pqo3)")
    parser.add_argument("--close", type=float, default=0.02, metavar="X", help="in log-probability (default: 0.02)")
    parser.add_argument("--reuse", action="store_true", help="tokens that a slot still has are not computed again")
    parser.add_argument("--output", default=str(RESULTS), help="JSON file, - for stdout (default: %(default)s)")
    args = parser.parse_args()
    facts, texts = machine.facts(), prompts()
    options = (demo.MODEL_PATH, "--threads", "1", "--cache", args.cache, "--ctx", "1024")
    with ServerProcess(*options, "--parallel", "1") as server:
        client = server.client()
        wanted = [ask(client, *text) for text in texts]
    # Without the cache of prompts in main memory, which grows up to its limit.
    with ServerProcess(*options, "--parallel", str(args.parallel), "--", "--cache-ram", "0") as server:
        load = Load(server, wanted, args.close, args.reuse)
        todo, start = iter(range(args.requests)), time.perf_counter()
        threads = [threading.Thread(target=load.work, args=(todo, texts)) for _ in range(args.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        total = time.perf_counter() - start
    load.seconds.sort()
    n = len(load.seconds)
    result = {
        "machine": facts,
        "cache": args.cache,
        "requests": args.requests,
        "clients": args.clients,
        "parallel": args.parallel,
        "reuse": args.reuse,
        "answered": n,
        "left": load.left,
        "otherwise_by_a_near_tie": load.near,
        "wrong": len(load.wrong),
        "requests_per_second": round(n / total, 1),
        "tokens_per_second": round(load.n_tokens / total, 1),
        "median_seconds": round(load.seconds[n // 2], 4),
        "slowest_seconds": round(load.seconds[-1], 3),
        "mib_after_a_fifth": round(load.samples[len(load.samples) // 5][1] / 2**20, 2) if load.samples else None,
        "mib_at_the_end": round(load.samples[-1][1] / 2**20, 2) if load.samples else None,
        "slope_mib_per_1000_requests": round(load.slope(), 4) if len(load.samples) > 4 else None,
    }
    machine.save(result, args.output)
    for said in load.wrong[:5]:
        print(f"wrong: {said}", file=sys.stderr)
    return 1 if load.wrong or n < args.requests else 0


if __name__ == "__main__":
    sys.exit(main())
