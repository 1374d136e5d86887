"""Runs the commands and programs of docs/rpc.md on the demo model and on free ports."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tqgguf._native import library_path
from tqgguf.demo import model as demo

if not library_path("ggml-rpc").exists():
    pytest.skip("this build has no RPC", allow_module_level=True)

pytestmark = pytest.mark.model

PAGE = (Path(__file__).parents[2] / "docs" / "rpc.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line) for line in re.findall(r"^    (tqgguf .*)$", PAGE, re.MULTILINE)]
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
PORTS = ("50052", "50053")


def test_the_page(worker: Callable[..., Any], python: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "model.gguf").symlink_to(demo.MODEL_PATH)
    assert [command[1] for command in COMMANDS] == ["worker", "worker", "worker", "run", "serve"]
    assert COMMANDS[0][2:] == ["--host", "10.0.0.2", "--port", "50052"]  # not this machine's
    assert [command[2:] for command in COMMANDS[1:3]] == [["--port", port] for port in PORTS]
    started = [worker() for _ in PORTS]

    def here(text: str) -> str:
        for port, each in zip(PORTS, started, strict=True):
            assert f"127.0.0.1:{port}" in text
            text = text.replace(f"127.0.0.1:{port}", each.name)
        return text

    run, serve = ([here(part) if "50052" in part else part for part in command[1:]] for command in COMMANDS[3:])
    done = python("-m", "tqgguf", *run, "--temp", "0", "--threads", "1")
    assert "Paris" in done.stdout, done.stderr

    done = python("-c", here(PROGRAMS[0]).replace("n_ctx=2048", "n_ctx=2048, n_threads=1, verbose=False") + PROGRAMS[1])
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [(line[0], line[2]) for line in lines] == [(str(layer), "pqo3") for layer in range(4)], done.stderr
    assert {line[1] for line in lines} == {each.name for each in started}

    command = [sys.executable, "-m", "tqgguf", *serve, "--threads", "1", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        while (line := server.stderr.readline()) and "listening on http" not in line:
            pass
        urllib.request.urlopen(line.split()[2].removesuffix("/v1") + "/props", timeout=20).close()
        server.terminate()
        server.communicate(timeout=20)
    assert server.returncode == 0
