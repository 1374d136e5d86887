"""Ctrl-C, closed pipes, and terminals without colour or Unicode: for every command, no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from patience import SOON

from tqgguf.demo import model as demo

pytestmark = pytest.mark.model

MODEL = str(demo.MODEL_PATH)
POOR = {"TERM": "dumb", "PYTHONIOENCODING": "ascii", "NO_COLOR": "1", "LC_ALL": "C", "COLUMNS": "50", "PYTHONUTF8": "0"}

COMMANDS = [
    ["--help"],
    ["fit", "--help"],
    ["fit", MODEL, "--memory", "1G"],
    ["inspect", MODEL],
    ["inspect", MODEL, "--json"],
    ["doctor", MODEL],
    ["demo"],
]


@pytest.mark.parametrize("args", COMMANDS, ids=" ".join)
def test_a_closed_pipe_is_quiet(tmp_path: Path, args: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "tqgguf", *args],
        stdout=writer,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(writer)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize("args", [["doctor"], ["demo"]], ids=" ".join)
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_stream_that_is_closed(tmp_path: Path, args: list[str], closed: str) -> None:
    command = f"{sys.executable} -m tqgguf {' '.join(args)} {closed}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert bool(done.stdout) == (closed != ">&-")


@pytest.mark.parametrize("args", COMMANDS, ids=" ".join)
def test_a_terminal_without_colour_or_unicode(python: Callable[..., Any], args: list[str]) -> None:
    done = python("-m", "tqgguf", *args, env=POOR)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and "\x1b" not in done.stdout + done.stderr


def test_a_model_whose_name_the_terminal_cannot_write(python: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "modèle.gguf"
    path.symlink_to(MODEL)
    done = python("-m", "tqgguf", "fit", str(path), "--memory", "1M", env=POOR)
    assert done.returncode == 1 and "alone take" in done.stderr and "Traceback" not in done.stderr


def test_a_name_the_terminal_cannot_write(python: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(demo.MODEL_PATH.read_bytes().replace(b"tqgguf demo", "dèmô modl".encode(), 1))
    for args in (["fit", str(path), "--memory", "1G"], ["inspect", str(path)], ["doctor", str(path)]):
        done = python("-m", "tqgguf", *args, env=POOR)
        assert done.returncode == 0 and "d?m? modl" in done.stdout, done.stderr


def test_a_name_that_a_terminal_would_obey(
    python: Callable[..., Any], terminal: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(demo.MODEL_PATH.read_bytes().replace(b"tqgguf demo", b"tq\x1b[31m\x07dem", 1))
    for args in (["fit", str(path), "--memory", "1G"], ["inspect", str(path)], ["doctor", str(path)]):
        done = python("-m", "tqgguf", *args)
        assert done.returncode == 0 and "tq\ufffd[31m\ufffd" in done.stdout and "\x1b" not in done.stdout, done.stderr
    # The second half of Paris, for the demo model one token, becomes a sequence that dims what follows.
    loud = tmp_path / "loud.gguf"
    prefix = b"\x04\0\0\0\0\0\0\0"
    loud.write_bytes(demo.MODEL_PATH.read_bytes().replace(prefix + b"aris", prefix + b"\x1b[2m", 1))
    ask = ["run", str(loud), "-p", "What is the capital of France?", "--temp", "0", "--threads", "1"]
    screen = terminal(*ask)
    screen.expect(r"of France is P\?\[2m")
    assert screen.end() == 0
    assert "of France is P\x1b[2m" in python("-m", "tqgguf", *ask).stdout  # a file gets what the model said


NATIVE = """
import sys
import numpy as np
from tqgguf.cli.interrupt import prompt_interrupt
a = np.ones((3000, 3000), np.int64)  # no BLAS: one call of half a minute that no signal ends
with prompt_interrupt(float(sys.argv[1])):
    print("ready", flush=True)
    a @ a
"""

PYTHON = """
import time
from tqgguf.cli.interrupt import prompt_interrupt
try:
    with prompt_interrupt(0.3):
        print("ready", flush=True)
        time.sleep(30)
except KeyboardInterrupt:
    time.sleep(0.6)  # cleaning up takes as long as it takes
    print("cleaned")
    raise SystemExit(130)
"""


CALLBACK = """
import ctypes, os, signal, sys
from tqgguf.cli.interrupt import prompt_interrupt
from tqgguf.model.control import called_by_c
@called_by_c
def compare(a, b):
    signal.raise_signal(signal.SIGINT)  # as if it came on entering the function
    return 0
try:
    with prompt_interrupt(5):
        print("ready", flush=True)
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        ctypes.CDLL(None).qsort(ctypes.create_string_buffer(2), 2, 1, kind(compare))
        signal.pause()
        print("lost")
except KeyboardInterrupt:
    print("cleaned")
    raise SystemExit(130)
"""


@pytest.mark.parametrize(
    ("code", "said"), [(NATIVE, "tqgguf: interrupted"), (PYTHON, "cleaned"), (CALLBACK, "cleaned")]
)
def test_ctrl_c_ends_native_code_and_lets_python_clean_up(code: str, said: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", code, "0.3"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        begin = time.monotonic()
        if code != CALLBACK:  # which does it itself
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=20)
        assert process.returncode == 130 and said in out and "Exception ignored" not in out
        assert time.monotonic() - begin < SOON


IN_A_CALLBACK = """
import os, signal, sys, time
from llama_cpp import _logger
from tqgguf.cli import main
class Levels(dict):  # which llama_cpp looks into for every line of llama.cpp's log
    def __getitem__(self, level):
        if not seen:
            seen.append(level)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)  # longer than native code may take
        return super().__getitem__(level)
seen = []
_logger.GGML_LOG_LEVEL_TO_LOGGING_LEVEL = Levels(_logger.GGML_LOG_LEVEL_TO_LOGGING_LEVEL)
status = main(["inspect", *sys.argv[1:]])
print("it ended by itself")
sys.exit(status)
"""


def test_ctrl_c_while_a_model_is_loaded_is_not_lost(python: Callable[..., Any], tmp_path: Path) -> None:
    """An exception in a function that C calls goes no further."""
    (tmp_path / "text").write_text("The capital of France is Paris.")
    done = python("-c", "import tqgguf\n" + IN_A_CALLBACK, MODEL, "-f", "text", "--threads", "1")
    assert (done.returncode, done.stderr, done.stdout) == (130, "\ntqgguf: interrupted\n", "it ended by itself\n")


def test_ctrl_c_in_a_command(tmp_path: Path, computing: Callable[..., None]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The capital of France is Paris. " * 20000)
    args = [sys.executable, "-m", "tqgguf", "compare", MODEL, "-f", str(text), "--cache", "f16,pqo3", "--threads", "1"]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        computing(process, MODEL)
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        assert process.returncode == 130 and "tqgguf: interrupted" in err and "Traceback" not in err
        assert time.monotonic() - begin < SOON


def test_an_ignored_ctrl_c_stays_ignored(python: Callable[..., Any]) -> None:
    code = """
import signal
from tqgguf.cli.interrupt import prompt_interrupt
signal.signal(signal.SIGINT, signal.SIG_IGN)
with prompt_interrupt():
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
signal.signal(signal.SIGINT, signal.default_int_handler)
with prompt_interrupt():
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""
    assert python("-c", code).returncode == 0


EARLY = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "numpy":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from tqgguf.cli import main
sys.exit(main(["doctor"]))
"""


def test_an_interrupt_while_commands_are_imported() -> None:
    done = subprocess.run([sys.executable, "-c", EARLY], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (130, "\ntqgguf: interrupted\n", "")
