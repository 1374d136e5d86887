"""The wheel on a processor of its architecture: a first-time user gets an answer, and the best variant gives it."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from installed import ANSWER, assert_demo_streams, assert_server_streams, build_id, variants

from tqgguf._native.programs import PROGRAMS

pytestmark = pytest.mark.wheel

Command = Callable[..., "subprocess.CompletedProcess[str]"]

ROOT = Path(__file__).parents[2]
LEAST = "armv8.0_1" if platform.machine() == "aarch64" else "sse42"
"""The variant that runs everywhere."""


def test_three_commands_to_a_streamed_answer(environment: Path, environ: dict[str, str], tmp_path: Path) -> None:
    """The third of them; `environment` is the first two."""
    assert_demo_streams([environment / "bin/tqgguf"], environ, tmp_path)


def test_three_commands_to_a_server(environment: Path, environ: dict[str, str], tmp_path: Path) -> None:
    """Which answers with the best variant of ggml-cpu, as a stream."""
    model = next(environment.glob("lib/python*/site-packages/tqgguf/demo/demo.gguf"))
    assert_server_streams([environment / "bin/tqgguf"], model, environ, tmp_path)


def test_programs_run(run: Command) -> None:
    for name in PROGRAMS:
        done = run("tqgguf", name, "--version")
        assert done.returncode == 0, (name, done.stderr)


def test_nothing_comes_from_the_repository(run: Command, environment: Path) -> None:
    code = "import sys, tqgguf, llama_cpp; print(tqgguf.__file__, llama_cpp.__file__, *sys.path, sep='\\n')"
    done = run("python", "-c", code)
    assert done.returncode == 0, done.stderr
    package, bindings, *path = done.stdout.splitlines()
    assert package.startswith(str(environment)) and bindings.startswith(str(environment))
    assert not [entry for entry in path if entry.startswith(str(ROOT))]
    assert "load_backend" not in done.stderr  # importing says nothing


def test_doctor_names_the_variant_and_a_better_one(run: Command, unpacked: Path) -> None:
    data = json.loads(run("tqgguf", "doctor", "--json").stdout)
    details = {check["name"]: check["detail"] for check in data["checks"]}
    assert data["ok"], data
    best = details["libggml-cpu"].split(";")[0]
    assert best in variants(unpacked) and best != LEAST
    done = run("tqgguf", "doctor", "--json", env={"TQGGUF_CPU": LEAST})
    data = json.loads(done.stdout)
    details = {check["name"]: check["detail"] for check in data["checks"]}
    assert data["ok"] and details["libggml-cpu"].startswith(
        f"TQGGUF_CPU={LEAST}, though {best} is better here; {LEAST};"
    )
    assert "AVX2" not in details["cpu"].split(", not ")[0]
    done = run("tqgguf", "demo", env={"TQGGUF_CPU": "z80"})
    assert done.returncode == 1 and "TQGGUF_CPU: z80 is none of" in done.stderr and "Traceback" not in done.stderr


def test_doctor_tells_build_ids(run: Command, unpacked: Path) -> None:
    data = json.loads(run("tqgguf", "doctor", "--json").stdout)
    details = {check["name"]: check["detail"] for check in data["checks"]}
    for name in ("libllama", "libggml-base"):
        assert f"build id {build_id(unpacked / f'tqgguf/lib/{name}.so')[:12]}" in details[name]


def test_every_variant_gives_the_answer(run: Command, unpacked: Path) -> None:
    n_run = 0
    for name in variants(unpacked):
        done = run("tqgguf", "demo", env={"TQGGUF_CPU": name})
        if done.returncode:
            assert f"this processor cannot run {name}" in done.stderr
            continue
        n_run += 1
        assert ANSWER in done.stdout, (name, done.stdout)
    assert n_run > 1


QEMU = shutil.which("qemu-x86_64") if platform.machine() == "x86_64" else None


@pytest.mark.skipif(QEMU is None, reason="needs x86-64 and qemu-x86_64 (Debian: qemu-user)")
@pytest.mark.parametrize(
    ("cpu", "variant", "active"),
    [("Nehalem", "sse42", "portable"), ("IvyBridge", "sse42", "portable"), ("Haswell", "haswell", "avx2")],
)
def test_one_wheel_on_lesser_processors(run: Command, cpu: str, variant: str, active: str) -> None:
    """Emulated processors without AVX, with AVX but not AVX2, and with AVX2 but not AVX-512."""
    qemu = (str(QEMU), "-cpu", cpu)
    if run("python", "-c", "import numpy", before=qemu).returncode:
        pytest.skip(f"the newest NumPy does not start on {cpu}")
    done = run("python", "-m", "tqgguf", "demo", "--cache", "pqo3", before=qemu)
    assert done.returncode == 0, done.stderr
    assert ANSWER in done.stdout and "KV cache pqo3, keys calibrated: 917,504 bytes" in done.stdout
    data = json.loads(run("python", "-m", "tqgguf", "doctor", "--json", before=qemu).stdout)
    details = {check["name"]: check["detail"] for check in data["checks"]}
    assert data["ok"] and data["kernel"] == active, data
    assert (
        details["libggml-cpu"].startswith(f"{variant};") and "icelake (not on this machine)" in details["libggml-cpu"]
    )


@pytest.mark.skipif(QEMU is None, reason="needs x86-64 and qemu-x86_64 (Debian: qemu-user)")
def test_a_processor_that_no_variant_is_for(run: Command, environment: Path, tmp_path: Path) -> None:
    package = tmp_path / "only" / "tqgguf"
    (installed,) = environment.glob("lib/python*/site-packages/tqgguf")
    shutil.copytree(installed, package)
    for path in (package / "lib").glob("libggml-cpu-*.so"):
        if "icelake" not in path.name:
            path.unlink()
    qemu = (str(QEMU), "-cpu", "Haswell")
    done = run("python", "-m", "tqgguf", "demo", before=qemu, env={"PYTHONPATH": str(package.parent)})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "this processor runs none of the CPU backends" in done.stderr and "(icelake)" in done.stderr
    (package / "lib/libggml-cpu-icelake.so").write_bytes(b"half a download")
    done = run("python", "-m", "tqgguf", "demo", env={"PYTHONPATH": str(package.parent)})
    assert done.returncode == 1 and "cannot load" in done.stderr and "reinstall" in done.stderr


@pytest.mark.parametrize(
    "file",
    ["tests/integration/test_llama.py", "tests/integration/test_threads.py", "tests/patches/test_llama_types.py"],
)
def test_models_on_the_installed_wheel(run: Command, file: str) -> None:
    """The tests of models, with the wheel's libraries in place of the build's."""
    assert run("pip", "install", "-q", "pytest", "hypothesis").returncode == 0
    done = run("pytest", "-q", "-p", "no:cacheprovider", str(ROOT / file))
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]
