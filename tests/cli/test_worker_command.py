"""`tqgguf worker` and `--rpc`: what is said, to whom, and that a chat goes on."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tqgguf import read_session
from tqgguf._native import library_path
from tqgguf.cli import main
from tqgguf.demo import model as demo

if not library_path("ggml-rpc").exists():
    pytest.skip("this build has no RPC", allow_module_level=True)

pytestmark = pytest.mark.model

MODEL = str(demo.MODEL_PATH)


# ---- The worker ----


def test_what_it_says(worker: Callable[..., Any]) -> None:
    said = worker().said
    for text in ("threads: 1", "pqo3", "pqt5", "protocol 7.0.0", "no passwords", "networks you trust"):
        assert text in said
    assert "WARNING" not in said


def test_an_open_address_is_warned_of() -> None:
    command = [sys.executable, "-m", "tqgguf", "worker", "--host", "0.0.0.0", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        said = ""
        while "listening" not in said and (line := process.stderr.readline()):
            said += line
        process.kill()
    warning = said[said.index("WARNING: 0.0.0.0 is an address that other machines can reach") :]
    assert "networks you trust" in warning and "listening on 0.0.0.0:" in warning


def test_the_help_warns(capsys: pytest.CaptureFixture[str]) -> None:
    for command, text in (("worker", "no passwords"), ("run", "--rpc"), ("chat", "--rpc"), ("serve", "--rpc")):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert text in said and "on networks you trust" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_at_once(worker: Callable[..., Any], number: int) -> None:
    each = worker()
    with socket.create_connection(("127.0.0.1", each.port)):  # which it waits for in llama.cpp
        each.wait("a client has come")
        each.process.send_signal(number)
        assert each.process.wait(20) == 0
    assert each.said.rstrip().endswith("a client has come")


def test_what_is_refused(worker: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port, file = str(worker().port), tmp_path / "file"
    file.write_text("")
    for args, message in (
        (("--port", port), f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port"),
        (("--host", "nowhere.invalid"), "--host nowhere.invalid has no IPv4 address"),
        (("--host", "192.0.2.1"), "cannot listen on 192.0.2.1:50052: Cannot assign requested address"),
        (("--keep-weights", str(file)), f"--keep-weights {file} is not a folder and cannot be created"),
    ):
        assert main(["worker", *args]) == 1
        said = capsys.readouterr().err
        assert message in said and len(said.splitlines()) == 1, said
    with pytest.raises(SystemExit, match="2"):
        main(["worker", "--port", "70000"])


def test_weights_are_kept(worker: Callable[..., Any], tmp_path: Path, random_model: Callable[..., Path]) -> None:
    """Those above 10 MiB; the second time a model is loaded they come from the folder."""
    import tqgguf

    folder = tmp_path / "weights"
    each = worker("-m", "tqgguf", "worker", "--threads", "1", "--keep-weights", str(folder))
    path = random_model(n_head=256, head_dim=256, n_head_kv=1, n_layer=1, n_ctx=64)  # Q: 64 x 65536 f32
    for n_saved in (2, 0):
        before = {file: file.stat().st_mtime_ns for file in folder.iterdir()} if folder.exists() else {}
        tqgguf.Llama(path, rpc=[each.name], n_ctx=64, n_threads=1, verbose=False).close()
        after = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
        assert len(after) == 2 and len([file for file in after if before.get(file) != after[file]]) == n_saved


# ---- Its clients ----


def test_run(tqgguf: Callable[..., Any], worker: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    workers = ",".join(worker().name for _ in range(2))
    options = ("-p", "What is the capital of France?", "--temp", "0", "--threads", "1", "--json")
    done = tqgguf("run", MODEL, *options, "--rpc", workers)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert "Paris" in result["answer"]
    assert {layer["device"] for layer in result["cache"]["layers"]} == set(workers.split(","))
    with pytest.raises(SystemExit, match="2"):
        main(["run", MODEL, *options, "--rpc", workers + "x"])
    assert "is no worker: give" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    assert main(["run", MODEL, *options, "--rpc", nobody]) == 1
    said = capsys.readouterr().err
    assert f"no worker at {nobody}: Connection refused" in said and len(said.splitlines()) == 1


def test_a_chat_goes_on_when_its_worker_is_back(worker: Callable[..., Any], tmp_path: Path) -> None:
    """What was said before is kept, and so is the message whose answer was lost."""
    mortal, errors = worker(), tmp_path / "errors"
    command = [sys.executable, "-m", "tqgguf", "chat", MODEL, "--rpc", mortal.name, "--temp", "0", "--threads", "1"]
    with errors.open("w") as output:
        chat = subprocess.Popen(
            [*command, "--session", "talk"], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output
        )
    assert chat.stdin and chat.stdout

    def say(text: str) -> None:
        assert chat.stdin
        chat.stdin.write(text.encode() + b"\n")
        chat.stdin.flush()

    def told(text: str, n: int = 1) -> None:
        end = time.monotonic() + 20
        while errors.read_text().count(text) < n:
            assert time.monotonic() < end and chat.poll() is None, errors.read_text()
            time.sleep(0.01)

    say("What is the capital of France?")
    assert b"Paris" in chat.stdout.readline()
    while not (tmp_path / "talk").exists():
        time.sleep(0.01)
    mortal.kill()
    say("What is the capital of Italy?")
    told(f"tqgguf: error: the connection to worker {mortal.name} is lost")
    say("What is the capital of Spain?")  # in the place of the one before
    told(f"no worker at {mortal.name}: Connection refused")
    told("The conversation is kept: when the worker is back, /regen loads the model again and answers.", 2)
    for command_ in ("/save other", "/cache"):
        say(command_)
    told(f"worker {mortal.name} is lost", 3)
    worker(port=mortal.port)
    say("/regen")
    while b"Madrid" not in (line := chat.stdout.readline()):  # after what /cache can still say
        assert line, errors.read_text()
    chat.stdin.close()
    assert chat.wait(20) == 0, errors.read_text()
    session = read_session(tmp_path / "talk")
    said = [message["content"] for message in session.extra["messages"]]
    assert ["France" in said[0], "Paris" in said[1], "Spain" in said[2], "Madrid" in said[3]] == 4 * [True]
    assert len(said) == 4 and session.n_tokens > 35 and not (tmp_path / "other").exists()
