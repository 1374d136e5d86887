"""`tqgguf serve` with the client it is meant for: answers, figures, clients that go away, and its end."""

from __future__ import annotations

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

from tqgguf import ArgumentError, CacheTypeError, OutOfMemoryError, StoppedError
from tqgguf.demo import model as demo

pytestmark = pytest.mark.model

MODEL = str(demo.MODEL_PATH)
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(serve: Callable[..., Any]) -> Iterator[Any]:
    server = serve(MODEL, "--threads", "1")
    yield server
    seconds, said = server.end()
    assert (server.process.returncode, said) == (0, "") and seconds < SOON


@pytest.fixture
def busy(endless: tuple[str, ...], serve: Callable[..., Any]) -> Iterator[Any]:
    """A server whose model answers without end."""
    server = serve(*endless[:-2], "--chat-format", "chatml")
    yield server
    if server.process.poll() is None:
        server.process.kill()
        server.process.communicate()


def ask(client: Any, text: str, **options: Any) -> str:
    options = {"model": "demo", "temperature": 0, **options}
    reply = client.chat.completions.create(messages=[{"role": "user", "content": text}], **options)
    if options.get("stream"):
        return "".join(chunk.choices[0].delta.content or "" for chunk in reply)
    assert reply.choices[0].finish_reason == "stop"
    return reply.choices[0].message.content


def test_answers(server: Any) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["demo"]
    assert "Paris" in ask(client, "What is the capital of France?")
    assert "Lima" in ask(client, "What is the capital of Peru?", stream=True)
    text = client.completions.create(model="demo", prompt="The capital of Spain is", max_tokens=2, temperature=0)
    assert text.usage.completion_tokens == 2


def test_any_name_of_a_model_is_answered(server: Any) -> None:
    """Under the name that was asked for, and without one under the model's own."""
    client = server.client()
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    for extra, name in (({}, "demo"), ({"model": None}, "demo"), ({"model": "gpt-4o"}, "gpt-4o")):
        for stream in (False, True):
            body = {"messages": messages, "max_tokens": 1, "stream": stream, **extra}
            said = client.post("/chat/completions", body=body, cast_to=str)
            assert set(re.findall(r'"model": ?"([^"]*)"', said)) == {name}


def test_two_clients_at_once_get_whole_answers(server: Any) -> None:
    asked = {"France": "Paris", "Peru": "Lima", "Spain": "Madrid", "Japan": "Tokyo"}
    answers: dict[tuple[str, bool], str] = {}

    def talk(stream: bool) -> None:
        client = server.client()
        for country in [*asked] * 3:
            answers[country, stream] = ask(client, f"What is the capital of {country}?", stream=stream)

    threads = [threading.Thread(target=talk, args=(stream,)) for stream in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    for (country, _), answer in answers.items():
        assert answer.strip() == f"The capital of {country} is {asked[country]}."


def test_the_figures_of_the_cache(server: Any) -> None:
    before = server.figures()
    ask(server.client(), "What is the capital of Kenya?")
    kind, text = server.get("/cache")
    after = json.loads(text)
    assert kind == "application/json" and after["model"] == "demo"
    assert after["requests"]["200"] == before["requests"]["200"] + 1 and after["requests_in_progress"] == 0
    assert 8 < after["tokens_read"] - before["tokens_read"] < 30
    assert after["bytes_used"] == 448 * after["tokens_used"] and 15 < after["tokens_used"] < 40
    assert after["cache"]["type_k"] == "pqo3" and after["cache"]["f16_bytes"] == 2048 * 2048
    for path, headers in (("/metrics", {}), ("/cache?format=prometheus", {}), ("/cache", {"accept": "text/plain"})):
        kind, text = server.get(path, **headers)
        assert kind.startswith("text/plain; version=0.0.4")
        samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert samples["tqgguf_cache_tokens_used"] == str(after["tokens_used"])
        assert samples['tqgguf_cache_info{model="demo",type_k="pqo3",type_v="pqo3"}'] == "1"
        assert samples['tqgguf_requests_total{status="200"}'] == str(after["requests"]["200"])
        for name in samples:
            assert f"# TYPE {name.partition('{')[0]} " in text
    with pytest.raises(urllib.error.HTTPError, match="400"):
        server.get("/cache?format=xml")


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_does_not_fit(server: Any, stream: bool) -> None:
    import openai

    with pytest.raises(openai.APIError, match=r"2048"):
        ask(server.client(), "word " * 3000, stream=stream)
    assert "Paris" in ask(server.client(), "What is the capital of France?", stream=stream)


def test_a_client_that_goes_away_frees_its_place(busy: Any) -> None:
    stream = busy.client().chat.completions.create(
        model="x", messages=[{"role": "user", "content": "hello"}], stream=True, temperature=0
    )
    for _, _chunk in zip(range(5), stream, strict=False):
        pass
    assert busy.figures()["requests_in_progress"] == 1
    stream.close()
    end = time.monotonic() + 5
    while busy.figures()["requests_in_progress"] and time.monotonic() < end:
        time.sleep(0.05)
    figures = busy.figures()
    assert figures["requests_in_progress"] == 0
    time.sleep(0.3)
    assert busy.figures()["tokens_read"] == figures["tokens_read"]  # nothing is computed for nobody
    reply = busy.client().completions.create(model="x", prompt="hello", max_tokens=3, temperature=0)
    assert reply.usage.completion_tokens == 3
    seconds, said = busy.end(signal.SIGINT)
    assert said == "" and seconds < SOON and busy.process.returncode == 0


@pytest.mark.parametrize(("stream", "prompt"), [(False, "hello"), (True, "hello"), (False, "so " * 15000)])
def test_it_ends_at_once_whatever_it_computes(busy: Any, stream: bool, prompt: str) -> None:
    outcome: list[Any] = []

    def talk() -> None:
        try:
            outcome.append(ask(busy.client(), prompt, stream=stream))
        except Exception as error:
            outcome.append(error)

    threads = [threading.Thread(target=talk) for _ in range(2)]  # one is computed, one waits
    for thread in threads:
        thread.start()
    end = time.monotonic() + 20
    while busy.figures()["requests_in_progress"] < 2 and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)
    seconds, said = busy.end(signal.SIGINT)
    assert said == "" and seconds < SOON and busy.process.returncode == 0
    for thread in threads:
        thread.join(10)
    assert len(outcome) == 2


