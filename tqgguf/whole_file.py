"""Files written whole or not at all: whatever happens, even the end of the process, the old or the new one is there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["write_whole"]


def write_whole(path: str | Path, parts: Iterable[Any], *, what: str, private: bool = False) -> None:
    """Writes a file beside its place, syncs it, and renames it.

    Args:
        path: where it shall be.
        parts: of its contents, bytes or what has the buffer of bytes.
        what: a word for it, for messages.
        private: whether only its owner may read it, unless a file that was there says otherwise.

    Raises:
        OSError: it could not be written; what was there is as it was.
    """
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(part, "wb", opener=lambda name, flags: os.open(name, flags, 0o600 if private else 0o666)) as file:
            for piece in parts:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, part)
        part.replace(target)
        _sync_folder(target.parent)
    except OSError as error:
        said = f"{error.strerror or error}; a {what} that was there is as it was"
        raise OSError(error.errno, said, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes a rename last through a power cut, where folders can be synced."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
