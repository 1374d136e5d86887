"""llama.cpp's own programs, which the package brings beside its libraries."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ..errors import LibraryError
from .library import LIB_DIR, NOT_BUILT

PROGRAMS: Final = ("llama-server", "llama-cli", "llama-bench", "llama-perplexity")


def program(name: str) -> Path:
    """The file of a program.

    Args:
        name: one of PROGRAMS.

    Raises:
        LibraryError: it is not there, or may not be run.
    """
    path = LIB_DIR / name
    if not os.access(path, os.X_OK):
        why = "may not be run" if path.exists() else "does not exist"
        raise LibraryError(f"{path} {why}: {NOT_BUILT}")
    return path


def end_with_parent() -> Callable[[], None] | None:
    """What a child runs so that it gets SIGTERM when this process ends in whatever way. Linux alone has that."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def run() -> None:
        prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)

    return run
