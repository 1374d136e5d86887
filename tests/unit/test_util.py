"""Files are written whole or not at all, also by several at once."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tqgguf import _util
from tqgguf.errors import ArgumentError


def test_threads_that_write_one_file_at_once(tmp_path: Path) -> None:
    """Whoever reads finds one of the two texts, whole, and both writers succeed."""
    path = tmp_path / "a.session"
    texts = [letter * 2_000_000 for letter in (b"a", b"b")]
    path.write_bytes(texts[0])
    failures: list[BaseException] = []

    def write(text: bytes) -> None:
        try:
            for _ in range(20):
                _util.write_whole(path, (text[:1000], text[1000:]), what="session", private=True)
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(text,)) for text in texts]
    for writer in writers:
        writer.start()
    read = 0
    while any(writer.is_alive() for writer in writers):
        assert path.read_bytes() in texts
        read += 1
    assert not failures and read
    assert [each.name for each in tmp_path.iterdir()] == ["a.session"]


def test_a_link_in_the_place_of_the_unfinished_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not followed, should somebody guess the name."""
    monkeypatch.setattr(_util.secrets, "token_hex", lambda n: "0" * 2 * n)
    other = tmp_path / "other"
    other.write_text("old")
    (tmp_path / f".a.session.{'0' * 16}.part").symlink_to(other)
    with pytest.raises(OSError, match="File exists"):
        _util.write_whole(tmp_path / "a.session", (b"new",), what="session")
    assert other.read_text() == "old" and not (tmp_path / "a.session").exists()


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    """As root, a page for /dev/null took the place of the device."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(ArgumentError, match="it is no regular file"):
            _util.check_folder(tmp_path / name, "cannot write")
        with pytest.raises(ArgumentError, match="it is no regular file"):
            _util.write_whole(tmp_path / name, (b"new",), what="page")
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 2
