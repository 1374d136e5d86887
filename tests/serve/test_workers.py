"""`tqgguf serve` over two workers, with clients side by side: a worker that dies, comes back, or hangs."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import urllib.error
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from patience import SOON

from tqgguf._native import library_path
from tqgguf.demo import model as demo

if not library_path("ggml-rpc").exists():
    pytest.skip("this build has no RPC", allow_module_level=True)

pytestmark = pytest.mark.model

MODEL = str(demo.MODEL_PATH)
CAPITALS = {"France": "Paris", "Peru": "Lima", "Spain": "Madrid", "Japan": "Tokyo"}
ENDLESS = {"prompt": "So", "n_predict": 1900, "ignore_eos": True}


def ask(server: Any, country: str) -> str:
    body = {"prompt": f"The capital of {country} is", "n_predict": 3, "temperature": 0}
    return str(server.post("/completion", body)["content"])


def test_a_worker_that_dies_and_comes_back(serve: Callable[..., Any], worker: Callable[..., Any]) -> None:
    pair = [worker(), worker()]
    server = serve(MODEL, "--threads", "1", "--ctx", "2048", "--rpc", f"{pair[0].name},{pair[1].name}")
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda country: ask(server, country), CAPITALS))
    assert all(capital in answer for capital, answer in zip(CAPITALS.values(), answers, strict=True)), answers

    outcome: list[Any] = []

    def talk() -> None:
        try:
            outcome.append(server.post("/completion", ENDLESS))
        except urllib.error.HTTPError as error:
            outcome.append((error.code, error.read().decode()))
        except OSError as error:
            outcome.append(error)

    asking = [threading.Thread(target=talk) for _ in range(4)]
    for thread in asking:
        thread.start()
    time.sleep(1)
    pair[1].kill()
    for thread in asking:
        thread.join(30)
    assert len(outcome) == 4 and all(found[0] == 500 and "Compute error" in found[1] for found in outcome), outcome
    line = server.said_until("is lost, and with it a part of the model")
    assert f"worker {pair[1].name} is lost" in line and "starts again when it is back" in line

    worker(port=pair[1].port)
    server.said_until("listening on")
    assert ask(server, "France") == answers[0]
    server.end()
    assert server.process.returncode == 0


def test_it_ends_though_its_worker_is_gone(serve: Callable[..., Any], worker: Callable[..., Any]) -> None:
    """While it waits for the worker."""
    mortal = worker()
    server = serve(MODEL, "--threads", "1", "--rpc", mortal.name)
    mortal.kill()
    with pytest.raises(urllib.error.HTTPError, match="500"):
        ask(server, "France")
    time.sleep(2)
    start = time.monotonic()
    server.end()
    assert server.process.returncode == 0 and time.monotonic() - start < SOON


def test_it_ends_though_its_worker_hangs(serve: Callable[..., Any], worker: Callable[..., Any]) -> None:
    each = worker()
    server = serve(MODEL, "--threads", "1", "--rpc", each.name)
    child = server.child

    def talk() -> None:
        with contextlib.suppress(OSError, ValueError):  # what becomes of the answer is another test's matter
            server.post("/completion", ENDLESS)

    threading.Thread(target=talk, daemon=True).start()
    time.sleep(1)
    os.kill(each.process.pid, signal.SIGSTOP)
    try:
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(30)  # without the end that its starter makes it would wait for ever
    finally:
        os.kill(each.process.pid, signal.SIGCONT)
    assert not os.path.exists(f"/proc/{child}")
