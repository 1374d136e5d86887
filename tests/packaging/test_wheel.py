"""The wheel for any x86-64 Linux: what is in it, what its tag promises, and that a first-time user gets an answer."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tqgguf._native.programs import PROGRAMS

pytestmark = pytest.mark.wheel

Command = Callable[..., "subprocess.CompletedProcess[str]"]

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sys.executable).parent
ANSWER = "The capital of France is Paris."


@pytest.fixture(scope="session")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def variants(unpacked: Path) -> list[str]:
    return sorted(path.stem.removeprefix("libggml-cpu-") for path in (unpacked / "tqgguf/lib").glob("libggml-cpu-*.so"))


def test_every_library_is_there_and_nothing_else(unpacked: Path) -> None:
    files = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    libraries = {Path(name).name for name in files if ".so" in name}
    known = {f"lib{name}.so" for name in ("tqgguf", "ggml-base", "ggml", "ggml-rpc", "llama", "mtmd")}
    assert all(os.access(unpacked / "tqgguf/lib" / name, os.F_OK) for name in PROGRAMS)
    assert libraries == known | {f"libggml-cpu-{name}.so" for name in variants(unpacked)}
    assert "sse42" in variants(unpacked) and len(variants(unpacked)) > 2
    folders = {name.split("/")[0] for name in files}
    assert folders == {"tqgguf", "llama_cpp.py", next(name for name in folders if name.endswith(".dist-info"))}
    required = ("tqgguf/lib/LICENSE.llama.cpp", "tqgguf/_bindings/LICENSE.md", "tqgguf/demo/demo.gguf")
    for name in (*required, "tqgguf/py.typed", "tqgguf/__init__.pyi", "tqgguf/include/tq_ggml_cache.h"):
        assert name in files
    assert any(re.fullmatch(r"tqgguf-[\d.]+\.dist-info/licenses/LICENSE", name) for name in files)
    assert not any(name.endswith((".c", ".h.in", ".pyc", ".a")) or "/tests/" in name for name in files)


def test_every_cpu_backend_has_our_types(unpacked: Path) -> None:
    for name in variants(unpacked):
        data = (unpacked / f"tqgguf/lib/libggml-cpu-{name}.so").read_bytes()
        for symbol in (b"tq_ggml_flash_attn_ext\0", b"tq_ggml_set_rows\0", b"ggml_backend_score\0"):
            assert symbol in data, (name, symbol)


def test_libraries_name_no_folder_but_their_own(unpacked: Path) -> None:
    homes = {str(ROOT), str(Path.home()), "/tmp/", "/home/", "/root/", sys.prefix}
    folder = unpacked / "tqgguf/lib"
    for path in (*folder.glob("*.so"), *(folder / name for name in PROGRAMS)):
        data = path.read_bytes()
        assert not [home for home in homes if os.fsencode(home) in data], path.name
        dynamic = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
        assert re.findall(r"R(?:UN)?PATH.*\[(.*)\]", dynamic) in (["$ORIGIN"], []), (path.name, dynamic)
        needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
        own = {name for name in needed if (path.parent / name).is_file()}
        assert all(re.match(r"(lib(c|m|dl|pthread|rt)|ld-linux-x86-64)\.so", name) for name in needed - own), needed
        assert not own or "$ORIGIN" in dynamic


def test_the_tag_is_what_auditwheel_finds(wheel: Path) -> None:
    auditwheel = shutil.which("auditwheel", path=f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}")
    if auditwheel is None:
        pytest.skip("needs auditwheel (requirements-wheel.txt)")
    done = subprocess.run([auditwheel, "show", "--json", wheel], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    tags = re.search(r"py3-none-(.+)\.whl$", wheel.name)
    assert tags and tags[1].startswith("manylinux") and found["overall_tag"] in tags[1].split("."), found


def test_three_commands_to_a_streamed_answer(environment: Path, environ: dict[str, str], tmp_path: Path) -> None:
    """The third of them; `environment` is the first two."""
    # A pipe of packets: every write of the program is one read.
    source, sink = os.pipe2(os.O_DIRECT)  # type: ignore[attr-defined]
    command = [environment / "bin/tqgguf", "demo", "--cache", "pqo3"]
    process = subprocess.Popen(command, stdout=sink, stderr=subprocess.PIPE, env=environ, cwd=tmp_path)
    os.close(sink)
    packets = list(iter(lambda: os.read(source, 1 << 16), b""))
    os.close(source)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors.decode()
    text = b"".join(packets).decode()
    assert f"{ANSWER}\n" in text and "KV cache pqo3, keys calibrated: 917,504 bytes" in text
    pieces = [packet for packet in packets if packet.decode().strip() and packet.decode().strip() in ANSWER]
    assert len(pieces) > 3, packets


def test_the_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 60e6


def test_three_commands_to_a_server(environment: Path, environ: dict[str, str], tmp_path: Path) -> None:
    """Which answers with the best variant of ggml-cpu, as a stream."""
    model = next(environment.glob("lib/python*/site-packages/tqgguf/demo/demo.gguf"))
    command = [environment / "bin/tqgguf", "serve", model, "--cache", "pqo3", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environ, cwd=tmp_path, text=True) as process:
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
            with urllib.request.urlopen(request, timeout=120) as reply:
                parts = [json.loads(line[6:]) for line in reply if line.startswith(b"data: {")]
            text = "".join(part["choices"][0]["delta"].get("content") or "" for part in parts if part["choices"])
            assert text.strip() == ANSWER and len(parts) > 3
        finally:
            process.terminate()
            process.communicate(timeout=60)
    assert process.returncode == 0


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
    assert best in variants(unpacked) and best != "sse42"
    done = run("tqgguf", "doctor", "--json", env={"TQGGUF_CPU": "sse42"})
    data = json.loads(done.stdout)
    details = {check["name"]: check["detail"] for check in data["checks"]}
    assert data["ok"] and details["libggml-cpu"].startswith(f"TQGGUF_CPU=sse42, though {best} is better here; sse42;")
    assert "AVX2" not in details["cpu"].split(", not ")[0]
    done = run("tqgguf", "demo", env={"TQGGUF_CPU": "z80"})
    assert done.returncode == 1 and "TQGGUF_CPU: z80 is none of" in done.stderr and "Traceback" not in done.stderr


def test_every_library_has_a_build_id_of_its_own(run: Command, unpacked: Path) -> None:
    """Which `doctor` tells; the linker of the wheel writes none by itself."""
    notes = {}
    for path in (unpacked / "tqgguf/lib").glob("*.so"):
        found = re.findall(r"Build ID: ([0-9a-f]{40})", subprocess.check_output(["readelf", "-n", path], text=True))
        notes[path.name] = found[0] if len(found) == 1 else path.name
    assert all(re.fullmatch("[0-9a-f]{40}", each) for each in notes.values()), notes
    assert len(set(notes.values())) == len(notes)
    data = json.loads(run("tqgguf", "doctor", "--json").stdout)
    details = {check["name"]: check["detail"] for check in data["checks"]}
    assert f"build id {notes['libllama.so'][:12]}" in details["libllama"]
    assert f"build id {notes['libggml-base.so'][:12]}" in details["libggml-base"]


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


QEMU = shutil.which("qemu-x86_64")


@pytest.mark.skipif(QEMU is None, reason="needs qemu-x86_64 (Debian: qemu-user)")
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


@pytest.mark.skipif(QEMU is None, reason="needs qemu-x86_64 (Debian: qemu-user)")
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
