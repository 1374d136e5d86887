"""Which variant of ggml's CPU backend is loaded: the best one, the one asked for, or none with the reason."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tqgguf._native import backends
from tqgguf.errors import LibraryError

ROOT = Path(__file__).parents[2]
SCORES = {"x64": 1, "haswell": 60, "icelake": 1500, "sapphirerapids": 0}


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Libraries that know nothing but what they are worth here."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("variants")
    for name, score in SCORES.items():
        source = folder / f"{name}.c"
        source.write_text(f"int ggml_backend_score(void) {{ return {score}; }}\n")
        subprocess.run(["cc", "-shared", "-o", folder / f"libggml-cpu-{name}.so", source], check=True)
    return {name: folder / f"libggml-cpu-{name}.so" for name in SCORES}


def test_the_best_that_runs_here_is_chosen(variants: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    assert {name: backends.score(path) for name, path in variants.items()} == SCORES
    assert backends.chosen(variants) == "icelake"
    assert backends.chosen({name: variants[name] for name in ("haswell", "x64")}) == "haswell"
    with pytest.raises(LibraryError, match=r"runs none of the CPU backends in .* \(sapphirerapids\): build tqgguf on"):
        backends.chosen({"sapphirerapids": variants["sapphirerapids"]})


def test_the_one_asked_for_is_chosen(variants: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.VARIABLE, "x64")
    assert backends.chosen(variants) == "x64"
    monkeypatch.setenv(backends.VARIABLE, "sapphirerapids")
    with pytest.raises(LibraryError, match="TQGGUF_CPU: this processor cannot run sapphirerapids"):
        backends.chosen(variants)
    monkeypatch.setenv(backends.VARIABLE, "z80")
    with pytest.raises(LibraryError, match="TQGGUF_CPU: z80 is none of x64, haswell, icelake, sapphirerapids"):
        backends.chosen(variants)


def test_a_damaged_variant_is_an_error(variants: dict[str, Path], tmp_path: Path) -> None:
    """Left out silently it would leave a slower one in its place."""
    damaged = tmp_path / "libggml-cpu-alderlake.so"
    damaged.write_bytes(variants["x64"].read_bytes()[:500])
    with pytest.raises(LibraryError, match=r"cannot load .*alderlake.so: .*; reinstall tqgguf"):
        backends.chosen({**variants, "alderlake": damaged})


def test_variants_are_found_by_their_files(
    variants: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "LIB_DIR", next(iter(variants.values())).parent)
    assert backends.cpu_variants() == dict(sorted(variants.items()))
    monkeypatch.setattr(backends, "LIB_DIR", tmp_path)
    for name in ("libggml-cpu.so", "libggml-base.so", "libggml-cuda.so"):
        (tmp_path / name).touch()
    assert backends.cpu_variants() == {}


def test_a_variant_that_is_loaded_is_known(tmp_path: Path) -> None:
    """Whatever is in its name: those of ARM64 have a dot."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    names = {f"libggml-cpu-{name}.so" for name in ("armv8.2_2", "haswell")}
    (tmp_path / "empty.c").write_text("int tq_empty;\n")
    for name in names:
        subprocess.run(["cc", "-shared", "-o", tmp_path / name, tmp_path / "empty.c"], check=True)
    code = "import ctypes, sys; from tqgguf import _native; [ctypes.CDLL(path) for path in sys.argv[1:]]; "
    code += "print(*(path.name for path in _native.loaded_libraries()['ggml']))"
    command = [sys.executable, "-c", code, *(str(tmp_path / name) for name in names)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == names
