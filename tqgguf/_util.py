"""What several folders need: counts and lists of numbers, the machine's ports, files written whole."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import socket
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import ArgumentError


def check_count(name: str, value: Any, least: int = 1, most: int = 2**31 - 1) -> int:
    """The value as an integer; a NumPy integer will do.

    Raises:
        ArgumentError: it is none, or not from least to most.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ArgumentError(f"{name} is {value!r}, must be an integer of at least {least}")
    if value < least:
        raise ArgumentError(f"{name} is {value}, must be at least {least}")
    if value > most:
        raise ArgumentError(f"{name} is {value}, must be at most {most}")
    return int(value.__index__())


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers for a reader: "0-5, 7"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def listen(host: str, port: int, family: int = 0) -> socket.socket:
    """A bound socket. Binding comes before a model is loaded, so that a port in use is reported at once.

    Raises:
        ArgumentError: the address cannot be used.
    """
    try:
        found, kind, protocol, _, address = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)[0]
        bound = socket.socket(found, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(128)  # clients wait while a model is loaded
    except OSError as error:
        advice = "--host (127.0.0.1: this machine; 0.0.0.0: all of it)"
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            advice = "--port (0: any that is free)"
        said = f"cannot listen on {host}:{port}: {error.strerror or error}; choose another {advice}"
        raise ArgumentError(said) from None
    return bound


def warn(message: str) -> None:
    """Warns of something in the code outside this package that called it."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and str(frame.f_globals.get("__name__")).startswith(f"{__package__}."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level - 1)


def tell(message: str) -> None:
    """Says on stderr what takes a user's time."""
    if sys.stderr is not None:
        print(f"tqgguf: {message}", file=sys.stderr, flush=True)


def check_folder(path: Path, said: str) -> None:
    """Says before anything is computed why a file could not be written.

    Args:
        path: of the file.
        said: what the message begins with, such as "cannot write out.html".

    Raises:
        ArgumentError: its folder does not exist or cannot be written to, or there is something that is no regular file.
    """
    if path.exists() and not path.is_file():  # a rename would put the file in the place of a device
        raise ArgumentError(f"{said}: it is no regular file")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ArgumentError(f"{said}: folder {folder} does not exist")
    if not os.access(folder, os.W_OK):
        raise ArgumentError(f"{said}: no permission to write to folder {folder}")


@contextlib.contextmanager
def replacing(path: str | Path, *, what: str) -> Iterator[Path]:
    """For writing a file by its name: yields one beside it, which is synced and renamed in the end.

    Its name is like no other's: threads, and processes of the same number on several machines, may write to one path at
    once, and nobody can have put a link there.

    Args:
        path: where the file shall be.
        what: a word for it, for messages.

    Raises:
        ArgumentError: see `check_folder`.
        OSError: it could not be written; what was there is as it was.
    """
    target = Path(os.path.realpath(path))
    check_folder(target, f"cannot write {path}")
    part = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    try:
        yield part
        _sync(part)
        if target.exists():
            shutil.copymode(target, part)
        part.replace(target)
        with contextlib.suppress(OSError):  # makes the rename last through a power cut, where folders can be synced
            _sync(target.parent)
    except OSError as error:
        said = f"{error.strerror or error}; a {what} that was there is as it was"
        raise OSError(error.errno, said, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_whole(path: str | Path, parts: Iterable[Any], *, what: str, private: bool = False) -> None:
    """Writes a file; see `replacing`.

    Args:
        path: where it shall be.
        parts: of its contents, bytes or what has the buffer of bytes.
        what: a word for it, for messages.
        private: whether only its owner may read it, unless a file that was there says otherwise.

    Raises:
        OSError: it could not be written; what was there is as it was.
    """
    with (
        replacing(path, what=what) as part,
        open(
            part, "wb", opener=lambda name, flags: os.open(name, flags | os.O_EXCL, 0o600 if private else 0o666)
        ) as file,
    ):
        for piece in parts:
            file.write(piece)


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
