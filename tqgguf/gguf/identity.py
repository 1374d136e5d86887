"""Which model a file is, by every byte of it and of the files that it is split over."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from .._machine import processors
from .._util import replacing
from ..errors import ModelNotFoundError

PIECE: Final = 1 << 24
"""Bytes that have a digest of their own."""

READ: Final = 1 << 20
"""Bytes read at a time, which stay in a processor's cache until they are hashed."""

_SPLIT: Final = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def cache_folder() -> Path:
    """The folder of the user's cache where tqgguf keeps what it has measured."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "tqgguf"  # a relative one counts for nothing


def model_files(path: str | Path) -> tuple[Path, ...]:
    """The file, or all files of a model that is split, if the path is its first one (NAME-00001-of-00005.gguf)."""
    file = Path(path)
    match = _SPLIT.fullmatch(file.name)
    if match is None or int(match[2]) != 1:
        return (file,)
    return tuple(file.with_name(f"{match[1]}-{i:05}-of-{match[3]}.gguf") for i in range(1, int(match[3]) + 1))


def model_identity(path: str | Path) -> str:
    """SHA-256 of the SHA-256s of a model's pieces of 16 MiB, which several threads can hash at once; 64 hex digits.

    It is computed once for a file and kept in `cache_folder`, until size, times or inode of a file differ.

    Raises:
        ModelNotFoundError: no such file, or it cannot be read.
    """
    files = model_files(path)
    try:
        state = [_state(file) for file in files]
        note = cache_folder() / "identities" / f"{hashlib.sha256(os.fsencode(files[0].resolve())).hexdigest()}.json"
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            kept = json.loads(note.read_text("ascii"))
            if kept.get("files") == state and re.fullmatch("[0-9a-f]{64}", kept.get("identity")):
                return str(kept["identity"])
        with ThreadPoolExecutor(max_workers=min(8, processors())) as pool:
            digests = b"".join(digest for file in files for digest in _digests(file, pool))
    except OSError as error:
        raise ModelNotFoundError(f"cannot read the model {error.filename or path}: {error.strerror}") from error
    identity = hashlib.sha256(digests).hexdigest()
    with contextlib.suppress(OSError):  # where it cannot be kept, it is computed again
        if [_state(file) for file in files] == state:
            note.parent.mkdir(parents=True, exist_ok=True)
            with replacing(note, what="identity") as part:
                part.write_text(json.dumps({"files": state, "identity": identity}), "ascii")
    return identity


def _state(file: Path) -> list[int]:
    """What changes when somebody writes to a file."""
    found = file.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _digests(path: Path, pool: ThreadPoolExecutor) -> Iterator[bytes]:
    file = os.open(path, os.O_RDONLY)

    def piece(begin: int) -> bytes:
        digest = hashlib.sha256()
        for at in range(begin, begin + PIECE, READ):
            digest.update(os.pread(file, READ, at))
        return digest.digest()

    try:
        yield from pool.map(piece, range(0, os.fstat(file).st_size, PIECE))
    finally:
        os.close(file)
