"""What is in a wheel, and what its tag promises. It may be of another architecture than this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from installed import build_id, variants

from tqgguf._native.programs import PROGRAMS

pytestmark = pytest.mark.wheel

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sys.executable).parent


def test_every_library_is_there_and_nothing_else(unpacked: Path) -> None:
    files = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    libraries = {Path(name).name for name in files if ".so" in name}
    known = {f"lib{name}.so" for name in ("tqgguf", "ggml-base", "ggml", "ggml-rpc", "llama", "mtmd")}
    assert all(os.access(unpacked / "tqgguf/lib" / name, os.F_OK) for name in PROGRAMS)
    assert libraries == known | {f"libggml-cpu-{name}.so" for name in variants(unpacked)}
    assert {"sse42", "armv8.0_1"} & set(variants(unpacked)) and len(variants(unpacked)) > 2
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
        assert all(
            re.match(r"(lib(c|m|dl|pthread|rt)|ld-linux-(x86-64|aarch64))\.so", name) for name in needed - own
        ), needed
        assert not own or "$ORIGIN" in dynamic


def test_the_tag_is_what_auditwheel_finds(wheel: Path) -> None:
    auditwheel = shutil.which("auditwheel", path=f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}")
    if auditwheel is None:
        pytest.skip("needs auditwheel (requirements-wheel.txt)")
    done = subprocess.run([auditwheel, "show", "--json", wheel], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    tags = re.search(r"py3-none-(.+)\.whl$", wheel.name)
    assert tags and tags[1].startswith("manylinux") and found["overall_tag"] in tags[1].split("."), found


def test_every_library_has_a_build_id_of_its_own(unpacked: Path) -> None:
    """Which `doctor` tells; the linker of the wheel writes none by itself."""
    notes = {path.name: build_id(path) for path in (unpacked / "tqgguf/lib").glob("*.so")}
    assert all(re.fullmatch("[0-9a-f]{40}", each) for each in notes.values()), notes
    assert len(set(notes.values())) == len(notes) > 8


def test_every_file_is_of_the_architecture_of_the_tag(wheel: Path, unpacked: Path) -> None:
    machine = "AArch64" if wheel.stem.endswith("_aarch64") else "X86-64"
    folder = unpacked / "tqgguf/lib"
    for path in (*folder.glob("*.so"), *(folder / name for name in PROGRAMS)):
        header = subprocess.run(["readelf", "-h", path], capture_output=True, text=True, check=True).stdout
        assert re.search(rf"Machine: .*{machine}$", header, re.MULTILINE), (path.name, header)


def test_the_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 60e6
