"""Whether this installation is as it should be: versions, libraries, kernels."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from .. import __version__, _native
from ..errors import TqggufError

__all__ = ["UPSTREAM_VERSION", "Check", "Installation", "installation"]

UPSTREAM_VERSION: Final = "0.3.36"
"""The release of llama-cpp-python that llama.cpp and the bindings come from, as pinned in patches/upstream.toml."""


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Attributes:
        name: what was looked at.
        ok: whether it is as it should be.
        detail: what was found.
    """

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Installation:
    """Everything looked at, in order.

    Attributes:
        checks: the findings.
        kernels: names of the kernels built in, and whether this machine can run each.
        kernel: the one in use; "" if the library could not be loaded.
    """

    checks: tuple[Check, ...]
    kernels: dict[str, bool]
    kernel: str

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return all(check.ok for check in self.checks)


def installation() -> Installation:
    """Loads the libraries and bindings and looks at what came; failures become findings, not exceptions."""
    kernels: dict[str, bool] = {}
    active = ""
    checks = [
        Check("tqgguf", True, f"{__version__} in {_native.LIB_DIR.parent}"),
        Check("python", sys.version_info >= (3, 10), f"{platform.python_version()} on {platform.platform()}"),
        Check("numpy", True, importlib.metadata.version("numpy")),
    ]

    def libtqgguf() -> str:
        nonlocal kernels, active
        native = _native.library()
        kernels, active = native.kernels(), native.active_kernel()
        if native.version() != __version__:
            raise TqggufError(f"{native.path} has version {native.version()}, the package {__version__}")
        return f"{native.version()}, ABI {_native.abi_version_expected()}, {native.path}"

    def kernel() -> str:
        if not active:
            raise TqggufError("unknown, because libtqgguf could not be loaded")
        forced = os.environ.get("TQGGUF_KERNEL")
        listed = ", ".join(name + ("" if usable else " (not on this machine)") for name, usable in kernels.items())
        return f"{active}{f' (TQGGUF_KERNEL={forced})' if forced else ''}; built in: {listed}"

    def bindings() -> str:
        module = _native.import_llama_cpp()
        if module.__version__ != UPSTREAM_VERSION:
            raise TqggufError(f"version {module.__version__} in {module.__file__}, pinned is {UPSTREAM_VERSION}")
        return f"{module.__version__} (the pinned upstream) in {os.path.dirname(str(module.__file__))}"

    def libraries() -> str:
        mapped = _native.loaded_libraries()
        if mapped is None:
            return "this platform does not tell which libraries are loaded"
        files = sorted(path for paths in mapped.values() for path in paths)
        if not files:
            raise TqggufError("none are loaded")
        return ", ".join(path.name for path in files) + f" in {files[0].parent}"

    for name, look in (
        ("libtqgguf", libtqgguf),
        ("kernel", kernel),
        ("llama_cpp", bindings),
        ("libraries", libraries),
    ):
        checks.append(_look(name, look))
    return Installation(tuple(checks), kernels, active)


def _look(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except (TqggufError, ImportError, OSError, RuntimeError) as error:
        return Check(name, False, str(error))
