"""Loads one `tqgguf.Llama` behind a server for long: does its memory stay flat, and does it answer the same to the end?

    python benchmarks/endurance/soak.py --minutes 30       # make soak; saves results/soak.json

Several clients ask, in an order drawn from --seed: short questions whole and as streams; a long question; a text that
is gone on with for longer than the context, which is shifted each time it is full; a session that is loaded, gone on
with and saved over another; a prompt that does not fit; a stream that its client leaves; and, more seldom, an abort of
whatever is being computed (`Llama.stop`). Every answer is compared with the first one to the same request. The exit
status is 1 if one differs, if a kind never came to its end, if more requests were stopped than aborts explain, or if
memory grows by --max-slope MiB or more per 1,000 requests, by a line fitted to all but the first tenth of the time:
resident memory, or the anonymous part of it, without the pages of files that the system takes back when it needs room.

The server is this program again with --serve: the application of `tqgguf serve`, and what no client of OpenAI's
interface can ask for. Needs the packages of `tqgguf[server]`, and openai.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "common"))

import machine
import numpy as np
from server_process import ServerProcess, chat

from tqgguf.demo import model as demo

RESULTS = Path(__file__).parents[1] / "results" / "soak.json"
N_CTX = 512
KEPT = 4
"""Tokens at the beginning that a shift keeps."""
COUNTRIES = ("France", "Peru", "Spain", "Japan", "Kenya", "Italy", "Norway", "Chile", "Egypt", "Greece")
MIX = {"whole": 8, "stream": 8, "long": 2, "story": 1, "session": 2, "too long": 1, "leave": 2, "abort": 0.2}
"""Kinds of requests, and how many of each come on average in so many."""


# ---- The server ----


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


def serve(cache: str, leak: int) -> None:
    """Runs the server until it is terminated; it keeps `leak` bytes of every story and session."""
    import tqgguf
    from tqgguf._util import listen
    from tqgguf.errors import StoppedError
    from tqgguf.serve.app import create_app
    from tqgguf.serve.app import serve as run

    model = tqgguf.Llama(demo.MODEL_PATH, cache=cache, n_ctx=N_CTX, n_threads=1, n_threads_batch=1, verbose=False)
    app = create_app(model, name="demo")
    from fastapi import Response
    from llama_cpp.server.app import get_llama_proxy
    from starlette.concurrency import run_in_threadpool

    kept: list[bytes] = []

    async def alone(compute: Callable[..., str], *args: Any) -> Response:
        """Computes when it is this request's turn."""
        async with contextlib.asynccontextmanager(get_llama_proxy)():
            try:
                text = await run_in_threadpool(compute, model, *args)
            except StoppedError:
                return Response("stopped", 503)
        kept.append(os.urandom(leak))
        return Response(text)

    @app.post("/soak/story")
    async def _(seed: int) -> Response:
        return await alone(story, seed, 300)

    @app.post("/soak/session")
    async def _(seed: int) -> Response:
        return await alone(resume, Path(folder), seed)

    @app.post("/soak/abort")
    async def _() -> Response:
        model.stop()
        await run_in_threadpool(time.sleep, 0.02)
        model.resume()
        return Response()

    with listen("127.0.0.1", 0) as bound, tempfile.TemporaryDirectory() as folder:
        print(f"listening on http://127.0.0.1:{bound.getsockname()[1]}/v1 ", file=sys.stderr, flush=True)
        run(app, model, bound)
    model.close()


# ---- The clients ----


class AbortedError(Exception):
    """An abort ended this request before its answer was whole."""


