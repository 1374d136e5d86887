"""What `tqgguf serve` refuses before it loads anything, and what its clients get for bad requests."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tqgguf._native.programs import PROGRAMS, program
from tqgguf.demo import model as demo
from tqgguf.errors import ArgumentError, LibraryError, OutOfMemoryError
from tqgguf.serve import launch

pytestmark = pytest.mark.model

MODEL = str(demo.MODEL_PATH)


@pytest.fixture
def refused(python: Callable[..., Any]) -> Callable[..., str]:
    """What `tqgguf serve` says when it ends with status 1, which must be one line."""

    def run(*args: str, **env: str) -> str:
        done = python("-m", "tqgguf", "serve", *args, env=env)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
        return str(done.stderr)

    return run


def test_addresses(refused: Callable[..., str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = refused(MODEL, "--port", port)
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port" in said
    assert "; choose another --host (127.0.0.1: this machine; 0.0.0.0: all" in refused(MODEL, "--host", "1.2.3.4")


def test_models_and_files(refused: Callable[..., str], tmp_path: Path, random_model: Callable[..., Path]) -> None:
    assert "missing.gguf" in refused("missing.gguf")
    other = str(random_model())
    assert "--draft names the model itself" in refused(MODEL, "--draft", MODEL)
    assert "--slot-save-path nowhere is no folder: make it first" in refused(MODEL, "--slot-save-path", "nowhere")
    assert "but no calibration" in refused(MODEL, "--calibration", other)
    assert "no worker at 127.0.0.1:9" in refused(MODEL, "--rpc", "127.0.0.1:9")


def test_a_policy_and_a_calibration_of_another_model(
    refused: Callable[..., str], python: Callable[..., Any], tmp_path: Path, random_model: Callable[..., Path]
) -> None:
    other = random_model(n_layer=2, n_head=4, n_head_kv=2, head_dim=64)
    (tmp_path / "text.txt").write_text("a b c " * 300)
    done = python("-m", "tqgguf", "calibrate", str(other), "-f", "text.txt", "-o", "other.gguf", "--tokens", "256")
    assert done.returncode == 0, done.stderr
    said = refused(MODEL, "--calibration", str(tmp_path / "other.gguf"))
    assert "was measured on another model than demo.gguf" in said


def test_a_cache_that_does_not_fit(refused: Callable[..., str]) -> None:
    said = refused(MODEL, "--parallel", "8", "--ctx", "200000000")
    assert "this process may use" in said and "tqgguf fit" in said


def test_a_cache_that_fits_alone_but_not_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from tqgguf.model.options import checked_request

    request = checked_request(MODEL, "pqo3", None, None, None, "off", {"n_ctx": 8192})
    service = launch.Service(request, 2048, 4, "127.0.0.1", 1)
    monkeypatch.setattr(launch, "machine_memory", lambda: 6 << 20)
    with pytest.raises(OutOfMemoryError, match=r"4 conversations of 2,048 tokens of demo.gguf take [\d,]+ bytes"):
        launch.refuse_too_large(service)
    monkeypatch.setattr(launch, "machine_memory", lambda: 64 << 20)
    launch.refuse_too_large(service)


def test_options_behind_the_dashes() -> None:
    launch.refuse_contradictions(["--cache-ram", "100", "-ub", "64", "--jinja"])
    for words in ("-c 5", "--ctx_size 5", "--jinja --port=1", "-ub 8 --cache-type-k f16", "--cache-policy x"):
        with pytest.raises(ArgumentError, match="behind -- contradicts tqgguf"):
            launch.refuse_contradictions(words.split())
    with pytest.raises(ArgumentError, match="'text' is no option"):
        launch.refuse_contradictions(["text"])


def test_every_option_that_it_gives_is_among_those_it_refuses(tmp_path: Path) -> None:
    from tqgguf.model.options import checked_request

    for cache in ("pqo3", "f16"):
        request = checked_request(MODEL, cache, None, None, None, "off", {})
        words = launch.Service(request, 512, 2, "127.0.0.1", 1).command(tmp_path / "policy.gguf")
        given = [word for word in words[1:] if word.startswith("-") and word != "--no-kv-unified"]
        assert len(given) > 8 and not [word for word in given if not launch.OURS.fullmatch(word)][1:]


def test_options_of_the_environment_do_not_reach_the_server(serve: Callable[..., Any]) -> None:
    os.environ["LLAMA_ARG_CTX_SIZE"] = os.environ["LLAMA_ARG_API_PREFIX"] = "/17"
    try:
        server = serve(MODEL, "--threads", "1", "--ctx", "256")
    finally:
        del os.environ["LLAMA_ARG_CTX_SIZE"], os.environ["LLAMA_ARG_API_PREFIX"]
    assert server.cache()["n_tokens"] == 1024
    server.end()


def test_a_draft_of_another_vocabulary(refused: Callable[..., str], random_model: Callable[..., Path]) -> None:
    said = refused(MODEL, "--draft", str(random_model(n_word=64)))
    assert "has another vocabulary than the model" in said and "tokens" in said


def test_a_package_without_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tqgguf._native import programs

    assert all(program(name).is_file() for name in PROGRAMS)
    monkeypatch.setattr(programs, "LIB_DIR", tmp_path)
    with pytest.raises(LibraryError, match=r"llama-server does not exist: the native libraries"):
        program("llama-server")
    (tmp_path / "llama-server").write_text("")
    with pytest.raises(LibraryError, match="may not be run"):
        program("llama-server")


def status_of(server: Any, body: Any, path: str = "/v1/chat/completions") -> int:
    host = urllib.parse.urlsplit(server.url)
    connection = http.client.HTTPConnection(host.hostname or "", host.port, timeout=60)
    connection.request("POST", path, body if isinstance(body, (bytes, str)) else json.dumps(body))
    status = connection.getresponse().status
    connection.close()
    return status


def chain(n: int) -> str:
    """A grammar of rules of which each begins with the next."""
    return "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(n)) + f'r{n} ::= "a"\n'


def nested(n: int) -> str:
    """A request with a schema of lists of lists, as text: Python's own writer does not go so deep."""
    schema = '{"type": "array", "items": ' * n + "{}" + "}" * n
    return f'{{"messages": [{{"role": "user", "content": "x"}}], "json_schema": {schema}}}'


