"""Commands run to their end, and a terminal for those that talk to one."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