def test_an_api_key(serve: Callable[..., Any]) -> None:
    import openai

    server = serve(MODEL, "--threads", "1", "--api-key", "secret", "--name", "mine")
    try:
        with pytest.raises(openai.AuthenticationError):
            server.client().models.list()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            server.get("/metrics")
        client = openai.OpenAI(base_url=server.url, api_key="secret")
        assert [model.id for model in client.models.list()] == ["mine"]
    finally:
        server.end()


def test_a_prompt_cache_spares_clients_that_take_turns(serve: Callable[..., Any]) -> None:
    prompts = [demo.recall_prompt(seed, 25).prompt for seed in (1, 2)]
    server = serve(MODEL, "--threads", "1", "--prompt-cache", "16")
    try:
        answers = [ask(server.client(), prompt, max_tokens=20) for prompt in prompts]
        before = server.figures()["tokens_read"]
        assert before > 300
        assert [ask(server.client(), prompt, max_tokens=20) for prompt in prompts] == answers
        assert server.figures()["tokens_read"] - before < 60
    finally:
        server.end()


def test_what_is_refused_before_anything_loads(
    python: Callable[..., Any], random_model: Callable[..., Path], tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = python("-m", "tqgguf", "serve", MODEL, "--port", port)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port" in done.stderr
    done = python("-m", "tqgguf", "serve", MODEL, "--host", "1.2.3.4")
    assert done.returncode == 1 and "; choose another --host (127.0.0.1: this machine; 0.0.0.0: all" in done.stderr
    done = python("-m", "tqgguf", "serve", str(random_model()))
    assert done.returncode == 1 and "has no chat template" in done.stderr and len(done.stderr.splitlines()) == 1
    (tmp_path / "fastapi.py").write_text("raise ModuleNotFoundError('no', name='fastapi')")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = python("-m", "tqgguf", "serve", MODEL, env={"PYTHONPATH": path})
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "a package that is missing, fastapi: pip install 'tqgguf[server]'" in done.stderr
    assert python("-m", "tqgguf", "serve", MODEL, "--port", "70000").returncode == 2


def benchmark(folder: Path, name: str, *args: str) -> tuple[int, dict[str, Any], str]:
    """Status, result and errors of a program of benchmarks/."""
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / name), *args, "--output", "-"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def test_under_load_nothing_is_lost(tmp_path: Path) -> None:
    status, result, said = benchmark(tmp_path, "endurance/serve_load.py", "--requests", "24")
    assert status == 0, said
    assert (result["answered"], result["wrong"]) == (24, 0)


def test_a_soak_sees_a_leak_and_nothing_else(tmp_path: Path) -> None:
    status, result, said = benchmark(
        tmp_path, "endurance/soak.py", "--minutes", "0.12", "--clients", "3", "--leak", "5000000", "--max-slope", "100"
    )
    assert status == 1 and len(result["failures"]) == 1, said
    assert result["failures"][0].startswith("memory grows by ") and result["slope_mib_per_1000_requests"] > 100
    kinds = {"whole", "stream", "long", "story", "session", "too long", "leave", "abort"}
    assert result["requests"].keys() == kinds and result["wrong"] == 0


EARLY = """
import signal, sys, uvicorn
from tqgguf.cli import main
run = uvicorn.Server.run


def early(*args, **options):
    signal.raise_signal(signal.SIGTERM)
    run(*args, **options)


uvicorn.Server.run = early
sys.exit(main(sys.argv[1:]))
"""


def test_a_signal_before_it_takes_requests_is_not_lost(python: Callable[..., Any]) -> None:
    done = python("-c", EARLY, "serve", MODEL, "--threads", "1", "--port", "0", timeout=30)
    assert done.returncode == 0 and "listening" in done.stderr


def test_a_forced_end_is_no_success(python: Callable[..., Any]) -> None:
    program = """
import os, signal, socket, time, types
from tqgguf._util import listen
from tqgguf.serve.app import serve

async def app(scope, receive, send):
    if scope["type"] == "http":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

bound = listen("127.0.0.1", 0)
client = socket.create_connection(bound.getsockname())
client.sendall(b"GET / HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
serve(app, types.SimpleNamespace(stop=lambda: None), bound)
"""
    start = time.monotonic()
    done = python("-c", program)
    assert done.returncode == 1 and "Error" not in done.stderr
    assert time.monotonic() - start < 50


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ArgumentError("no token"), 400),
        (ValueError("Requested tokens (9) exceed context window of 8"), 400),
        (CacheTypeError("not used"), 500),
        (OutOfMemoryError("no memory"), 500),
        (ZeroDivisionError("a mistake of ours"), 500),
        (StoppedError("stopped"), 503),
    ],
)
def test_the_status_says_whose_fault_an_error_is(error: Exception, status: int) -> None:
    request = pytest.importorskip("tqgguf.serve.request")
    given, body = request.error_answer(error)
    assert given == status and body["type"] == ("invalid_request_error" if status == 400 else "server_error")