def referred(n: int) -> dict[str, Any]:
    """A schema whose definitions refer to one another."""
    definitions: dict[str, Any] = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(n)}
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{n}": {"type": "string"}}}


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "[]",
        {},
        {"messages": "hello"},
        {"messages": [{"role": "user", "content": "word " * 3000}]},
        {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "no such type"}},
        {"messages": [{"role": "user", "content": "x"}], "grammar": "root ::= ("},
        {"messages": [{"role": "user", "content": "x"}], "grammar": f'root ::= {"(" * 10**5}"a"{")" * 10**5}'},
        {"messages": [{"role": "user", "content": "x"}], "grammar": chain(10**5)},
        nested(20000),
        {"messages": [{"role": "user", "content": "x"}], "json_schema": referred(20000)},
    ],
    ids=range(12),
)
def test_bad_bodies_get_a_status_and_the_server_lives(server: Any, body: Any) -> None:
    assert 400 <= status_of(server, body) < 600
    assert status_of(server, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}) == 200


def test_a_body_without_end(server: Any) -> None:
    """Of a gigabyte by its own word, of which no more is sent than the server takes."""
    host = urllib.parse.urlsplit(server.url)
    with socket.create_connection((host.hostname or "", host.port or 0), timeout=60) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n")
        end = time.monotonic() + 5
        try:
            while time.monotonic() < end:
                connection.sendall(b" " * 65536)
        except OSError:
            pass  # it has closed the connection
    assert status_of(server, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}) == 200


def test_a_client_that_reads_nothing(server: Any) -> None:
    host = urllib.parse.urlsplit(server.url)
    body = json.dumps({"prompt": "The", "n_predict": 400, "stream": True, "ignore_eos": True}).encode()
    with socket.create_connection((host.hostname or "", host.port or 0), timeout=60) as connection:
        connection.sendall(b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        for _ in range(4):
            assert status_of(server, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}) == 200


# ---- llama.cpp's programs by themselves ----


def llama(name: str, *args: str, status: int | None = 0) -> str:
    done = subprocess.run(
        [program(name), *args], capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, check=False
    )
    assert status is None or done.returncode == status, done.stderr[-2000:]
    return done.stdout + done.stderr


