"""Every exception is a TqggufError and the built-in one a caller would catch."""

from __future__ import annotations

import ast
import builtins
from pathlib import Path

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


def test_every_exception_of_the_package_is_a_tqgguf_error() -> None:
    package = Path(tqgguf.__file__).parent
    for path in package.rglob("*.py"):
        if "_bindings" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base).split(".")[-1] for base in node.bases}
                built_in = any(name.endswith(("Error", "Exception")) and hasattr(builtins, name) for name in bases)
                named = node.name == "TqggufError" or any(hasattr(errors, name) for name in bases)
                assert named or not built_in, f"{path.name}: {node.name}"
