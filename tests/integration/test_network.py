"""Nothing here reaches for the network: what a process or its libraries connect to or look up is noted and refused."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tqgguf.demo import model as demo

pytestmark = pytest.mark.model

MODEL = str(demo.MODEL_PATH)
LLAMA = f"""
import tqgguf, llama_cpp
model = tqgguf.Llama({MODEL!r}, n_ctx=256, n_threads=1, verbose=False)
print(model.create_chat_completion([{{"role": "user", "content": "What is the capital of Peru?"}}], temperature=0))
model.save_session("s"); model.load_session("s")
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and Linux's LD_PRELOAD")
    path = tmp_path_factory.mktemp("shim") / "no_network.so"
    source = Path(__file__).with_name("no_network.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(path), str(source), "-ldl"], check=True)
    return path


@pytest.fixture
def env(shim: Path, tmp_path: Path) -> dict[str, str]:
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("LD_PRELOAD is taken")
    return {"LD_PRELOAD": str(shim), "TQGGUF_NETWORK_LOG": str(tmp_path / "attempts")}


def attempts(env: dict[str, str]) -> str:
    path = Path(env["TQGGUF_NETWORK_LOG"])
    return path.read_text() if path.exists() else ""


def test_attempts_are_noted_and_refused(python: Callable[..., Any], env: dict[str, str]) -> None:
    code = "import socket, sys\ntry: {}\nexcept OSError: print('refused')"
    udp = "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'', ('192.0.2.3', 9))"
    for call in ("socket.create_connection(('192.0.2.1', 80))", "socket.getaddrinfo('tqgguf.invalid', 80)", udp):
        assert python("-c", code.format(call), env=env).stdout == "refused\n"
    noted = attempts(env).splitlines()
    assert {"getaddrinfo tqgguf.invalid", "sendto 192.0.2.3"} <= {*noted}
    assert "192.0.2.1" in noted[0]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("-c", LLAMA), "Lima"),
        (("-m", "tqgguf", "run", MODEL, "-p", "What is the capital of Peru?", "--threads", "1"), "Lima"),
        (("-m", "tqgguf", "chat", MODEL, "--threads", "1"), "Paris"),
        (("-m", "tqgguf", "fit", MODEL, "--memory", "1G"), "pqo3"),
        (("-m", "tqgguf", "inspect", MODEL, "-f", "text.txt", "--html", "page.html"), "pqo3"),
        (("-m", "tqgguf", "compare", MODEL, "-f", "text.txt", "--ctx", "128", "--cache", "f16,pqo3"), "pqo3"),
        (("-m", "tqgguf", "doctor"), "llama_cpp"),
    ],
    ids=lambda value: value[2] if value[1] == "tqgguf" else None,
)
def test_a_command_reaches_for_no_network(
    python: Callable[..., Any], env: dict[str, str], tmp_path: Path, args: tuple[str, ...], said: str
) -> None:
    (tmp_path / "text.txt").write_text(demo.recall_prompt(1, 45).prompt)
    done = python(*args, env=env, stdin="What is the capital of France?\n")
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert attempts(env) == ""
    page = tmp_path / "page.html"
    if page.exists():  # nor does a browser that shows it
        assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(https?:)?//", page.read_text())


def test_a_server_reaches_for_no_network(env: dict[str, str], tmp_path: Path) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed: pip install -r requirements-dev.txt")
    with subprocess.Popen(
        [sys.executable, "-m", "tqgguf", "serve", MODEL, "--port", "0", "--threads", "1"],
        env={**os.environ, **env},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stderr
        try:
            while not (match := re.search(r"listening on (\S+) ", line := server.stderr.readline())):
                assert line
            client = openai.OpenAI(base_url=match[1], api_key="none", max_retries=0)
            reply = client.completions.create(model="demo", prompt="The capital of Peru is", temperature=0)
            assert "Lima" in reply.choices[0].text
        finally:
            server.terminate()
            server.communicate(timeout=20)
    assert attempts(env) == ""
