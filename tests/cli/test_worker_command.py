"""`tqgguf worker`, `--rpc`, and a server whose worker dies: what is said, to whom, and that the server goes on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import SOON

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


class Server:
    """`tqgguf serve` on workers."""

    def __init__(self, log: Path, *args: str) -> None:
        self.log = log
        command = [sys.executable, "-m", "tqgguf", "serve", MODEL, "--threads", "1", "--port", "0", *args]
        with log.open("w") as output:
            self.process = subprocess.Popen(command, stderr=output)
        end = time.monotonic() + 20
        while not (match := re.search(r"listening on (http://\S+)/v1 ", log.read_text())):
            assert time.monotonic() < end and self.process.poll() is None, log.read_text()
            time.sleep(0.02)
        self.url = match[1]

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return response.read().decode()

    def ask(self, key: str = "", **options: Any) -> tuple[int, dict[str, Any]]:
        """Status, and the answer or the error."""
        body = {"model": "demo", "temperature": 0, "prompt": "The capital of France is", **options}
        headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
        request = urllib.request.Request(self.url + "/v1/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, {"retry-after": error.headers.get("retry-after"), **json.loads(error.read() or b"{}")}

    def begun(self) -> bool:
        return json.loads(self.get("/cache"))["tokens_used"] > 60


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    for name in ("fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install -r requirements-dev.txt")
    started: list[Server] = []

    def start(*args: str) -> Server:
        started.append(Server(tmp_path / f"{len(started)}.log", *args))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


ENDLESS = {"max_tokens": 1900, "logit_bias": {"2": -100}}


def test_the_server_survives_its_worker(serve: Callable[..., Server], worker: Callable[..., Any]) -> None:
    pair = [worker(), worker()]
    server = serve("--rpc", f"{pair[0].name},{pair[1].name}")
    text = server.ask(max_tokens=8)[1]["choices"][0]["text"]
    assert "Paris" in text

    outcome: list[Any] = []
    asking = [threading.Thread(target=lambda: outcome.append(server.ask(**ENDLESS))) for _ in range(2)]
    for thread in asking:  # one is answered, one waits
        thread.start()
    while not server.begun():
        time.sleep(0.01)
    pair[1].kill()
    for thread in asking:
        thread.join(20)
    lost = f"the connection to worker {pair[1].name} is lost"
    assert [status for status, _ in outcome] == [503, 503]
    assert all(lost in answer["error"]["message"] for _, answer in outcome)
    cache = json.loads(server.get("/cache"))
    assert lost in cache["lost"] and cache["tokens_used"] == 0 and cache["requests"]["503"] == 2
    assert "tqgguf_workers_lost 1\n" in server.get("/metrics")
    start = time.monotonic()
    for _ in range(20):
        status, answer = server.ask()
        assert status == 503 and answer["retry-after"] == "1"
        assert f"{lost}, and with it" in answer["error"]["message"] and "no worker at" in answer["error"]["message"]
    assert time.monotonic() - start < 50  # waiting for the worker each time would take 5 s each
    assert "demo" in server.get("/v1/models")

    worker(port=pair[1].port)
    end = time.monotonic() + 20
    while (status := server.ask(max_tokens=8)[0]) == 503 and time.monotonic() < end:
        time.sleep(0.1)
    assert status == 200 and server.ask(max_tokens=8)[1]["choices"][0]["text"] == text
    cache = json.loads(server.get("/cache"))
    assert cache["lost"] == "" and cache["tokens_used"] > 0 and server.process.poll() is None
    assert "Traceback" not in server.log.read_text() and "was loaded again" in server.log.read_text()
    server.process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    assert server.process.wait(20) == 0 and time.monotonic() - start < SOON


def test_a_stream_is_told(serve: Callable[..., Server], worker: Callable[..., Any]) -> None:
    mortal = worker()
    server = serve("--rpc", mortal.name, "--api-key", "secret")
    body = {"model": "demo", "prompt": "So", "stream": True, **ENDLESS}
    headers = {"content-type": "application/json", "authorization": "Bearer secret"}
    request = urllib.request.Request(server.url + "/v1/completions", json.dumps(body).encode(), headers)
    parts = []
    with urllib.request.urlopen(request, timeout=30) as response:
        for line in response:
            if line.startswith(b"data: "):
                parts.append(json.loads(line[6:]))
                if len(parts) == 10:
                    mortal.kill()
    assert len(parts) > 10 and f"worker {mortal.name} is lost" in parts[-1]["error"]["message"]
    assert parts[-1]["error"]["type"] == "server_error" and "Traceback" not in server.log.read_text()
    assert server.ask(key="secret")[0] == 503 and server.ask()[0] == server.ask(key="wrong")[0] == 401


def test_a_server_ends_though_its_worker_hangs(serve: Callable[..., Server], worker: Callable[..., Any]) -> None:
    each = worker()
    server = serve("--rpc", each.name)

    def ask() -> None:
        with contextlib.suppress(OSError, ValueError):  # what becomes of the answer is another test's matter
            server.ask(**ENDLESS)

    threading.Thread(target=ask, daemon=True).start()
    while not server.begun():
        time.sleep(0.01)
    os.kill(each.process.pid, signal.SIGSTOP)
    time.sleep(0.3)
    assert json.loads(server.get("/cache"))["requests_in_progress"] == 1
    server.process.send_signal(signal.SIGTERM)
    try:
        server.process.wait(10)  # without its own end it would wait for ever
    finally:
        os.kill(each.process.pid, signal.SIGCONT)
