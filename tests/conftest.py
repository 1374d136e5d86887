"""Fixtures that several test directories share: the library, its kernels, and small models written on the spot."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import here
import hypothesis
import pytest
from architectures import write_architecture
from models import write_model

hypothesis.settings.register_profile("default", deadline=None, max_examples=60)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a script's `make test &`: Ctrl-C is to be tested there, too
    signal.signal(signal.SIGINT, signal.default_int_handler)

MISSING = here.missing()

CACHE_FOLDER = tempfile.TemporaryDirectory(prefix="tqgguf-tests-")
os.environ["XDG_CACHE_HOME"] = CACHE_FOLDER.name  # what tests calibrate is not kept for the user
os.environ["TQGGUF_CALIBRATION"] = "off"  # a test that wants keys calibrated says so


def pytest_report_header() -> str:
    """Says what this machine has, and what it lacks."""
    kernels = here.kernels()
    absent = [name for name in here.KERNELS if name not in kernels]
    return f"kernels: {' '.join(kernels)}; left out: {'; '.join([' '.join(absent), *MISSING.values()])}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`kernel` is every kernel that runs here; tests/native/test_library.py proves that none is missing."""
    if "kernel" in metafunc.fixturenames:
        metafunc.parametrize("kernel", here.kernels(), indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests that need what this machine lacks, and marks those that run the emulated CUDA kernels."""
    here_too = [item for item in items if not any(item.get_closest_marker(name) for name in MISSING)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(here_too)])
    items[:] = here_too
    for item in items:
        if "cuda_build" in getattr(item, "fixturenames", ()) and not item.get_closest_marker("cuda"):
            item.add_marker("emulated")


@pytest.fixture(scope="session")
def native() -> Any:
    """The loaded libtqgguf."""
    from tqgguf import _native

    return _native.library()


@pytest.fixture
def kernel(request: pytest.FixtureRequest, native: Any) -> Iterator[str]:
    """Every kernel of this machine in turn, forced."""
    before = native.active_kernel()  # what TQGGUF_KERNEL forces is in force for the tests that follow, too
    native.force_kernel(request.param)
    assert native.active_kernel() == request.param
    yield request.param
    native.force_kernel(before)


@pytest.fixture
def tolerance(native: Any) -> float:
    """Relative error allowed to attention and dot products of the kernel in force (tests/native/test_attention.py)."""
    return 1e-3 if native.active_kernel() in here.INTEGER_SUMS else 1e-5


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python code, or a module with arguments, in a fresh process; the environment can be changed."""

    def call(
        *args: str, env: dict[str, str] | None = None, stdin: str = "", timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *args],
            env={**os.environ, **(env or {})},
            cwd=tmp_path,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return call


class Worker:
    """`tqgguf worker`, or another command that is one, in a process of its own, with one thread.

    Attributes:
        name: "host:port", as clients are told.
        allocated: bytes of each buffer that clients had it allocate, in their order.
    """

    def __init__(self, log: Path, *args: str, port: int = 0) -> None:
        self.log = log
        command = [sys.executable, *(args or ("-m", "tqgguf", "worker", "--threads", "1")), "--port", str(port)]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, env={**os.environ, "GGML_RPC_DEBUG": "1"}, stdout=output, stderr=output
            )
        self.name = self.wait(r"listening on (127\.0\.0\.1:\d+)")[1]
        self.port = int(self.name.partition(":")[2])

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, pattern: str) -> re.Match[str]:
        end = time.monotonic() + 20
        while not (match := re.search(pattern, self.said)):
            assert time.monotonic() < end and self.process.poll() is None, self.said
            time.sleep(0.01)
        return match

    @property
    def allocated(self) -> list[int]:
        return [int(size) for size in re.findall(r"\[alloc_buffer\] device: 0, size: (\d+)", self.said)]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Worker]]:
    """Starts workers; those that are still there when the tests of a file are done are killed."""
    pytest.importorskip("tqgguf.model.workers")
    folder, started = tmp_path_factory.mktemp("workers"), []

    def start(*args: str, **options: Any) -> Worker:
        started.append(Worker(folder / f"{len(started)}.log", *args, **options))
        return started[-1]

    yield start
    for each in started:
        each.kill()


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Path of a random model of the given shape; the same shape is written once."""
    directory = tmp_path_factory.mktemp("models")
    written: dict[tuple[Any, ...], Path] = {}

    def model(**shape: Any) -> Path:
        key = tuple(sorted(shape.items()))
        if key not in written:
            written[key] = write_model(directory / f"random-{len(written)}.gguf", **shape)
        return written[key]

    return model


@pytest.fixture(scope="session")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Path of a random model of a named architecture (tests/support/architectures.py); each is written once."""
    directory = tmp_path_factory.mktemp("architectures")

    @functools.cache
    def model(name: str) -> Path:
        return write_architecture(directory / f"{name}.gguf", name)

    return model
