"""The commands and programs of docs/serve.md, and the examples, run as they stand, on the demo model."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tqgguf import demo

pytestmark = pytest.mark.model

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "serve.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    ((?:tqgguf|curl|pip|build/bin).*)$", PAGE, re.MULTILINE)
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.gguf").symlink_to(demo.MODEL_PATH)
    return tmp_path


@pytest.fixture
def served(folder: Path) -> Iterator[str]:
    """The address at which the server of the page answers, on a port that is free."""
    pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install -r requirements-dev.txt")
    pytest.importorskip("openai", reason="openai is not installed: pip install -r requirements-dev.txt")
    command = next(command for command in COMMANDS if command.startswith("tqgguf serve"))
    args = command.replace("--port 8000", "--port 0").replace("--ctx 32768", "--ctx 2048").split()[1:]
    with subprocess.Popen(
        [sys.executable, "-m", "tqgguf", *args], cwd=folder, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stderr
        while "listening" not in (line := server.stderr.readline()):
            assert line
        yield line.split()[2].removesuffix("/v1")
        server.terminate()
        server.communicate(timeout=10)


def test_the_page_has_what_is_tested_here() -> None:
    assert [command.split()[0] for command in COMMANDS] == [
        *("pip", "tqgguf", "curl", "curl", "build/bin/llama-server", "tqgguf")
    ]
    assert len(PROGRAMS) == 2


def test_the_server_and_its_clients(served: str, python: Callable[..., Any]) -> None:
    done = python("-c", PROGRAMS[0].replace(ADDRESS, served))
    assert "Paris" in done.stdout, done.stderr
    done = python(str(REPOSITORY / "examples" / "openai_client.py"), served)
    assert "Rome" in done.stdout and "tokens of pqo3: 9,408 bytes, f16 43,008" in done.stderr, done.stderr
    if shutil.which("curl"):
        outputs = [
            subprocess.run(command.replace(ADDRESS, served).split(), capture_output=True, text=True, check=True).stdout
            for command in COMMANDS
            if command.startswith("curl")
        ]
        assert outputs[0].startswith('{"model": "model"') and "# TYPE tqgguf_cache_bytes gauge" in outputs[1]


def test_the_chat(folder: Path, python: Callable[..., Any]) -> None:
    command = next(command for command in COMMANDS if command.startswith("tqgguf chat"))
    args = ["-m", "tqgguf", *command.split()[1:], "--temp", "0", "--threads", "1"]
    assert "Paris" in python(*args, stdin="What is the capital of France?\n").stdout
    assert "resumed talk.session: 1 answers" in python(*args, stdin="").stderr


def test_the_session(folder: Path, python: Callable[..., Any]) -> None:
    done = python("-c", PROGRAMS[1].replace("n_ctx=32768", "n_ctx=2048, verbose=False"))
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d+ A long text\n", done.stdout)


def test_the_example_of_a_document(folder: Path, python: Callable[..., Any]) -> None:
    prompt = demo.recall_prompt(1, 60)
    (folder / "facts.txt").write_text(prompt.prompt)
    script = str(REPOSITORY / "examples" / "session_resume.py")
    done = [python(script, "model.gguf", "facts.txt") for _ in range(2)]
    assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr
    assert "read and saved" in done[0].stderr and "taken up" in done[1].stderr
    assert done[0].stdout.strip() and done[1].stdout.strip()
