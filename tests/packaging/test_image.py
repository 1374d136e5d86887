"""The container image that `make image` builds: it answers, keeps to its memory, runs as no root, and ends when asked.

make image image-check
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator

import pytest

pytestmark = pytest.mark.image

CONTAINER = os.environ.get("TQGGUF_CONTAINER", "docker")
IMAGE = os.environ.get("TQGGUF_IMAGE", "")
FIND_MODEL = "import tqgguf.demo, pathlib; print(pathlib.Path(tqgguf.demo.__file__).with_name('demo.gguf'))"
PATIENCE = 300.0


def container(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of docker or podman."""
    return subprocess.run([CONTAINER, *words], capture_output=True, text=True, timeout=PATIENCE, check=False)


def said(*words: str) -> str:
    """What a command that must not fail writes."""
    done = container(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="session")
def model() -> str:
    """The path of the demo model in the image."""
    return said("run", "--rm", "--entrypoint", "python3", IMAGE, "-c", FIND_MODEL)


@pytest.fixture
def running(model: str) -> Iterator[str]:
    """A container that serves the demo model."""
    limits = ("--memory", "512m", "--health-interval", "1s", "--publish", "127.0.0.1::8000")
    name = said("run", "--detach", *limits, IMAGE, model, "--cache", "pqo3")
    try:
        yield name
    finally:
        container("rm", "--force", name)


def test_it_answers_and_ends(running: str) -> None:
    address = said("port", running, "8000").splitlines()[0].rpartition(" ")[2]
    end = time.monotonic() + PATIENCE
    while said("inspect", "--format", "{{.State.Health.Status}}", running) != "healthy":
        assert time.monotonic() < end, container("logs", running).stderr
        time.sleep(0.5)
    body = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
    request = urllib.request.Request(f"http://{address}/v1/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
        answer = json.load(reply)
    assert answer["choices"][0]["message"]["content"].strip() == "The capital of France is Paris."
    assert said("exec", running, "id", "-u") == "10001"
    began = time.monotonic()
    said("stop", "-t", "60", running)
    assert time.monotonic() - began < 50, "it did not end when it was asked to"
    assert said("inspect", "--format", "{{.State.ExitCode}}", running) == "0"


def test_it_keeps_to_the_memory_of_the_container(model: str) -> None:
    many = ("--cache", "f16", "--parallel", "64", "--ctx", "4096")
    done = container("run", "--rm", "--memory", "256m", "--memory-swap", "256m", IMAGE, model, *many)
    assert done.returncode == 1 and "this process may use 268,435,456" in done.stderr, done.stderr


def test_what_may_be_written() -> None:
    """The home of its user can be written to, and no installed file can."""
    write = "touch $HOME/file && ! touch /opt/tqgguf/file"
    assert container("run", "--rm", "--entrypoint", "sh", IMAGE, "-c", write).returncode == 0
