"""Provokes every message of docs/troubleshooting.md and compares it with the page."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pages
import pytest

import tqgguf
from tqgguf import CachePolicy
from tqgguf.demo import model as demo

pytestmark = pytest.mark.model

REPOSITORY: Final = Path(__file__).parents[2]
PAGE: Final = REPOSITORY / "docs" / "troubleshooting.md"

MESSAGES: Final = [" ".join(text.split()) for _, text in pages.texts(PAGE)]

COMMANDS: Final = (
    "run missing.gguf -p x",
    "run text.txt -p x",
    "run half.gguf -p x",
    "run odd.gguf -p x --raw",
    "run model.gguf -p x --cache turbo3",
    "chat mute.gguf",
    "fit model.gguf --memory 1M",
    "run model.gguf -p LONG --ctx 512",
    "compare model.gguf -f text.txt",
    "compare mute.gguf",
    "tune model.gguf -o new.gguf --budget 2",
    "run model.gguf -p x -n 1 --cache policy.gguf",
    "run model.gguf -p x --cache three.gguf",
    "chat model.gguf --cache q8_0 --session talk.session",
    "chat mute.gguf --chat-format chatml --session talk.session",
    "chat model.gguf --session flipped.session",
    "chat model.gguf --session cut.session",
    "chat model.gguf --session text.txt",
    "inspect model.gguf --session other.session",
    "serve model.gguf --port PORT",
)
"""Commands of a user; all run in one process."""

PROGRAMS: Final = {
    "flash_attn=False cannot be": 'tqgguf.Llama("model.gguf", cache="pqo3", flash_attn=False)',
    "type_k is set by cache": 'tqgguf.Llama("model.gguf", type_k=8)',
    "Llama has no option": 'tqgguf.Llama("model.gguf", n_contxt=512)',
}

OUT_OF_MEMORY: Final = """
import resource
from tqgguf.cli import main

resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
main("run model.gguf -p x --ctx 8388608 --threads 1".split())
"""

SCRIPT: Final = """
import contextlib, io, json, sys
import tqgguf
from tqgguf.cli import main

said = []
for command in json.loads(sys.argv[1]):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(command)
        except SystemExit as end:
            status = end.code
    said.append([status, errors.getvalue()])
for program in json.loads(sys.argv[2]):
    try:
        eval(program)
        said.append([0, ""])
    except tqgguf.TqggufError as error:
        said.append([1, str(error)])
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, random_model: Callable[..., Path]) -> Path:
    """A folder with the files that the page names."""
    folder = tmp_path_factory.mktemp("trouble")
    (folder / "model.gguf").symlink_to(demo.MODEL_PATH)
    (folder / "half.gguf").write_bytes(demo.MODEL_PATH.read_bytes()[:3_000_000])
    (folder / "odd.gguf").symlink_to(random_model(head_dim=80))
    (folder / "mute.gguf").symlink_to(random_model(n_layer=4, n_head_kv=2, head_dim=64))
    (folder / "text.txt").write_text("too short. " * 200)
    (folder / "other.session").write_bytes(b"something else")
    CachePolicy(("pqo3",) * 4, ("pqo3",) * 4, model_hash="0" * 64).write(folder / "policy.gguf")
    CachePolicy(("pqo3",) * 3, ("pqo4", "pqo3", "pqo3")).write(folder / "three.gguf")
    model = tqgguf.Llama(demo.MODEL_PATH, cache="pqo3", n_ctx=512, n_threads=1, verbose=False)
    model.eval(model.tokenize(b"The code of Anna is falcon."))
    model.save_session(folder / "talk.session", {"messages": []})
    model.close()
    data = bytearray((folder / "talk.session").read_bytes())
    (folder / "cut.session").write_bytes(data[:-10])
    data[-5] ^= 1
    (folder / "flipped.session").write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def said(folder: Path) -> list[tuple[int, str]]:
    """Status and output of each command and program, in order."""
    import subprocess

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = {"PORT": str(taken.getsockname()[1]), "LONG": "The code of Anna is falcon. " * 200}
        commands = [[words.get(word, word) for word in command.split()] for command in COMMANDS]
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(commands), json.dumps(list(PROGRAMS.values()))],
            cwd=folder,
            env={**os.environ, "COLUMNS": "200"},
            input="",
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    return [(status, text) for status, text in json.loads(done.stdout.splitlines()[-1])]


