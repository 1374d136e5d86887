"""Which model a file is, by every byte of it."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from ..errors import ModelNotFoundError

PIECE: Final = 1 << 24
"""Bytes hashed at a time."""


def model_identity(path: str | Path) -> str:
    """SHA-256 of the SHA-256s of a file's pieces of 16 MiB, which several threads can hash at once; 64 hex digits.

    Raises:
        ModelNotFoundError: no such file, or it cannot be read.
    """
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ModelNotFoundError(f"cannot read the model {path}: {error.strerror}") from error

    def digest(begin: int) -> bytes:
        return hashlib.sha256(os.pread(file, PIECE, begin)).digest()

    try:
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            pieces = pool.map(digest, range(0, os.fstat(file).st_size, PIECE))
            return hashlib.sha256(b"".join(pieces)).hexdigest()
    finally:
        os.close(file)
