"""tqgguf: GGUF models in llama.cpp with a KV cache compressed to 3.5 or 4.5 bits per value.

Importing this package loads nothing heavy. It only makes sure that a later `import llama_cpp` gets the bindings and
libraries that belong to it, or says why that is impossible. The public names, which `__init__.pyi` lists for type
checkers, are loaded when first used.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

from . import _native

__version__ = "0.1.0"


def _homes() -> dict[str, str]:
    """Each public name and the module that has it, as the imports of `__init__.pyi` say."""
    tree = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module or "" for node in found for alias in node.names}


_HOME = _homes()

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name == "reference":
        return importlib.import_module(".reference", __name__)
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


_native.claim_llama_cpp()
