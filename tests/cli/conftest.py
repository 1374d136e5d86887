"""Commands run to their end, a terminal for those that talk to one, and a server."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

PATIENCE = 30.0


class Terminal:
    """A command on a pseudo-terminal of its own: what it writes, and what is typed."""

    def __init__(self, args: list[str], folder: Path, env: dict[str, str]) -> None:
        self.output = ""
        self.at = 0
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execve(sys.executable, [sys.executable, *args], {**os.environ, "TERM": "xterm", "COLUMNS": "100", **env})

    def expect(self, pattern: str) -> re.Match[str]:
        """Waits until what it wrote since the last match matches."""
        end = time.monotonic() + PATIENCE
        while not (match := re.compile(pattern, re.DOTALL).search(self.output, self.at)):
            if time.monotonic() > end or not self._read(end):
                raise AssertionError(f"{pattern!r} did not come; since the last match came {self.output[self.at :]!r}")
        self.at = match.end()
        return match

    def type(self, text: str) -> None:
        """Types; "\\x03" is Ctrl-C, "\\x04" Ctrl-D.

        Not as soon as a prompt is seen: Python loses a signal that comes between readline's prompt and its waiting.
        """
        time.sleep(0.05)
        os.write(self.fd, text.encode())

    def end(self) -> int:
        """Waits for its end; returns the exit status."""
        end = time.monotonic() + PATIENCE
        while self._read(end):
            pass
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        """Ends it if it has not ended."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)

    def _read(self, end: float) -> bool:
        if select.select([self.fd], [], [], max(0, end - time.monotonic()))[0]:
            try:
                data = os.read(self.fd, 65536)
            except OSError:  # Linux says so when the other side is closed
                return False
            self.output += data.decode("utf-8", "replace")
            return bool(data)
        return False


@pytest.fixture
def tqgguf(python: Callable[..., Any]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `tqgguf` with arguments, in an empty folder."""
    return lambda *args, **options: python("-m", "tqgguf", *args, **options)


@pytest.fixture
def computing() -> Callable[[subprocess.Popen[Any], str], None]:
    """Waits until a command has mapped its model and computes; before that, Ctrl-C meets Python's own handler."""

    def wait(process: subprocess.Popen[Any], model: str) -> None:
        end = time.monotonic() + PATIENCE
        while model not in Path(f"/proc/{process.pid}/maps").read_text():
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.01)
        time.sleep(1)

    return wait


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Starts `tqgguf` with arguments, or Python with -c, on a terminal."""
    opened: list[Terminal] = []

    def start(*args: str, **env: str) -> Terminal:
        opened.append(Terminal([*(() if args[0] == "-c" else ("-m", "tqgguf")), *args], tmp_path, env))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


@pytest.fixture(scope="session")
def endless(random_model: Callable[..., Path]) -> tuple[str, ...]:
    """Options for a model that talks noise until its long context is full, and reads slowly."""
    path = random_model(n_layer=12, n_head=16, n_head_kv=8, head_dim=128, n_ctx=65536, n_word=64)
    return (str(path), "--ctx", "65536", "--threads", "1", "--temp", "0")


class Server:
    """`tqgguf serve` in a process of its own, or another program of its arguments."""

    started: ClassVar[list[Server]] = []

    def __init__(self, *args: str, program: tuple[str, str] = ("-m", "tqgguf")) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *program, "serve", *args, "--port", "0"], stderr=subprocess.PIPE, text=True
        )
        self.started.append(self)
        assert self.process.stderr
        self.said = ""
        while not (match := re.search(r"listening on (http://\S+/v1) ", self.said)):
            line = self.process.stderr.readline()
            assert line, self.said
            self.said += line
        self.url = match[1]

    def client(self) -> Any:
        import openai

        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=60)

    def get(self, path: str, **headers: str) -> tuple[str, str]:
        request = urllib.request.Request(self.url.removesuffix("/v1") + path, headers=headers)
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.headers["content-type"], response.read().decode()

    def figures(self) -> dict[str, Any]:
        return json.loads(self.get("/cache")[1])

    def end(self, number: int = signal.SIGTERM) -> tuple[float, str]:
        """Seconds it took to end, and all that it said after it began to listen."""
        start = time.monotonic()
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=20)
        return time.monotonic() - start, errors


@pytest.fixture(scope="session")
def serve() -> Iterator[type[Server]]:
    """Starts `tqgguf serve` with arguments; the caller ends it, or after the last test it is killed."""
    for name in ("fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings", "openai"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install -r requirements-dev.txt")
    yield Server
    for server in Server.started:
        server.process.kill()
