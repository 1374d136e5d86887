"""`import llama_cpp` and `import tqgguf` in any order and environment: our libraries, or a clear error."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tqgguf import _native
from tqgguf._native.library import declarations, read_header

pytestmark = pytest.mark.model

Python = Callable[..., Any]

SHOW = (
    "; print(llama_cpp.__file__, llama_cpp.llama_cpp._lib._name, *tqgguf._native.loaded_libraries()['tqgguf'], sep='|')"
)


def fake_stock(directory: Path, lib: Path | None) -> str:
    """A `llama_cpp` package as pip would install it, with a library of its own; returns a PYTHONPATH that finds it."""
    package = directory / "llama_cpp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from .llama_cpp import *\n__version__ = '0.0.1'\n")
    name = str(lib) if lib else str(package / "lib" / "libllama.so")
    (package / "llama_cpp.py").write_text(f"class _lib:\n    _name = {name!r}\n")
    return os.pathsep.join([str(directory), *filter(None, sys.path)])


@pytest.mark.parametrize("order", ["tqgguf, llama_cpp", "llama_cpp, tqgguf"])
def test_both_orders_give_our_libraries(python: Python, order: str) -> None:
    done = python("-c", f"import {order}{SHOW}")
    if order.startswith("llama_cpp") and done.returncode:
        # A source tree on PYTHONPATH has no llama_cpp.py beside the package; an installed wheel has.
        assert "No module named 'llama_cpp'" in done.stderr
        pytest.skip("tqgguf is not installed, so there is no top-level llama_cpp")
    assert done.returncode == 0, done.stderr
    bindings, libllama, libtqgguf = done.stdout.strip().split("|")
    assert Path(bindings).parent.parent.samefile(_native.LIB_DIR.parent / "_bindings")
    assert Path(libllama).parent.samefile(_native.LIB_DIR)
    assert Path(libtqgguf).samefile(_native.library_path())


def test_loading_a_model_maps_one_libtqgguf(python: Python) -> None:
    code = (
        "import tqgguf, numpy\n"
        "tqgguf.quantize(numpy.ones(32, 'f4'), 'pqo3')\n"
        "tqgguf.Llama(tqgguf.demo.model.MODEL_PATH, verbose=False)\n"
        "print(len(tqgguf._native.loaded_libraries()['tqgguf']))"
    ).replace("import tqgguf,", "import tqgguf.demo.model,")
    done = python("-c", code)
    assert done.stdout.strip() == "1", done.stderr


def test_stock_bindings_imported_first_are_an_error(python: Python, tmp_path: Path) -> None:
    path = fake_stock(tmp_path / "site", None)
    done = python("-c", "import llama_cpp, tqgguf", env={"PYTHONPATH": path})
    assert done.returncode != 0
    said = done.stderr.splitlines()[-1]
    assert "imported before tqgguf" in said and str(tmp_path / "site") in said and "Import tqgguf first" in said


def test_tqgguf_first_wins_over_installed_stock_bindings(python: Python, tmp_path: Path) -> None:
    path = fake_stock(tmp_path / "site", None)
    done = python("-c", f"import tqgguf, llama_cpp{SHOW}", env={"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) not in done.stdout


def test_stock_bindings_on_our_libraries_load_no_model(python: Python, tmp_path: Path) -> None:
    path = fake_stock(tmp_path / "site", _native.library_path("llama"))
    code = "import llama_cpp, numpy, tqgguf; tqgguf.quantize(numpy.ones(32, 'f4'), 'pqo3'); print('fine')"
    done = python("-c", code, env={"PYTHONPATH": path})
    assert done.stdout.strip() == "fine", done.stderr
    done = python("-c", "import llama_cpp, tqgguf; tqgguf.Llama", env={"PYTHONPATH": path})
    said = done.stderr.splitlines()[-1]
    assert "LibraryError" in said and str(tmp_path / "site") in said and "lacks what tqgguf mends" in said


def test_a_library_path_of_somebody_else_is_an_error(python: Python, tmp_path: Path) -> None:
    for code in ("import tqgguf, llama_cpp", "import tqgguf; tqgguf.Llama"):
        done = python("-c", code, env={"LLAMA_CPP_LIB_PATH": str(tmp_path)})
        assert done.returncode == 1 and "LibraryError" in done.stderr
    done = python("-m", "tqgguf", "demo", env={"LLAMA_CPP_LIB_PATH": str(tmp_path)})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    done = python("-m", "tqgguf", "doctor", env={"LLAMA_CPP_LIB_PATH": str(tmp_path)})
    assert done.returncode == 1 and "WRONG" in done.stdout and "Traceback" not in done.stderr
    done = python("-c", "import tqgguf; tqgguf.Llama", env={"LLAMA_CPP_LIB_PATH": str(tmp_path)})
    assert done.returncode != 0
    assert "LLAMA_CPP_LIB_PATH" in done.stderr and str(tmp_path) in done.stderr and "unset" in done.stderr
    done = python("-c", "import tqgguf; print('fine')", env={"LLAMA_CPP_LIB_PATH": str(_native.LIB_DIR)})
    assert done.stdout.strip() == "fine", done.stderr


SPINS = "import os, tqgguf; tqgguf.Llama; print(os.environ.get('GOMP_SPINCOUNT'))"


def test_threads_that_wait_do_not_spin_for_long_unless_somebody_says_so(python: Python) -> None:
    clean = {"OMP_WAIT_POLICY": "", "GOMP_SPINCOUNT": ""}
    del_both = "import os; os.environ.pop('OMP_WAIT_POLICY'); os.environ.pop('GOMP_SPINCOUNT'); "
    assert python("-c", del_both + SPINS, env=clean).stdout == "1000\n"
    assert python("-c", SPINS, env={"GOMP_SPINCOUNT": "7"}).stdout == "7\n"
    only_policy = "import os; os.environ.pop('GOMP_SPINCOUNT'); "
    env = {**clean, "OMP_WAIT_POLICY": "active"}
    assert python("-c", only_policy + SPINS, env=env).stdout == "None\n"


def test_importing_loads_nothing_heavy(python: Python) -> None:
    done = python(
        "-c", "import sys, tqgguf; print([m for m in ('numpy', 'cffi', 'llama_cpp', 'rich') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def linked_tree(root: Path, *without: str) -> tuple[Path, dict[str, str]]:
    """A tqgguf of links to the real one, less some entries, and the environment in which Python finds it."""
    source = _native.LIB_DIR.parent
    tree = root / "tree" / "tqgguf"
    tree.mkdir(parents=True)
    for entry in source.iterdir():
        if entry.name not in (*without, "__pycache__"):
            (tree / entry.name).symlink_to(entry.resolve())
    return tree, {"PYTHONPATH": os.pathsep.join([str(tree.parent), *filter(None, sys.path)])}


def test_a_tree_that_is_not_built_says_what_to_type(python: Python, tmp_path: Path) -> None:
    _, env = linked_tree(tmp_path, "lib", "_bindings")
    for code in ("tqgguf.Llama", "tqgguf.quantize(__import__('numpy').ones(32, 'f4'), 'pqo3')"):
        done = python("-c", f"import tqgguf; {code}", env=env)
        assert done.returncode != 0
        assert "not built" in done.stderr and "type `make`" in done.stderr, done.stderr
    done = python("-c", "import tqgguf; print(tqgguf.reference.BLOCK)", env=env)
    assert done.stdout.strip() == "32", done.stderr


@pytest.fixture(scope="module")
def other_abi(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A tqgguf whose libtqgguf is of another ABI version, and does nothing else."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    tree, env = linked_tree(tmp_path_factory.mktemp("abi"), "lib")
    (tree / "lib").mkdir()
    for library in _native.LIB_DIR.iterdir():
        if library.name != _native.library_path().name:
            (tree / "lib" / library.name).symlink_to(library.resolve())
    source = tree.parent / "other.c"
    names = {*re.findall(r"\b(tq_\w+)\(", declarations(read_header()))} - {"tq_abi_version"}
    assert len(names) > 20
    source.write_text("int tq_abi_version(void) { return 99; }" + "".join(f"void {name}(void) {{}}" for name in names))
    library = tree / "lib" / _native.library_path().name
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return tree, {**env, "LLAMA_CPP_LIB_PATH": str(tree / "lib")}  # this process has set it for itself


@pytest.mark.parametrize(
    "code",
    [
        "import tqgguf, numpy; tqgguf.quantize(numpy.ones(32, 'f4'), 'pqo3')",
        "import tqgguf; tqgguf.Llama",
        "import tqgguf, llama_cpp",
    ],
)
def test_a_libtqgguf_of_another_abi_is_an_error(
    python: Python, other_abi: tuple[Path, dict[str, str]], code: str
) -> None:
    tree, env = other_abi
    done = python("-c", code, env=env)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "LibraryError" in said
    assert f"{tree / 'lib' / _native.library_path().name} has ABI version 99" in said
    assert f"needs {_native.abi_version_expected()}" in said and "rebuild" in said


def test_commands_tell_of_another_abi(python: Python, other_abi: tuple[Path, dict[str, str]]) -> None:
    _, env = other_abi
    done = python("-m", "tqgguf", "demo", env=env)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "has ABI version 99" in done.stderr
    done = python("-m", "tqgguf", "doctor", env=env)
    assert done.returncode == 1 and done.stdout.count("has ABI version 99") == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["ggml-base", "ggml-cpu"])
def test_libggml_refuses_another_abi_where_no_python_asks(
    python: Python, other_abi: tuple[Path, dict[str, str]], name: str
) -> None:
    tree, _ = other_abi
    for directory, status in ((_native.LIB_DIR, 0), (tree / "lib", 1)):
        path = directory / _native.library_path(name).name
        done = python("-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1]); print('loaded')", str(path))
        assert done.returncode == status and (done.stdout == "loaded\n") == (status == 0)
    # libggml-cpu needs libggml-base, which is asked first
    expected = f"was built for ABI version {_native.abi_version_expected()} of libtqgguf, but loaded one with 99"
    assert f"tqgguf: libggml-base {expected}" in done.stderr and len(done.stderr.splitlines()) == 1
    assert f"lib{name} was built for ABI version".encode() in _native.library_path(name).read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="LD_LIBRARY_PATH is read on Linux")
@pytest.mark.parametrize("which", ["another build", "another version"])
def test_other_libraries_on_the_search_path_are_an_error(python: Python, tmp_path: Path, which: str) -> None:
    """LD_LIBRARY_PATH goes before what our libraries say of where the others lie."""
    for path in _native.LIB_DIR.glob("libggml*"):
        if which == "another build":
            shutil.copy(path, tmp_path)
        elif compiler := shutil.which("cc"):
            shared = (compiler, "-shared", f"-Wl,-soname,{path.name}", "-o", str(tmp_path / path.name), "-xc", "-")
            subprocess.run(shared, input=b"int of_another_version;", check=True)
        else:
            pytest.skip("needs a C compiler")
    done = python("-m", "tqgguf", "demo", env={"LD_LIBRARY_PATH": str(tmp_path)})
    assert done.returncode == 1 and done.stderr.startswith("tqgguf: error: ")
    assert done.stderr.rstrip().endswith("LD_LIBRARY_PATH may lead to other libraries: unset it, or take them out")
    assert ("undefined symbol" if which == "another version" else f"{tmp_path}/libggml-base") in done.stderr
