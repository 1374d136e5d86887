"""Imports a program of this repository by its path: several have names that a package could have, too."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).parents[2]


def load(path: str) -> ModuleType:
    """The module of a program, by its path from the root of the repository; read once."""
    name = path.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, REPOSITORY / path)
        assert spec and spec.loader
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        folder = str((REPOSITORY / path).parent)
        sys.path.insert(0, folder)  # a program imports modules that lie beside it
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(folder)
    return sys.modules[name]