class Soak:
    """Clients, what they were answered, and the memory that the server took meanwhile."""

    def __init__(self, server: ServerProcess, seed: int) -> None:
        self.server = server
        self.seed = seed
        self.client = server.client()
        self.first: dict[tuple[str, int], str] = {}
        self.done: Counter[str] = Counter()
        self.stopped = 0
        self.wrong: list[str] = []
        self.samples: list[tuple[float, int, int, int]] = []  # seconds, requests, bytes resident, of them anonymous
        self.lock = threading.Lock()
        self.end = 0.0

    def run(self, seconds: float, n_clients: int) -> None:
        start = time.monotonic()
        self.end = start + seconds
        threads = [threading.Thread(target=self._work, args=(i,)) for i in range(n_clients)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            memory = (self.server.resident_bytes(), self.server.resident_bytes("RssAnon"))
            self.samples.append((time.monotonic() - start, self.done.total(), *memory))
            time.sleep(min(1.0, seconds / 100))
        for thread in threads:
            thread.join()

    def slope(self, column: int) -> float:
        """Of resident (2) or anonymous (3) memory, in MiB per 1,000 requests."""
        return growth([(sample[1], sample[column]) for sample in self.samples if sample[0] > self.samples[-1][0] / 10])

    def _work(self, i: int) -> None:
        drawn = random.Random(1000 * self.seed + i)
        turn = [*MIX] if i == 0 else []  # every kind comes, however short the soak is
        while time.monotonic() < self.end and len(self.wrong) < 100:
            kind = turn.pop() if turn else drawn.choices([*MIX], [*MIX.values()])[0]
            which = drawn.randrange(len(COUNTRIES))
            try:
                answer = self._ask(kind, which)
            except AbortedError:
                with self.lock:
                    self.stopped += 1
                time.sleep(0.2)  # longer than an abort lasts: each stops one request of a client at most
                continue
            except Exception as error:
                answer = repr(error)
            with self.lock:
                self.done[kind] += 1
                # a question has one answer, in one piece or in parts
                first = self.first.setdefault(("whole" if kind == "stream" else kind, which), answer)
                if answer != first or not answer:
                    self.wrong.append(f"{kind} {which}: {answer!r}, at first {first!r}")

    def _ask(self, kind: str, which: int) -> str:
        import openai

        if kind in ("story", "session", "abort"):
            reply = self.client._client.post(
                self.server.url.removesuffix("/v1") + f"/soak/{kind}", params={"seed": which % 3}, timeout=600
            )
            if reply.status_code == 503:
                raise AbortedError
            return str(reply.raise_for_status().text) or kind
        question = f"What is the capital of {COUNTRIES[which]}?"
        if kind == "long":
            question = demo.recall_prompt(which, 50).prompt
        elif kind == "too long":
            question = "word " * (N_CTX + which)
        try:
            if kind == "leave":
                return self._leave(5 + which)
            text, is_whole = chat(self.client, question, stream=kind == "stream")
        except openai.BadRequestError as error:
            if kind != "too long":
                raise
            return str(error)
        except openai.InternalServerError as error:
            if "shutting down" not in str(error):
                raise
            raise AbortedError from None
        if not is_whole:
            raise AbortedError
        return text

    def _leave(self, n_parts: int) -> str:
        """The first parts of an answer of 200 tokens, whose client then goes away."""
        with self.client.completions.create(
            model="demo", prompt="The", max_tokens=200, temperature=0, stream=True
        ) as stream:
            parts = [part.choices[0].text for part, _ in zip(stream, range(n_parts), strict=False)]
        if len(parts) < n_parts:
            raise AbortedError
        return "".join(parts)


def growth(samples: list[tuple[int, int]]) -> float:
    """The slope of a line through (requests, resident bytes), in MiB per 1,000 requests."""
    n, rss = np.array(samples, np.float64).T
    return float(np.polyfit(n, rss, 1)[0]) * 1000 / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, metavar="M", help="how long (default: 30)")
    parser.add_argument("--clients", type=int, default=4, metavar="N", help="at once (default: 4)")
    parser.add_argument("--cache", default="pqo3", metavar="TYPE", help="cache of the server (default: pqo3)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the order of requests (default: 0)")
    parser.add_argument("--max-slope", type=float, default=1.0, metavar="MIB", help="per 1,000 requests (default: 1)")
    parser.add_argument("--output", default=str(RESULTS), help="JSON file, - for stdout (default: %(default)s)")
    parser.add_argument(
        "--leak", type=int, default=0, metavar="BYTES", help="the server leaks, to see that it is noticed"
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.cache, args.leak)
        return 0
    facts = machine.facts()
    with ServerProcess(__file__, "--serve", "--cache", args.cache, "--leak", str(args.leak)) as server:
        soak = Soak(server, args.seed)
        soak.run(args.minutes * 60, args.clients)
    slope, slope_anonymous, last = soak.slope(2), soak.slope(3), soak.samples[-1]
    # An abort can stop what every other client waits for, and its own connection never.
    explained = soak.done["abort"] * (args.clients - 1)
    failures = [f"{len(soak.wrong)} answers differ, such as {text}" for text in soak.wrong[:1]]
    failures += [f"no request of the kind {kind!r} came to its end" for kind in MIX if not soak.done[kind]]
    if soak.stopped > explained:
        failures.append(f"{soak.stopped} requests were stopped, aborts explain {explained}")
    if (worst := max(slope, slope_anonymous)) >= args.max_slope:
        failures.append(f"memory grows by {worst:.2f} MiB per 1,000 requests, allowed is less than {args.max_slope}")
    thinned = soak.samples[:: max(1, len(soak.samples) // 60)]
    result = {
        "machine": facts,
        "cache": args.cache,
        "clients": args.clients,
        "seed": args.seed,
        "minutes": round(last[0] / 60, 2),
        "requests": dict(soak.done),
        "requests_in_all": last[1],
        "wrong": len(soak.wrong),
        "stopped_by_aborts": soak.stopped,
        "slope_mib_per_1000_requests": round(slope, 4),
        "slope_of_anonymous_memory": round(slope_anonymous, 4),
        "failures": failures,
        "samples": [
            {
                "minutes": round(s / 60, 2),
                "requests": n,
                "rss_mib": round(r / 2**20, 2),
                "anonymous_mib": round(a / 2**20, 2),
            }
            for s, n, r, a in thinned
        ],
    }
    machine.save(result, args.output)
    print(*failures, sep="\n", end="\n" if failures else "", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
