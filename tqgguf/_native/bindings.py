"""Ties the `llama_cpp` bindings to the libraries of this package.

tqgguf carries a copy of the `llama_cpp` Python package in `_bindings/`, whose bugs patches/bindings mends. It loads
whatever directory LLAMA_CPP_LIB_PATH names, so two things must hold before it is first imported: the variable names our
`lib/`, and the package found is ours. If something else came first, the only honest answer is an error: stock libraries
know none of our types, and stock bindings on our libraries, which tqgguf can be imported beside, load no model.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Final

from ..errors import LibraryError
from .backends import load_backends
from .libggml import verify
from .library import LIB_DIR, NOT_BUILT, PACKAGE_DIR, library, library_path, loaded_libraries

BINDINGS_DIR: Final = PACKAGE_DIR / "_bindings"
SPINS: Final = "1000"
"""How often a thread of OpenMP looks whether the others have come before it sleeps. With GCC's own number of 300,000 a
thread that waits takes the processor from the one it waits for, where other processes want it, too: reading 256 tokens
of SmolLM2-135M with two threads on two busy processors took 2.9 to 15.4 s where one thread took 2.0 to 4.1 s; it takes
1.0 to 2.9 s with this one. On processors of its own a token takes 6.1 ms where it took 5.7 ms."""

VARIABLE: Final = "LLAMA_CPP_LIB_PATH"


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads the bundled bindings and ggml's backends, and looks at once which libraries they are; first of all at
    libtqgguf's version, for a wrong one would end the process when libggml meets it."""

    def exec_module(self, module: ModuleType) -> None:
        if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
            os.environ["GOMP_SPINCOUNT"] = SPINS  # libgomp reads it when it is loaded, which is now
        library()
        try:
            super().exec_module(module)
        except RuntimeError as error:  # of llama_cpp, which says which library and symbol
            raise LibraryError(f"{error}{_search_path()}") from None
        verify_libraries()
        load_backends()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds `llama_cpp`, and nothing else, in this package."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "llama_cpp":
            return None
        _refuse_other_libraries()
        file = BINDINGS_DIR / "llama_cpp" / "__init__.py"
        return importlib.util.spec_from_file_location(
            fullname, file, loader=_Loader(fullname, str(file)), submodule_search_locations=[str(file.parent)]
        )


def claim_llama_cpp() -> None:
    """Makes `import llama_cpp`, now or later, mean our bindings on our libraries.

    Called once when tqgguf is imported. In a source checkout that is not built there is nothing to claim: the parts
    that need no library work, and the others raise when they are used. If LLAMA_CPP_LIB_PATH names other libraries,
    importing `llama_cpp` raises, so that the command line can say why.

    Raises:
        LibraryError: `llama_cpp` is already loaded with other libraries.
    """
    if not library_path("llama").exists() or not (BINDINGS_DIR / "llama_cpp" / "__init__.py").exists():
        return
    loaded = sys.modules.get("llama_cpp")
    if loaded is not None and not _is_shim(loaded):
        origin = Path(getattr(loaded, "__file__", None) or "?").parent
        directory = _library_directory()
        if directory is not None and _same(directory, LIB_DIR):
            return
        raise LibraryError(
            f"llama_cpp was imported before tqgguf, from {origin}, with libraries in {directory or 'unknown places'}: "
            f"these do not know the cache types of tqgguf. Import tqgguf first (it brings its own llama_cpp)"
            + (f", or unset {VARIABLE}." if VARIABLE in os.environ else ".")
        )
    os.environ.setdefault(VARIABLE, str(LIB_DIR))
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _refuse_other_libraries() -> None:
    given = os.environ.get(VARIABLE)
    if given is not None and not _same(Path(given), LIB_DIR):
        raise LibraryError(f"{VARIABLE} is set to {given}, but tqgguf needs its own libraries in {LIB_DIR}: unset it")


@functools.cache
def import_llama_cpp() -> ModuleType:
    """The bundled `llama_cpp`, verified to run on our libraries, with ggml's backends loaded.

    Raises:
        LibraryError: the libraries are not built, other ones are loaded, or no CPU backend runs here.
    """
    if not library_path("llama").exists():
        raise LibraryError(f"{library_path('llama')} does not exist: {NOT_BUILT}")
    claim_llama_cpp()
    _refuse_other_libraries()
    library()
    module = importlib.import_module("llama_cpp")
    if not hasattr(getattr(module, "_internals", None), "Turns"):
        raise LibraryError(
            f"llama_cpp was imported before tqgguf, from {Path(getattr(module, '__file__', None) or '?').parent}: it "
            f"lacks what tqgguf mends in its own copy. Import tqgguf first (it brings its own llama_cpp)"
        )
    verify_libraries()
    load_backends()  # already done, unless somebody else imported llama_cpp on our libraries
    return module


def verify_libraries() -> None:
    """Raises LibraryError unless libllama, libggml* and the one libtqgguf of this process are of this build."""
    directory = _library_directory()
    if directory is not None and not _same(directory, LIB_DIR):
        raise LibraryError(f"llama_cpp loaded libllama from {directory}, not from {LIB_DIR}")
    mapped = loaded_libraries()
    if mapped is None:
        return
    for family in ("llama", "ggml", "tqgguf"):
        foreign = [path for path in mapped[family] if not _same(path.parent, LIB_DIR)]
        if foreign:
            raise LibraryError(
                f"{', '.join(map(str, foreign))} is loaded in this process beside tqgguf's libraries in {LIB_DIR}: "
                f"import tqgguf first, and not together with a stock llama-cpp-python{_search_path()}"
            )
        if not mapped[family]:
            raise LibraryError(f"lib{family} is not loaded, though llama_cpp is: {LIB_DIR} holds no patched libraries")
    if len(mapped["tqgguf"]) > 1:
        raise LibraryError(f"more than one libtqgguf is loaded: {', '.join(map(str, mapped['tqgguf']))}")
    verify()


def _search_path() -> str:
    """What may make the system take other libraries than those beside ours, for the end of a message."""
    given = [name for name in ("LD_LIBRARY_PATH", "LD_PRELOAD") if os.environ.get(name)]
    return f"; {' and '.join(given)} may lead to other libraries: unset it, or take them out" if given else ""


def _library_directory() -> Path | None:
    """Where the loaded bindings took libllama from; None if they are not loaded."""
    loaded = getattr(sys.modules.get("llama_cpp.llama_cpp"), "_lib", None)
    name = getattr(loaded, "_name", None)
    return Path(name).parent if isinstance(name, str) else None


def _is_shim(module: ModuleType) -> bool:
    """Whether this is the top-level `llama_cpp.py` of our wheel, which imports tqgguf and then steps aside."""
    return not hasattr(module, "__path__") and "llama_cpp.llama_cpp" not in sys.modules


def _same(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except OSError:
        return os.path.abspath(a) == os.path.abspath(b)
