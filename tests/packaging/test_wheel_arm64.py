"""The wheel for ARM64 Linux on a machine of another architecture: Debian's Python for ARM64 runs it under qemu-user.

    make wheel-arm64 wheel-check-arm64

which calls tools/arm64_python.sh for that Python. On an ARM64 machine `make wheel-check` checks the wheel without qemu.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from installed import ANSWER, assert_demo_streams, assert_server_streams, variants

from tqgguf._native.programs import PROGRAMS

pytestmark = [
    pytest.mark.wheel,
    pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="needs qemu-aarch64 (Debian: qemu-user)"),
]

Command = Callable[..., "subprocess.CompletedProcess[str]"]

ARM64 = Path(__file__).parents[2] / "build/arm64"
ROOT = ARM64 / "root"
BEST = "max,pauth-impdef=on,sve-max-vq=1"
"""All that qemu knows, with vectors of 128 bits as most processors have; signing of addresses that is no work."""
PATIENCE = 3600


@pytest.fixture(scope="session")
def emulated(environ: dict[str, str]) -> dict[str, str]:
    """Environment variables by which qemu finds the libraries of ARM64, and emulates the best processor."""
    return {**environ, "QEMU_LD_PREFIX": str(ROOT), "QEMU_CPU": BEST, "COLUMNS": "500"}


@pytest.fixture(scope="session")
def arm64_environment(wheel: Path, emulated: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and what it depends on: the first two of a user's three commands.

    `python -m venv` would start pip as a program, which only a kernel with qemu in its binfmt_misc can. So pip is run
    from its wheel, and llama.cpp's programs are started by scripts.
    """
    folder = tmp_path_factory.mktemp("arm64") / "env"
    (pip,) = (ROOT / "usr/share/python-wheels").glob("pip-*.whl")
    qemu = ["qemu-aarch64"]
    for words in (
        [ROOT / "usr/bin/python3", "-m", "venv", "--without-pip", folder],
        [folder / "bin/python3", pip / "pip", "install", "--quiet", "--no-compile", wheel],
    ):
        subprocess.run([*qemu, *words], check=True, env=emulated, cwd=folder.parent, timeout=PATIENCE)
    (lib,) = folder.glob("lib/python*/site-packages/tqgguf/lib")
    for name in PROGRAMS:
        program = (lib / name).rename(lib / f"{name}.arm64")
        (lib / name).write_text(f'#!/bin/sh\nexec qemu-aarch64 "{program}" "$@"\n')
        (lib / name).chmod(0o755)
    return folder


@pytest.fixture
def tqgguf(arm64_environment: Path) -> list[str]:
    """The words that start tqgguf of the wheel."""
    return ["qemu-aarch64", str(arm64_environment / "bin/python3"), "-m", "tqgguf"]


@pytest.fixture
def arm64(tqgguf: list[str], emulated: dict[str, str], tmp_path: Path) -> Command:
    """Runs tqgguf of the wheel on an emulated processor."""

    def call(*words: str | Path, cpu: str = BEST, **more: str) -> subprocess.CompletedProcess[str]:
        environ = {**emulated, "QEMU_CPU": cpu, **more}
        command = [*tqgguf, *map(str, words)]
        return subprocess.run(
            command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False
        )

    return call


def demo_model(environment: Path) -> Path:
    return next(environment.glob("lib/python*/site-packages/tqgguf/demo/demo.gguf"))


def test_three_commands_to_a_streamed_answer(tqgguf: list[str], emulated: dict[str, str], tmp_path: Path) -> None:
    assert_demo_streams(tqgguf, emulated, tmp_path)


def test_three_commands_to_a_server(
    tqgguf: list[str], arm64_environment: Path, emulated: dict[str, str], tmp_path: Path
) -> None:
    assert_server_streams(tqgguf, demo_model(arm64_environment), emulated, tmp_path)


def test_compare(arm64: Command, arm64_environment: Path) -> None:
    options = ("--cache", "f16,pqo3", "--ctx", "256", "--chunks", "1", "--threads", "1")
    done = arm64("compare", demo_model(arm64_environment), *options)
    assert done.returncode == 0, done.stderr
    row = re.search(r"^pqo3\+128 +11\.88 +448 +(.*)$", done.stdout, re.MULTILINE)
    assert row, done.stdout
    assert re.search(r"^f16 +16 +2,048 ", done.stdout, re.MULTILINE), done.stdout


def test_programs_run(arm64: Command) -> None:
    for name in PROGRAMS:
        done = arm64(name, "--version")
        assert done.returncode == 0, (name, done.stderr)


@pytest.mark.parametrize(
    ("cpu", "variant", "best"),
    [("cortex-a72", "armv8.0_1", "neon"), ("neoverse-n1", "armv8.2_2", "dotprod"), (BEST, "armv8.6_2", "i8mm")],
)
def test_one_wheel_on_every_processor(arm64: Command, cpu: str, variant: str, best: str) -> None:
    """Without dot products, with them, and with products of matrices, too."""
    done = arm64("demo", "--cache", "pqo3", cpu=cpu)
    assert done.returncode == 0, done.stderr
    assert ANSWER in done.stdout and "KV cache pqo3, keys calibrated: 917,504 bytes" in done.stdout
    data = json.loads(arm64("doctor", "--json", cpu=cpu).stdout)
    details = {check["name"]: check["detail"] for check in data["checks"]}
    assert data["ok"] and data["kernel"] == best, data
    assert details["libggml-cpu"].startswith(f"{variant};"), details


def test_every_variant_gives_the_answer(arm64: Command, unpacked: Path) -> None:
    assert len(variants(unpacked)) == 4
    for name in variants(unpacked):
        done = arm64("demo", TQGGUF_CPU=name)
        assert done.returncode == 0 and ANSWER in done.stdout, (name, done.stdout, done.stderr)
    done = arm64("demo", cpu="cortex-a72", TQGGUF_CPU="armv8.2_2")
    assert done.returncode == 1 and "this processor cannot run armv8.2_2" in done.stderr
