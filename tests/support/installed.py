"""What tests of a wheel ask of it, on this machine's processor and on an emulated one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import urllib.request
from collections.abc import Sequence
from pathlib import Path

ANSWER = "The capital of France is Paris."


def variants(unpacked: Path) -> list[str]:
    """The variants of ggml-cpu in a wheel.

    Args:
        unpacked: the folder of its files.
    """
    return sorted(path.stem.removeprefix("libggml-cpu-") for path in (unpacked / "tqgguf/lib").glob("libggml-cpu-*.so"))


def build_id(path: Path) -> str:
    """The build id of a library of any architecture; its name if it has none."""
    found = re.findall(r"Build ID: ([0-9a-f]{40})", subprocess.check_output(["readelf", "-n", path], text=True))
    return found[0] if len(found) == 1 else path.name


def assert_demo_streams(tqgguf: Sequence[str | Path], environ: dict[str, str], cwd: Path) -> None:
    """Asserts that `tqgguf demo --cache pqo3` answers, and that the answer comes in pieces.

    Args:
        tqgguf: the words that start tqgguf.
        environ: environment variables.
        cwd: the folder to start it in.
    """
    # A pipe of packets: every write of the program is one read.
    source, sink = os.pipe2(os.O_DIRECT)  # type: ignore[attr-defined,unused-ignore]
    command = [*tqgguf, "demo", "--cache", "pqo3"]
    process = subprocess.Popen(command, stdout=sink, stderr=subprocess.PIPE, env=environ, cwd=cwd)
    os.close(sink)
    packets = list(iter(lambda: os.read(source, 1 << 16), b""))
    os.close(source)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors.decode()
    text = b"".join(packets).decode()
    assert f"{ANSWER}\n" in text and "KV cache pqo3, keys calibrated: 917,504 bytes" in text
    pieces = [packet for packet in packets if packet.decode().strip() and packet.decode().strip() in ANSWER]
    assert len(pieces) > 3, packets


def assert_server_streams(tqgguf: Sequence[str | Path], model: Path, environ: dict[str, str], cwd: Path) -> None:
    """Asserts that `tqgguf serve` answers as a stream, and ends when it is asked to.

    Args:
        tqgguf: the words that start tqgguf.
        model: the demo model.
        environ: environment variables.
        cwd: the folder to start it in.
    """
    command = [*tqgguf, "serve", model, "--cache", "pqo3", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environ, cwd=cwd, text=True) as process:
        assert process.stderr
        try:
            said = ""
            while not (match := re.search(r"listening on (http://\S+)/v1 ", said)):
                line = process.stderr.readline()
                assert line, said
                said += line
            body = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
            request = urllib.request.Request(
                f"{match[1]}/v1/chat/completions", json.dumps({**body, "stream": True}).encode()
            )
            with urllib.request.urlopen(request, timeout=300) as reply:
                parts = [json.loads(line[6:]) for line in reply if line.startswith(b"data: {")]
            text = "".join(part["choices"][0]["delta"].get("content") or "" for part in parts if part["choices"])
            assert text.strip() == ANSWER and len(parts) > 3
        finally:
            process.terminate()
            process.communicate(timeout=60)
    assert process.returncode == 0
