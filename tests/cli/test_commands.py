"""The command line as a user meets it: output, JSON, exit status, and where each goes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tqgguf import CACHE_TYPES, __version__
from tqgguf.config import PREFERRED_TYPES
from tqgguf.demo import model as demo

pytestmark = pytest.mark.model

Command = Callable[..., subprocess.CompletedProcess[str]]
MODEL = str(demo.MODEL_PATH)


def test_demo(tqgguf: Command) -> None:
    done = tqgguf("demo")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "917,504 bytes" in done.stdout and "4,194,304 bytes" in done.stdout and "14/64" in done.stdout


@pytest.mark.parametrize(
    ("cache", "bytes_64ths"),
    [("pqo3", 14), ("pqo4", 18), ("pqt3", 14), ("pqt2", 10), ("pqt5", 22), ("q8_0", 34), ("f16", 64)],
)
def test_demo_json(tqgguf: Command, cache: str, bytes_64ths: int) -> None:
    done = tqgguf("demo", "--cache", cache, "--json")
    data = json.loads(done.stdout)
    assert "Paris" in data["answer"]
    assert (data["cache"]["bytes"] - data["cache"]["tail_bytes"]) * 64 == data["cache"]["f16_bytes"] * bytes_64ths
    assert data["cache"]["type_k"] == data["cache"]["type_v"] == cache


def test_run(tqgguf: Command) -> None:
    done = tqgguf("run", MODEL, "-p", "What is the capital of Italy?", "--temp", "0", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert "Rome" in done.stdout and "KV cache" not in done.stdout and "KV cache pqo3" in done.stderr
    took = re.match(r"(\d+) pieces in ([\d.]+) (ms|s), prompt included, at ([\d,.]+) tokens/s; KV", done.stderr)
    assert took
    seconds = float(took[2]) / (1000 if took[3] == "ms" else 1)
    assert seconds > 0 and float(took[4].replace(",", "")) > 0.8 * (int(took[1]) - 1) / seconds


def test_run_json_with_types_apart(tqgguf: Command) -> None:
    options = ["--temp", "0", "--cache-k", "pqo4", "--cache-v", "q8_0", "--ctx", "512", "-n", "3", "--json"]
    data = json.loads(tqgguf("run", MODEL, "-p", "What is the capital of Italy?", *options).stdout)
    assert (data["cache"]["type_k"], data["cache"]["type_v"]) == ("pqo4", "q8_0")
    assert data["cache"]["n_ctx"] == 512 and data["finish_reason"] == "length"


def test_run_raw_continues_the_text(tqgguf: Command) -> None:
    done = tqgguf("run", MODEL, "-p", "The capital of Spain is", "--raw", "--temp", "0", "-n", "4")
    assert done.returncode == 0 and "assistant" not in done.stdout


def test_chat(tqgguf: Command) -> None:
    lines = "What is the capital of Spain?\n/cache\n/nonsense\n\n/clear\n/cache\n"
    lines += "What is the capital of Peru?\n/exit\nnever\n"
    done = tqgguf("chat", MODEL, "--temp", "0", stdin=lines)
    assert done.returncode == 0, done.stderr
    out = done.stdout.splitlines()
    assert "Madrid" in out[0] and "14/64" in out[1] and "1 answers" in out[2]
    assert out[3].startswith("mean scale of K's blocks, layers 0 to 3: ")
    assert out[5].startswith("0 of 2,048 tokens used, 0 answers")
    assert "Lima" in out[6] and len(out) == 7
    assert "unknown command /nonsense" in done.stderr and "forgotten" in done.stderr


def test_chat_survives_a_full_context(tqgguf: Command) -> None:
    lines = "word " * 400 + "\nWhat is the capital of Peru?\n"
    done = tqgguf("chat", MODEL, "--temp", "0", "--ctx", "256", stdin=lines)
    assert done.returncode == 0 and "/clear" in done.stderr
    assert "Lima" in done.stdout


def test_inspect(tqgguf: Command) -> None:
    done = tqgguf("inspect", MODEL, "--ctx", "2048,100", "--tail", "0")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.split()}
    assert rows["pqo3"] == ["pqo3", "3.5", "448", "917,504", "B", "114,688", "B"]
    assert rows["f16"][:3] == ["f16", "16", "2,048"]
    with_tail = json.loads(tqgguf("inspect", MODEL, "--ctx", "2048,100", "--json").stdout)["rows"]
    per_row = 4 * 2 * (2 * 64 * 2 + 4)  # layers, K and V; an owner's number of four bytes
    (pqo3,) = (row for row in with_tail if row["type"] == "pqo3")
    assert pqo3["bytes"] == [917504 + (128 + 4) * per_row, 114688 + (128 + 4) * per_row]
    assert with_tail[0]["bytes"][0] == 2048 * 2048


def test_inspect_json(tqgguf: Command) -> None:
    data = json.loads(tqgguf("inspect", MODEL, "--json").stdout)
    assert data["contexts"] == [data["info"]["n_ctx_train"]]
    assert [row["type"] for row in data["rows"]] == list(PREFERRED_TYPES)
    for row in data["rows"]:
        tail = 4 * 2 * (128 + 4) * (2 * 64 * 2 + 4) if CACHE_TYPES[row["type"]].ours else 0
        assert row["bytes"] == [data["contexts"][0] * row["bytes_per_token"] + tail]
        assert row["bits"] == CACHE_TYPES[row["type"]].bits


def test_inspect_gives_the_reason_a_type_cannot_be_used(tqgguf: Command, random_model: Callable[..., Path]) -> None:
    path = str(random_model(head_dim=80))
    done = tqgguf("inspect", path)
    assert done.returncode == 0
    assert "pqo3: layer 0: head_dim of K is 80, not divisible by 32" in done.stdout.replace("\n", " ")
    data = json.loads(tqgguf("inspect", path, "--json").stdout)
    assert data["rows"][0]["obstacle"] is None and "80" in data["rows"][4]["obstacle"]


def test_doctor(tqgguf: Command) -> None:
    done = tqgguf("doctor")
    assert done.returncode == 0, done.stdout
    assert "WRONG" not in done.stdout and "libtqgguf" in done.stdout and "portable" in done.stdout
    data = json.loads(tqgguf("doctor", "--json", env={"TQGGUF_KERNEL": "portable"}).stdout)
    assert data["ok"] and data["kernel"] == "portable" and data["kernels"]["portable"]
    assert {check["name"] for check in data["checks"]} >= {"tqgguf", "libtqgguf", "kernel", "llama_cpp", "libraries"}


def test_doctor_finds_what_is_wrong(tqgguf: Command) -> None:
    done = tqgguf("doctor", "--json", env={"TQGGUF_KERNEL": "sse9"})
    assert done.returncode == 1
    (wrong,) = [check for check in json.loads(done.stdout)["checks"] if not check["ok"]]
    assert wrong["name"] == "libtqgguf" and "sse9" in wrong["detail"]


def test_the_upstream_pin_is_that_of_the_patches() -> None:
    from tqgguf.diagnostics.installation import UPSTREAM_VERSION

    pin = Path(__file__).parents[2] / "patches" / "upstream.toml"
    assert f'version = "{UPSTREAM_VERSION}"' in pin.read_text()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "COMMAND"),
        (["fly"], "fly"),
        (["run", MODEL], "--prompt"),
        (["run", MODEL, "-p", "x", "--cache", "q9"], "unknown cache type 'q9'; valid types are f32"),
        (["run", MODEL, "-p", "x", "--cache-v", "300"], "unknown cache type"),
        (["run", MODEL, "-p", "x", "-n", "-3"], "must be an integer between"),
        (["run", MODEL, "-p", "x", "--ctx", "many"], "must be an integer between"),
        (["run", MODEL, "-p", "x", "--temp", "-1"], "between 0 and 100"),
        (["run", MODEL, "-p", "x", "--temp", "nan"], "between 0 and 100"),
        (["fit", MODEL, "--memory=-8G"], "--memory: must be a size such as 8G, 8GiB, 512M or 1.5G, not '-8G'"),
        (["fit", MODEL, "--memory", "8G", "--vram=-.5G"], "not '-.5G'"),
        (["inspect", MODEL, "--ctx", "1024,,5"], "must be an integer between"),
        (["inspect"], "model"),
    ],
)
def test_usage_errors_are_2_and_go_to_stderr(tqgguf: Command, args: list[str], said: str) -> None:
    done = tqgguf(*args)
    assert done.returncode == 2 and done.stdout == ""
    assert said in done.stderr


@pytest.mark.parametrize("command", [["run", "-p", "x"], ["chat"], ["inspect"]])
def test_failures_are_1_and_one_line(tqgguf: Command, tmp_path: Path, command: list[str]) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"nothing of the kind")
    for path, said in (
        (tmp_path / "missing.gguf", "does not exist"),
        (other, "not a GGUF file"),
        (tmp_path, "not a file"),
    ):
        done = tqgguf(command[0], str(path), *command[1:])
        assert done.returncode == 1 and done.stdout == ""
        assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_head_size_that_does_not_fit_fails(tqgguf: Command, random_model: Callable[..., Path]) -> None:
    done = tqgguf("run", str(random_model(head_dim=80)), "-p", "x")
    assert done.returncode == 1 and "layer 0: head_dim of K is 80" in done.stderr


@pytest.mark.parametrize("command", ["run", "chat", "serve", "fit", "inspect", "compare", "tune", "demo", "doctor"])
def test_help_has_an_example(tqgguf: Command, command: str) -> None:
    done = tqgguf(command, "--help")
    assert done.returncode == 0 and f"example: tqgguf {command}" in done.stdout


def test_version(tqgguf: Command) -> None:
    assert tqgguf("--version").stdout.strip() == f"tqgguf {__version__}"


def test_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    command = f"'{sys.executable}' -m tqgguf inspect '{MODEL}' --json 2>'{tmp_path}/err' | true; cat '{tmp_path}/err'"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == ""
