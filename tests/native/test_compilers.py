"""The kernels compile with Clang as well as with GCC: what one takes for a constant the other may not."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RULES = (ROOT / "native" / "CMakeLists.txt").read_text()
ZIG = ROOT / ".venv" / "bin" / "python-zig"
CLANG = [str(ZIG), "cc"] if ZIG.exists() else [found] if (found := shutil.which("clang")) else []


def options_of(name: str) -> list[str]:
    """Options of instruction sets that the build gives to a file."""
    rule = r"set_source_files_properties\(([^)]*?) PROPERTIES COMPILE_OPTIONS\s+\"(.*?)\""
    for files, options in re.findall(rule, RULES):
        if f"src/cpu/{name}" in files.split():
            return [option for option in options.split(";") if option.startswith("-m")]
    return []


@pytest.mark.skipif(not CLANG, reason="there is no Clang: it comes with make build/wheel-tools, too")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the options are those of x86-64")
@pytest.mark.parametrize("name", ["avx2.c", "trellis_avx2.c", "avx512.c", "trellis_avx512.c", "portable.c"])
def test_clang_compiles(tmp_path: Path, name: str) -> None:
    if "portable" not in name:
        assert options_of(name), f"the build gives {name} no instruction set"
    folders = [f"-I{ROOT / 'native' / folder}" for folder in ("include", "src", "src/cpu")]
    command = [*CLANG, "-std=gnu11", "-O1", *options_of(name), *folders, "-c", str(ROOT / "native/src/cpu" / name)]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "kernel.o")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
