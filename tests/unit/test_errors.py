"""Every exception is a TqggufError and the built-in one a caller would catch."""

from __future__ import annotations

import pytest

import tqgguf
from tqgguf import errors


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        ("ArgumentError", ValueError),
        ("OutOfMemoryError", MemoryError),
        ("UnsupportedError", RuntimeError),
        ("LibraryError", ImportError),
        ("CacheTypeError", ValueError),
        ("CacheClosedError", ValueError),
        ("ModelFileError", ValueError),
        ("StateFileError", ValueError),
        ("ModelNotFoundError", FileNotFoundError),
    ],
)
def test_kinds(kind: str, builtin: type[Exception]) -> None:
    error = getattr(errors, kind)
    assert issubclass(error, errors.TqggufError) and issubclass(error, builtin)
    assert getattr(tqgguf, kind) is error
    assert str(error("a sentence")) == "a sentence"


def test_every_public_name_exists() -> None:
    for name in tqgguf.__all__:
        assert getattr(tqgguf, name) is not None
    with pytest.raises(AttributeError, match="Nothing"):
        _ = tqgguf.Nothing
