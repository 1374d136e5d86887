"""Tokens per second of `tqgguf serve` against llama-server started by hand, with one client and with four.

    python benchmarks/speed/serve.py                                # saves results/serve_speed.json
    python benchmarks/speed/serve.py --other old=http://127.0.0.1:9000/v1   # and of another server that runs already

The model is SmolLM2, with a pqo3 cache and two threads. All servers run at once; each round asks one after the other,
so that a drift of the machine hits them alike. A client asks for the continuation of a text of its own, greedily, of
--tokens tokens. Figures are medians of the rounds, ratios those of each round to llama-server by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any, Final

sys.path.append(str(Path(__file__).parents[1] / "common"))

import machine
import real_sources
from rich.console import Console
from rich.table import Table
from server_process import ServerProcess

from tqgguf._native.programs import program

RESULTS: Final = Path(__file__).parents[1] / "results" / "serve_speed.json"
BY_HAND: Final = "llama-server by hand"
TEXTS: Final = (
    "The history of bread begins long before",
    "To repair a bicycle, one should first",
    "In the year 1850 the city had",
    "A river that flows into the sea",
)
N_CTX: Final = 2048


@contextlib.contextmanager
def by_hand(path: Path, parallel: int, threads: int) -> Any:
    """llama-server with the options that a user would give; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = f"-c {N_CTX * parallel} -np {parallel} --no-kv-unified -fa on -ctk pqo3 -ctv pqo3 --cache-tail 128".split()
    words += f"-t {threads} -tb {threads} --port {port}".split()
    command = [str(program("llama-server")), "-m", str(path), *words]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def speed(url: str, n_clients: int, n_tokens: int) -> float:
    """Tokens per second of so many clients together."""
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
    counts = [0] * n_clients

    def ask(i: int) -> None:
        reply = client.completions.create(
            model="model", prompt=TEXTS[i], max_tokens=n_tokens, temperature=0, extra_body={"ignore_eos": True}
        )
        counts[i] = reply.usage.completion_tokens

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(n_clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer (default: 128)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--other", action="append", default=[], metavar="NAME=URL", help="a server that runs already")
    parser.add_argument("--output", default=str(RESULTS), help="file for the results, or - (default: %(default)s)")
    args = parser.parse_args()
    path = real_sources.model_path("smollm2")
    facts, n_parallel = machine.facts(), len(TEXTS)
    options = ("--cache", "pqo3", "--calibration", "off", "--ctx", str(N_CTX), "--parallel", str(n_parallel))
    with (
        by_hand(path, n_parallel, args.threads) as hand,
        ServerProcess(path, *options, "--threads", str(args.threads)) as ours,
    ):
        urls = {BY_HAND: hand, "tqgguf serve": ours.url, **dict(each.split("=", 1) for each in args.other)}
        found: dict[tuple[str, int], list[float]] = {}
        for _ in range(args.rounds + 1):  # the first one warms up
            for n_clients in (1, n_parallel):
                for name, url in urls.items():
                    found.setdefault((name, n_clients), []).append(speed(url, n_clients, args.tokens))
    rows = []
    shown = Table("server", "clients", "tokens/s", "to llama-server by hand")
    for (name, n_clients), values in found.items():
        base = found[BY_HAND, n_clients]
        ratio = statistics.median(a / b for a, b in zip(values[1:], base[1:], strict=True))
        median = statistics.median(values[1:])
        rows.append({"server": name, "clients": n_clients, "tokens_per_s": round(median, 1), "ratio": round(ratio, 3)})
        shown.add_row(name, str(n_clients), f"{median:.1f}", f"{ratio:.2f}")
    Console(stderr=True).print(shown)
    machine.save({"machine": facts, "threads": args.threads, "tokens": args.tokens, "rows": rows}, args.output)


if __name__ == "__main__":
    main()
