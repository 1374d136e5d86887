"""`tqgguf serve` in a process of its own, and a browser."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tqgguf.demo import model as demo

MODEL = str(demo.MODEL_PATH)


class Served:
    """`tqgguf serve` with arguments: what it said until it listened, and its address."""

    def __init__(self, *args: str) -> None:
        command = [sys.executable, "-m", "tqgguf", "serve", *args]
        self.process = subprocess.Popen([*command[:5], "--port", "0", *command[5:]], stderr=subprocess.PIPE, text=True)
        assert self.process.stderr
        self.said = ""
        while not (match := re.search(r"listening on (http://\S+)/v1 ", self.said)):
            line = self.process.stderr.readline()
            assert line, self.said
            self.said += line
        self.url = match[1]

    @property
    def child(self) -> int:
        """The process of llama-server."""
        task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int(task.read_text().split()[0])

    def client(self, key: str = "none") -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def get(self, path: str, **headers: str) -> str:
        request = urllib.request.Request(self.url + path, headers=headers)
        with urllib.request.urlopen(request, timeout=10) as response:
            return str(response.read().decode())

    def post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.load(response)

    def cache(self) -> dict[str, Any]:
        return dict(json.loads(self.get("/props"))["kv_cache"])

    def said_until(self, text: str) -> str:
        """Waits for a line that has a text in it."""
        assert self.process.stderr
        for line in self.process.stderr:
            if text in line:
                return line
        raise AssertionError(f"it has ended without saying {text!r}")

    def end(self, number: int = signal.SIGTERM) -> str:
        """Ends it; returns what it said after it began to listen."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=30)[1]


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., Served]]:
    """Starts `tqgguf serve` with arguments; what is not ended is killed after the module."""
    started: list[Served] = []

    def start(*args: str) -> Served:
        started.append(Served(*args))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
        server.process.communicate()


@pytest.fixture(scope="module")
def server(serve: Callable[..., Served]) -> Iterator[Served]:
    """The demo model, four conversations at once."""
    server = serve(MODEL, "--threads", "1", "--ctx", "1024")
    yield server
    said = server.end()
    assert server.process.returncode == 0 and "Traceback" not in said


@pytest.fixture(scope="session")
def endless(random_model: Callable[..., Path]) -> str:
    """A model that talks noise until its long context is full, and reads slowly."""
    return str(random_model(n_layer=12, n_head=16, n_head_kv=8, head_dim=128, n_ctx=65536, n_word=64))
