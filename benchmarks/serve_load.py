"""Loads `tqgguf serve` with several clients at once: is every request answered, and does its memory stay flat?

    python benchmarks/serve_load.py --requests 1000 --clients 4

The demo model is asked for capitals, every second time as a stream, and every answer is compared with the one it gives
when nobody else asks. Needs the packages of `tqgguf[server]`, and openai.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import openai

from tqgguf import demo

COUNTRIES = ("France", "Peru", "Spain", "Japan", "Kenya", "Italy", "Norway", "Chile", "Egypt", "Greece")


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in use (Linux)."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


def ask(client: openai.OpenAI, country: str, stream: bool) -> str:
    messages: Any = [{"role": "user", "content": f"What is the capital of {country}?"}]
    reply: Any = client.chat.completions.create(model="demo", messages=messages, temperature=0, stream=stream)
    if not stream:
        return str(reply.choices[0].message.content)
    return "".join(chunk.choices[0].delta.content or "" for chunk in reply)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000, metavar="N", help="in all (default: 1000)")
    parser.add_argument("--clients", type=int, default=4, metavar="N", help="at once (default: 4)")
    parser.add_argument("--cache", default="pqo3", metavar="TYPE", help="cache of the server (default: pqo3)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args()
    command = [sys.executable, "-m", "tqgguf", "serve", str(demo.MODEL_PATH), "--port", "0", "--threads", "1"]
    server = subprocess.Popen([*command, "--cache", args.cache], stderr=subprocess.PIPE, text=True)
    assert server.stderr
    try:
        said = ""
        while not (match := re.search(r"listening on (\S+) ", said)):
            said += (line := server.stderr.readline())
            if not line:
                sys.exit(said)

        def new_client() -> openai.OpenAI:
            return openai.OpenAI(base_url=match[1], api_key="none", max_retries=0)

        alone = {country: ask(new_client(), country, False) for country in COUNTRIES}
        seconds: list[float] = []
        wrong: list[str] = []
        memory: list[int] = []
        lock = threading.Lock()
        todo = iter(range(args.requests))

        def work() -> None:
            client = new_client()
            while True:
                with lock:
                    i = next(todo, None)
                if i is None:
                    return
                country = COUNTRIES[i * 7 % len(COUNTRIES)]
                start = time.perf_counter()
                try:
                    answer = ask(client, country, stream=i % 2 == 1)
                except Exception as error:
                    answer = repr(error)
                with lock:
                    seconds.append(time.perf_counter() - start)
                    memory.append(resident_bytes(server.pid))
                    if answer.strip() != alone[country].strip():
                        wrong.append(answer)

        start = time.perf_counter()
        threads = [threading.Thread(target=work) for _ in range(args.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        total = time.perf_counter() - start
    finally:
        server.terminate()
        server.wait()
    seconds.sort()
    result = {
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
    if args.json:
        print(json.dumps(result))
    else:
        print(*(f"{name:20} {value:,}" for name, value in result.items()), sep="\n")
    for answer in wrong[:5]:
        print(f"wrong: {answer!r}", file=sys.stderr)
    return 1 if wrong or len(seconds) < args.requests else 0


if __name__ == "__main__":
    sys.exit(main())
