"""Finds and loads the native libraries, once, and ties the `llama_cpp` bindings to them."""

from __future__ import annotations

from .backends import cpu_backend_path, cpu_variants
from .bindings import claim_llama_cpp, import_llama_cpp
from .library import LIB_DIR, abi_version_expected, check, library, library_path, loaded_libraries

__all__ = [
    "LIB_DIR",
    "abi_version_expected",
    "check",
    "claim_llama_cpp",
    "cpu_backend_path",
    "cpu_variants",
    "import_llama_cpp",
    "library",
    "library_path",
    "loaded_libraries",
]