def bench(*args: str, status: int | None = 0) -> str:
    return llama(
        "llama-bench", "-m", MODEL, "-p", "16", "-n", "0", "-r", "1", "-t", "1", "-fa", "1", *args, status=status
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy and a calibration of the demo model, and damaged ones."""
    import tqgguf

    folder = tmp_path_factory.mktemp("files")
    info = tqgguf.read_model_info(MODEL)
    calibration = tqgguf.calibrate(MODEL)
    calibration.write(folder / "calibration.gguf")
    from tqgguf.cache.policy import policy_from_ranges

    policy = policy_from_ranges({"default": "pqo3", "layers": {"0": "q8_0"}}, info.n_layer)
    policy.write(folder / "policy.gguf")
    calibration.applied(policy, info).write(folder / "both.gguf")
    data = (folder / "calibration.gguf").read_bytes()
    (folder / "short.gguf").write_bytes(data[: len(data) // 2])
    shutil.copy(MODEL, folder / "model.gguf")
    (folder / "text.gguf").write_text("no GGUF")
    huge = gguf.GGUFWriter(folder / "huge.gguf", "tqgguf-policy")
    huge.add_uint32("tqgguf-policy.version", 1)
    huge.add_tensor_info("blk.0.k_mean", [2**40], np.dtype(np.float32), 2**42)
    huge.write_header_to_file()
    huge.write_kv_data_to_file()
    huge.write_ti_data_to_file()
    huge.close()
    with (folder / "huge.gguf").open("ab") as file:
        file.write(bytes(1024))
    return folder


def test_programs_take_policies_calibrations_and_tails(files: Path) -> None:
    assert "pp16" in bench("--cache-policy", str(files / "policy.gguf"), "--cache-tail", "64")
    assert "pp16" in bench("--cache-policy", str(files / "both.gguf"))
    assert "pp16" in bench("-ctk", "pqt3", "-ctv", "pqt3", "--cache-calibration", str(files / "calibration.gguf"))
    assert "pp16" in bench("--cache-calibration", "off")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--cache-policy", "missing.gguf"), "missing.gguf cannot be read, or is no GGUF file"),
        (("--cache-policy", "text.gguf"), "text.gguf cannot be read, or is no GGUF file"),
        (("--cache-policy", "calibration.gguf"), "is no tqgguf-policy file of version 1"),
        (("--cache-calibration", "model.gguf"), "is no tqgguf-calibration file of version 1"),
        (("--cache-calibration", "short.gguf"), "short.gguf"),
        (("--cache-policy", "huge.gguf"), "huge.gguf is damaged: it is shorter than its tensors"),
        (("--cache-policy", "both.gguf", "--cache-calibration", "calibration.gguf"), "has means or gains of its own"),
    ],
)
def test_programs_refuse_other_files(files: Path, args: tuple[str, ...], said: str) -> None:
    words = [str(files / word) if word.endswith(".gguf") else word for word in args]
    assert said in bench(*words, status=1)


def test_a_calibration_of_a_program_belongs_to_its_model(
    files: Path, python: Callable[..., Any], random_model: Callable[..., Path]
) -> None:
    """And "auto" is the one that is kept, which is measured first."""
    common = ("-m", "tqgguf", "llama-bench", "-p", "16", "-n", "0", "-r", "1", "-t", "1", "-ctk", "pqo3", "-fa", "1")
    done = python(*common, "-m", MODEL, "--cache-calibration", "auto")
    assert done.returncode == 0 and "pp16" in done.stdout, done.stderr
    done = python(*common, "-m", str(random_model()), "--cache-calibration", str(files / "calibration.gguf"))
    assert done.returncode == 1 and "was measured on another model than" in done.stderr
    done = python(*common, "--cache-calibration", "auto")
    assert done.returncode == 1 and "needs the model as a file: -m FILE" in done.stderr


def test_programs_refuse_files_of_another_model(files: Path, random_model: Callable[..., Path]) -> None:
    """By the number of layers, by the size of keys, and by that of heads."""
    more = random_model(n_layer=3, n_head=4, n_head_kv=2, head_dim=64)
    other = random_model(n_layer=4, n_head=8, n_head_kv=8, head_dim=64)
    for model, file, said in (
        (more, "policy.gguf", "no types for the 3 layers of this model"),
        (more, "calibration.gguf", "was measured on another model: this one has 3 layers"),
        (other, "both.gguf", "the calibration is for other keys than this model's of 512 values"),
    ):
        option = "--cache-calibration" if file == "calibration.gguf" else "--cache-policy"
        words = ("-v", "-m", str(model), "-p", "16", "-n", "0", "-r", "1", "-t", "1", option, str(files / file))
        assert said in llama("llama-bench", *words, status=1)
    assert bench("--cache-tail", "-3", status=None).count("error") >= 1
