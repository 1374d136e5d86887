"""Finds and loads the native libraries, once, and ties the `llama_cpp` bindings to them."""

from __future__ import annotations

from .backends import cpu_backend_path as cpu_backend_path
from .backends import cpu_variants as cpu_variants
from .bindings import claim_llama_cpp as claim_llama_cpp
from .bindings import import_llama_cpp as import_llama_cpp
from .library import LIB_DIR as LIB_DIR
from .library import abi_version_expected as abi_version_expected
from .library import check as check
from .library import library as library
from .library import library_path as library_path
from .library import loaded_libraries as loaded_libraries
