"""Loads `tqgguf serve` with several clients at once: is every request answered, and does its memory stay flat?

    python benchmarks/endurance/serve_load.py --requests 1000 --clients 4      # saves results/serve_load.json

The demo model is asked for capitals, every second time as a stream, and every answer is compared with the one it gives
when nobody else asks. Needs the packages of `tqgguf[server]`, and openai. For hours of mixed requests: soak.py.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "common"))

import machine
from server_process import ServerProcess, chat

from tqgguf.demo import model as demo

COUNTRIES = ("France", "Peru", "Spain", "Japan", "Kenya", "Italy", "Norway", "Chile", "Egypt", "Greece")
RESULTS = Path(__file__).parents[1] / "results" / "serve_load.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000, metavar="N", help="in all (default: 1000)")
    parser.add_argument("--clients", type=int, default=4, metavar="N", help="at once (default: 4)")
    parser.add_argument("--cache", default="pqo3", metavar="TYPE", help="cache of the server (default: pqo3)")
    parser.add_argument("--output", default=str(RESULTS), help="JSON file, - for stdout (default: %(default)s)")
    args = parser.parse_args()
    facts = machine.facts()
    seconds: list[float] = []
    wrong: list[str] = []
    memory: list[int] = []
    lock = threading.Lock()
    todo = iter(range(args.requests))
    options = ("--port", "0", "--threads", "1", "--cache", args.cache)
    with ServerProcess("-m", "tqgguf", "serve", demo.MODEL_PATH, *options) as server:

        def ask(country: str, stream: bool) -> str:
            return chat(client, f"What is the capital of {country}?", stream=stream)[0]

        client = server.client()
        alone = {country: ask(country, False) for country in COUNTRIES}

        def work() -> None:
            while True:
                with lock:
                    i = next(todo, None)
                if i is None:
                    return
                country = COUNTRIES[i * 7 % len(COUNTRIES)]
                start = time.perf_counter()
                try:
                    answer = ask(country, stream=i % 2 == 1)
                except Exception as error:
                    answer = repr(error)
                with lock:
                    seconds.append(time.perf_counter() - start)
                    memory.append(server.resident_bytes())
                    if answer.strip() != alone[country].strip():
                        wrong.append(answer)

        start = time.perf_counter()
        threads = [threading.Thread(target=work) for _ in range(args.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        total = time.perf_counter() - start
    seconds.sort()
    result = {
        "machine": facts,
        "cache": args.cache,
        "requests": args.requests,
        "clients": args.clients,
        "answered": len(seconds),
        "wrong": len(wrong),
        "requests_per_second": round(len(seconds) / total, 1),
        "seconds_median": round(seconds[len(seconds) // 2], 4),
        "seconds_worst": round(seconds[-1], 4),
        "rss_after_a_tenth": memory[len(memory) // 10],
        "rss_at_the_half": memory[len(memory) // 2],
        "rss_at_the_end": memory[-1],
    }
    machine.save(result, args.output)
    for answer in wrong[:5]:
        print(f"wrong: {answer!r}", file=sys.stderr)
    return 1 if wrong or len(seconds) < args.requests else 0


if __name__ == "__main__":
    sys.exit(main())