def same(message: str, text: str) -> bool:
    """Whether a text contains a message of the page; "…" matches anything."""
    pattern = ".*?".join(re.escape(part) for part in message.split("…"))
    return bool(re.search(pattern + ("" if message.endswith("…") else r"\s*$"), text, re.DOTALL | re.MULTILINE))


def on_page(begin: str) -> str:
    (message,) = [message for message in MESSAGES if message.startswith(begin)]
    return message


PROVOKED_ELSEWHERE: Final = (
    "llama_cpp was imported before tqgguf",
    "tqgguf: error: LLAMA_CPP_LIB_PATH is set",
    "…libtqgguf… does not exist",
    "tqgguf: error: environment variable TQGGUF_KERNEL",
    "tqgguf: error: llama.cpp could not load",
    "tqgguf: error: llama.cpp ended this process",
    "… cannot do FLASH_ATTN_EXT",
)
"""Messages that have their own test below."""


def test_every_command_and_program_gives_a_message_of_the_page(said: list[tuple[int, str]]) -> None:
    found = set()
    for what, (status, text) in zip((*COMMANDS, *PROGRAMS.values()), said, strict=True):
        matching = [message for message in MESSAGES if same(message, text)]
        assert len(matching) == 1, f"{what} says {text!r}, which is on the page {len(matching)} times"
        assert (status == 0) == ("note: " in matching[0]), f"{what} ended with status {status}"
        found.add(matching[0])
    left = set(MESSAGES) - found
    assert {message for message in left if not message.startswith(PROVOKED_ELSEWHERE)} == set()
    assert len(left) == len(PROVOKED_ELSEWHERE)


@pytest.mark.parametrize(
    ("begin", "env"),
    [
        ("tqgguf: error: LLAMA_CPP_LIB_PATH", {"LLAMA_CPP_LIB_PATH": "/nowhere"}),
        ("tqgguf: error: environment variable TQGGUF_KERNEL", {"TQGGUF_KERNEL": "sse"}),
    ],
)
def test_variables(python: Callable[..., Any], begin: str, env: dict[str, str]) -> None:
    done = python("-m", "tqgguf", "run", str(demo.MODEL_PATH), "-p", "x", env=env)
    assert done.returncode == 1 and same(on_page(begin), done.stderr), done.stderr


def test_another_llama_cpp(python: Callable[..., Any], tmp_path: Path) -> None:
    package = tmp_path / "other" / "llama_cpp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from . import llama_cpp\n")
    (package / "llama_cpp.py").write_text("class _lib: _name = '/other/lib/libllama.so'\n")
    code = f"import sys; sys.path.insert(0, {str(package.parent)!r}); import llama_cpp; import tqgguf"
    done = python("-c", code)
    assert same(on_page("llama_cpp was imported before"), done.stderr), done.stderr


def test_libraries_that_are_missing(python: Callable[..., Any]) -> None:
    code = "from pathlib import Path; from tqgguf._native.library import Library; Library(Path('lib/libtqgguf.so'))"
    done = python("-c", code)
    assert same(on_page("…libtqgguf… does not exist"), done.stderr), done.stderr


def test_memory_that_is_not_there(python: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "model.gguf").symlink_to(demo.MODEL_PATH)
    done = python("-c", OUT_OF_MEMORY)
    assert same(on_page("tqgguf: error: llama.cpp could not load"), done.stderr), done.stderr


def test_the_message_of_a_device_is_in_the_source() -> None:
    """tests/patches/test_device.py provokes the message, with simulated devices."""
    source = (REPOSITORY / "native" / "ggml" / "tq_ggml_device.c").read_text(encoding="utf-8")
    source = re.sub(r'"\s*\n\s*"', "", source).replace("%s", "…")
    assert on_page("… cannot do FLASH_ATTN_EXT").replace("FLASH_ATTN_EXT", "…") in source


def test_the_message_of_an_end_is_in_the_source() -> None:
    """tests/integration/test_llama.py provokes the message, with a simulated abort."""
    source = (REPOSITORY / "tqgguf" / "_native" / "settings.py").read_text(encoding="utf-8")
    assert on_page("tqgguf: error: llama.cpp ended this process").rstrip("…") in source
