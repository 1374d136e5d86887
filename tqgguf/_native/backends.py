"""ggml's backends in this process: loads them where they are files of their own, and knows which one computes.

A build for one machine has its CPU backend, `libggml-cpu`, linked in. A wheel for any machine has variants of it,
`libggml-cpu-NAME`, each compiled for certain instructions, and llama.cpp can do nothing before one is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from ..errors import LibraryError
from .libggml import address, base, ffi, library_of, pointer
from .library import LIB_DIR, library_path

VARIABLE: Final = "TQGGUF_CPU"
"""Environment variable that names the variant to take, instead of the best one."""


def cpu_variants() -> dict[str, Path]:
    """The variants of the CPU backend in this installation, by name; none where it is linked in."""
    before, after = library_path("ggml-cpu-*").name.split("*")
    found = sorted(LIB_DIR.glob(f"{before}*{after}"))
    return {path.name[len(before) : len(path.name) - len(after)]: path for path in found}


def score(path: Path) -> int:
    """What a variant is worth on this processor: 0 if that lacks instructions the variant needs, else more is better.

    Raises:
        LibraryError: the file cannot be loaded, or is no variant.
    """
    try:
        lib = ffi().dlopen(str(path))
        value = int(lib.ggml_backend_score())
    except (OSError, AttributeError) as error:
        raise LibraryError(f"cannot load {path}: {error}; reinstall tqgguf") from None
    ffi().dlclose(lib)
    return value


def load_backends() -> None:
    """Loads the best CPU backend for this processor, or the one that TQGGUF_CPU names, unless there is one already.

    Other backends that lie beside it (libggml-cuda, say) are loaded if they can be: a wheel with CUDA must work where
    there is no driver. `tqgguf doctor` tells which were not.

    Raises:
        LibraryError: a variant is damaged, none runs on this processor, or TQGGUF_CPU names one that does not.
    """
    variants = cpu_variants()
    if not variants or cpu_backend_path() is not None:
        return
    name = chosen(variants)
    lib = library_of("ggml")
    with _quiet() as said:
        others = {path for path in LIB_DIR.glob(library_path("ggml-*").name) if path not in variants.values()}
        for path in sorted(others - {library_path("ggml-base")}):
            lib.ggml_backend_load(os.fsencode(path))
        if not lib.ggml_backend_load(os.fsencode(variants[name])):
            raise LibraryError(f"ggml did not take {variants[name]}: {''.join(said).strip() or 'it gave no reason'}")


def chosen(variants: dict[str, Path]) -> str:
    """Name of the variant to load: the one that TQGGUF_CPU names, or the best.

    Raises:
        LibraryError: as for `load_backends`.
    """
    forced = os.environ.get(VARIABLE)
    if forced:
        if forced not in variants:
            raise LibraryError(f"environment variable {VARIABLE}: {forced} is none of {', '.join(variants)}")
        if score(variants[forced]) == 0:
            raise LibraryError(f"environment variable {VARIABLE}: this processor cannot run {forced}")
        return forced
    scores = {name: score(path) for name, path in variants.items()}
    best = max(scores, key=lambda name: scores[name])
    if scores[best] == 0:
        raise LibraryError(
            f"this processor runs none of the CPU backends in {LIB_DIR} ({', '.join(variants)}): "
            f"build tqgguf on this machine (pip install . in its source)"
        )
    return best


def cpu_function(name: bytes) -> int | None:
    """The address of a function of what computes on the CPU; None if nothing does yet, or it has no such function."""
    backend = library_of("ggml").ggml_backend_reg_by_name(b"CPU")
    return address(base().ggml_backend_reg_get_proc_address(backend, name)) or None if backend else None


def cpu_backend_path() -> Path | None:
    """The library that computes on the CPU in this process; None if there is none yet."""
    if not library_of("ggml").ggml_backend_reg_by_name(b"CPU"):
        return None
    function = cpu_function(b"ggml_backend_set_n_threads")
    symbol = ffi().new("struct Dl_info *")
    if not function or not ffi().dlopen(None).dladdr(pointer("void *", function), symbol) or not symbol.dli_fname:
        raise LibraryError("the CPU backend of this process is in no library; reinstall tqgguf")
    return Path(os.fsdecode(ffi().string(symbol.dli_fname)))


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Keeps what ggml logs, which would say on every import that a backend was loaded."""
    said: list[str] = []

    @ffi().callback("ggml_log_callback")  # type: ignore[untyped-decorator]
    def take(_level: int, text: Any, _data: Any) -> None:
        said.append(ffi().string(text).decode("utf-8", "replace"))

    callback, data = ffi().new("ggml_log_callback *"), ffi().new("void **")
    base().ggml_log_get(callback, data)
    base().ggml_log_set(take, ffi().NULL)
    try:
        yield said
    finally:
        base().ggml_log_set(callback[0], data[0])
