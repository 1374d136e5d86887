"""What clients send to `tqgguf serve` by mistake or by malice: each gets a status that says whose fault it is, and the
server goes on."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from patience import SOON

from tqgguf.demo import model as demo

pytestmark = pytest.mark.model

MODEL = str(demo.MODEL_PATH)
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(serve: Callable[..., Any]) -> Iterator[Any]:
    server = serve(MODEL, "--threads", "1", "--origin", "https://chat.example")
    yield server
    seconds, said = server.end()
    assert server.process.returncode == 0 and seconds < SOON and "Traceback" not in said, said


def send(server: Any, path: str, data: Any, **headers: str) -> tuple[int, Any, Any]:
    """Status, body and headers of the answer to a POST."""
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    url = server.url.removesuffix("/v1") + path
    headers = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=30) as answer:
            return answer.status, json.loads(answer.read()), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), error.headers


BAD_CHATS: list[tuple[Any, str]] = [
    (b"{bad", "not JSON"),
    (b"", "not JSON"),
    (b'{"messages":[{"role":"user","content":"\xff"}]}', "not JSON in UTF-8"),
    (b'{"messages":[{"role":"user","content":"\\ud800"}]}', "not JSON in UTF-8"),
    (b'{"messages":' + b"[" * 100000 + b"]" * 100000 + b"}", "not JSON"),
    (b'{"messages":[{"role":"user","content":"x"}],"temperature":NaN}', "NaN is no number"),
    (b'{"messages":[{"role":"user","content":"x"}],"temperature":1e400}', "1e400 is beyond the range of a double"),
    ([], "the body is [], must be a JSON object"),
    ({}, "messages is null, must be a list"),
    ({"messages": []}, "messages is [], must be a list"),
    ({"messages": ["x"]}, 'messages.0 is "x", must be an object'),
    ({"messages": [{"role": "wizard", "content": "x"}]}, 'messages.0.role is "wizard", must be one of system, '),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content is 5, must be a text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0 is "),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id is missing"),
    ({"messages": FRANCE, "temperature": "hot"}, 'temperature is "hot": '),
    ({"messages": FRANCE, "max_tokens": 1.5}, "max_tokens is 1.5: "),
    ({"messages": FRANCE, "top_p": 2}, "top_p is 2: "),
    ({"messages": FRANCE, "n": 3}, "n is 3, must be 1"),
    ({"messages": FRANCE, "logprobs": True}, "log probabilities"),
    ({"messages": FRANCE, "stop": ["Paris", ""]}, "stop holds an empty text"),
    ({"messages": FRANCE, "logit_bias": {"99999": 1}}, 'token "99999", must be a number from 0 to 1279'),
    ({"messages": FRANCE, "logit_bias": {"5": 1}, "min_tokens": 2}, "logit_bias and min_tokens cannot be combined"),
    ({"messages": FRANCE, "logit_bias": {"-1": 1}}, 'token "-1", must be'),
    ({"messages": FRANCE, "grammar": "root ::= broken ("}, "llama.cpp cannot read the grammar"),
    (
        {"messages": FRANCE, "grammar": "root ::= " + "(" * 90000 + "x" + ")" * 90000},
        "90,000 brackets within each other, at most 2,000",
    ),
    ({"messages": FRANCE, "logit_bias": {"9" * 5000: 1}}, "must be a number from 0 to"),
    ({"messages": FRANCE, "grammar": 'root ::= "yes"', "min_tokens": 9}, "the grammar allows no token here"),
    (
        {
            "messages": FRANCE,
            "response_format": {"type": "json_object", "schema": {"type": "string", "minLength": 2 * 10**9}},
        },
        "repeats a part 2,000,000,000 times, at most 10,000",
    ),
]


@pytest.mark.parametrize(("body", "said"), BAD_CHATS, ids=[said for _, said in BAD_CHATS])
def test_a_wrong_request_is_the_fault_of_the_client(server: Any, body: Any, said: str) -> None:
    status, answer, _ = send(server, CHAT, body)
    assert status == 400 and said in answer["error"]["message"], answer
    assert answer["error"]["type"] == "invalid_request_error" and "/" not in answer["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v1/completions", {"prompt": ["a", "b"]}, 400, "must be one text"),
        ("/v1/completions", {"prompt": "a", "logprobs": 2}, 400, "log probabilities"),
        ("/v1/embeddings", {"input": "a"}, 404, "no embeddings"),
        ("/extras/detokenize", {"tokens": [5, 1280]}, 400, "1280 is no token of this model"),
        ("/extras/detokenize", {"tokens": [-1]}, 400, "-1 is no token"),
        ("/v1/nothing", {}, 404, "POST /v1/nothing: Not Found"),
        ("/cache", {}, 405, "POST /cache: Method Not Allowed"),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "exceed context window of 2048"),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 300000}]}, 413, "more than 1,179,648 bytes"),
    ],
)
def test_other_paths(server: Any, path: str, body: Any, status: int, said: str) -> None:
    got, answer, _ = send(server, path, body)
    assert got == status and said in answer["error"]["message"], answer


def test_it_knows_the_words_of_newer_clients(server: Any) -> None:
    parts = [{"type": "text", "text": "What is the capital of"}, {"type": "text", "text": "France?"}]
    said = [{"role": "developer", "content": "x"}, {"role": "assistant", "content": None}]
    for messages in (FRANCE, [{"role": "user", "content": parts}], [*said, *FRANCE]):
        body = {"messages": messages, "temperature": 0, "max_completion_tokens": 3, "stream_options": None}
        status, answer, _ = send(server, CHAT, body)
        assert status == 200 and answer["usage"]["completion_tokens"] == 3, answer
    one = [{"type": "text", "text": FRANCE[0]["content"]}]
    body = {"messages": [{"role": "user", "content": one}], "temperature": 0}
    assert "Paris" in send(server, CHAT, body)[1]["choices"][0]["message"]["content"]


def test_a_stream_is_refused_before_it_begins(server: Any) -> None:
    assert send(server, CHAT, {"messages": [], "stream": True})[0] == 400
    body = json.dumps({"messages": FRANCE, "stream": True, "grammar": "root ::= ("}).encode()
    request = urllib.request.Request(server.url + "/chat/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:  # llama.cpp reads a grammar once it is the model's turn
        assert "llama.cpp cannot read the grammar" in json.loads(answer.readline()[6:])["error"]["message"]


def test_forms_are_no_json(server: Any) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        status, answer, _ = send(server, CHAT, {"messages": FRANCE}, content_type=kind)
        assert status == 415 and f"content-type is '{kind}', must be application/json" in answer["error"]["message"]


def test_web_pages_of_others_are_kept_out(server: Any) -> None:
    for origin, allowed in (
        ("https://evil.example", None),
        ("http://localhost.evil.example", None),
        ("http://127.0.0.1:3000", "http://127.0.0.1:3000"),
        ("http://localhost", "http://localhost"),
        ("https://chat.example", "https://chat.example"),
    ):
        _, _, headers = send(server, CHAT, {}, origin=origin)
        assert headers["access-control-allow-origin"] == allowed
    for host, status in (
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("localhost:1", 400),
        ("chat.example", 400),
        ("[::", 400),
    ):
        got, answer, _ = send(server, CHAT, {}, host=host)
        assert got == status, answer
    for host in ("[::1]:5", "127.0.0.2"):
        assert send(server, CHAT, {}, host=host)[0] == 400


def test_head_and_the_cells_of_layers(server: Any) -> None:
    send(server, CHAT, {"messages": FRANCE, "temperature": 0})
    for path in ("/cache", "/metrics"):
        request = urllib.request.Request(server.url.removesuffix("/v1") + path, method="HEAD")
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.status == 200 and int(answer.headers["content-length"]) > 100 and answer.read() == b""
    figures = server.figures()
    assert {layer["cells_used"] for layer in figures["cache"]["layers"]} == {figures["tokens_used"]}
    assert figures["tokens_used"] > 10


def test_a_client_that_goes_away_in_its_body(server: Any) -> None:
    address = (server.url.split("/")[2].split(":")[0], int(server.url.split(":")[2].split("/")[0]))
    with socket.create_connection(address) as client:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(head + b"Content-Length: 50\r\n\r\n{")
        time.sleep(0.2)
    end = time.monotonic() + 5
    while server.figures()["requests_in_progress"] and time.monotonic() < end:
        time.sleep(0.05)
    assert server.figures()["requests_in_progress"] == 0  # and no traceback, which the fixture looks for


IMPATIENT = """
import sys
from tqgguf.serve import app as server
from tqgguf.cli import main
server.PATIENCE = 1
sys.exit(main(sys.argv[1:]))
"""


def test_a_client_that_takes_nothing_holds_nobody_up(serve: Callable[..., Any]) -> None:
    """Its parts fill what the system keeps for it, as they do when a computer goes to sleep in a long answer."""
    server = serve(MODEL, "--threads", "1", program=("-c", IMPATIENT))
    address = server.url.split("/")[2].split(":")
    forbidden = {str(token): -1e30 for token in range(4)}  # it does not end by itself
    body = {"model": "x" * 100000, "prompt": "Once", "max_tokens": 1500, "stream": True, "logit_bias": forbidden}
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((address[0], int(address[1])))
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
        client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
        end = time.monotonic() + 10
        while not server.figures()["tokens_read"] and time.monotonic() < end:
            time.sleep(0.05)
        status, answer, _ = send(server, CHAT, {"messages": FRANCE, "temperature": 0})
        assert status == 200 and "Paris" in answer["choices"][0]["message"]["content"]
        assert server.figures()["tokens_read"] < 1000  # it was not answered to its end for nobody
    assert server.end()[1] == "" and server.process.returncode == 0


def test_it_ends_in_a_grammar_without_end(serve: Callable[..., Any]) -> None:
    server = serve(MODEL, "--threads", "1")

    def ask() -> None:
        with contextlib.suppress(OSError, ValueError):
            send(server, CHAT, {"messages": FRANCE, "grammar": 'root ::= (("a"?){100}){100}'})

    asking = threading.Thread(target=ask)
    asking.start()
    end = time.monotonic() + 10
    while not server.figures()["requests_in_progress"] and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(2)  # until the prompt is read, on a busy machine, too
    seconds, said = server.end()
    assert said == "" and seconds < SOON and server.process.returncode == 1  # the end was forced
    asking.join(10)


def test_it_can_refuse_grammars(serve: Callable[..., Any]) -> None:
    server = serve(MODEL, "--threads", "1", "--no-grammars")
    schema = {"type": "object", "properties": {}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    for field, value in (
        ("grammar", 'root ::= "yes"'),
        ("response_format", {"type": "json_object", "schema": schema}),
        ("tools", [tool]),
        ("functions", [tool["function"]]),
    ):
        status, answer, _ = send(server, CHAT, {"messages": FRANCE, field: value})
        assert (status, answer["error"]["param"]) == (400, field) and "--no-grammars" in answer["error"]["message"]
    body = {"messages": FRANCE, "temperature": 0, "response_format": {"type": "text"}, "tools": None}
    assert "Paris" in send(server, CHAT, body)[1]["choices"][0]["message"]["content"]
    server.end()


def test_the_models_are_listed_while_an_answer_is_computed(serve: Callable[..., Any], endless: tuple[str, ...]) -> None:
    server = serve(*endless[:-2], "--chat-format", "chatml")
    asking = threading.Thread(target=send, args=(server, CHAT, {"messages": FRANCE, "temperature": 0}))
    asking.start()
    try:
        end = time.monotonic() + 10
        while server.figures()["tokens_read"] < 1 and time.monotonic() < end:
            time.sleep(0.05)
        start = time.monotonic()
        assert '"object":"model"' in server.get("/v1/models")[1] and time.monotonic() - start < SOON
        assert server.figures()["requests_in_progress"] == 1
    finally:
        assert server.end()[0] < SOON
        asking.join(10)


def test_a_server_for_everybody_says_so(serve: Callable[..., Any]) -> None:
    server = serve(MODEL, "--threads", "1", "--host", "0.0.0.0")
    server.url = server.url.replace("0.0.0.0", "127.0.0.1")
    assert send(server, CHAT, {}, host="any.example")[0] == 400  # called by any name
    server.end()
    assert "note: everyone who can reach this machine can use the server: --api-key" in server.said


@pytest.mark.parametrize("key", ["", "two words", "schlüssel"])
def test_a_key_that_http_cannot_carry(tqgguf: Callable[..., Any], key: str) -> None:
    done = tqgguf("serve", MODEL, "--api-key", key)
    assert done.returncode == 2 and "ASCII" in done.stderr


def test_an_origin_that_is_none(tqgguf: Callable[..., Any]) -> None:
    done = tqgguf("serve", MODEL, "--origin", "chat.example/x")
    assert done.returncode == 1 and "origin is 'chat.example/x', must be such as https://chat.example" in done.stderr
