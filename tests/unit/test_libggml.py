"""What Python declares of libggml is compared with the library; constants written twice agree with the headers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tqgguf import config
from tqgguf._native import import_llama_cpp, libggml
from tqgguf.cache import tail
from tqgguf.errors import LibraryError

NATIVE = Path(__file__).parents[2] / "native"


class Another:
    """libggml-base, but for what is given here."""

    def __init__(self, lib: Any, lacks: str = "", **others: Any) -> None:
        self._lib, self._lacks = lib, lacks
        vars(self).update(others)

    def __getattr__(self, name: str) -> Any:
        if name == self._lacks:
            raise AttributeError(name)
        return getattr(self._lib, name)


@pytest.fixture
def base() -> Any:
    import_llama_cpp()
    return libggml.base()


def put(monkeypatch: pytest.MonkeyPatch, another: Another, name: str = "ggml-base") -> None:
    """Has another library in the place of one."""
    real = libggml.library_of
    monkeypatch.setattr(libggml, "library_of", lambda asked: another if asked == name else real(asked))


def test_this_library_is_the_declared_one(base: Any) -> None:
    libggml.verify()
    assert base.tq_ggml_sizeof(b"another") == 0


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        ("ggml-base", "tq_ggml_cache_list"),
        ("ggml-base", "tq_ggml_cache_list_begin"),
        ("ggml-base", "tq_ggml_policy_set_rotation"),
        ("ggml-rpc", "tq_ggml_rpc_n_lost"),
    ],
)
def test_a_library_without_a_hook_is_told_by_name(monkeypatch: pytest.MonkeyPatch, name: str, lacks: str) -> None:
    import_llama_cpp()
    put(monkeypatch, Another(libggml.library_of(name), lacks), name)
    with pytest.raises(LibraryError, match=rf"lib{name}\S+ has no {lacks}: library and package come from different"):
        libggml.verify()


@pytest.mark.parametrize("name", ["tq_ggml_cache_tensor", "ggml_tensor", "ggml_threadpool_params"])
def test_a_struct_of_another_size_is_told_by_name(base: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    size = libggml.ffi().sizeof(f"struct {name}")

    def sizeof(asked: bytes) -> int:
        return int(base.tq_ggml_sizeof(asked)) + 8 * (asked.decode() == name)

    put(monkeypatch, Another(base, tq_ggml_sizeof=sizeof))
    with pytest.raises(LibraryError, match=f"struct {name} has {size + 8} bytes in .*, this tqgguf declares {size}"):
        libggml.verify()


def test_a_library_without_a_type_is_told_by_name(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, Another(base, ggml_type_name=lambda number: libggml.ffi().NULL))
    with pytest.raises(LibraryError, match="does not know f32: it was built without our patches"):
        libggml.verify()


def test_constants_are_those_of_the_headers() -> None:
    headers = "".join(path.read_text() for path in (*NATIVE.glob("include/*.h"), *NATIVE.glob("ggml/*.h")))
    numbers = dict(re.findall(r"#define\s+(\w+)(?:\s|\\)+(\d+)\b", headers))
    found = (numbers["TQ_MAX_HEAD_DIM"], numbers["TQ_MAX_HEADS"], numbers["TQ_GGML_TAIL_FIRST"])
    assert tuple(map(int, found)) == (config.MAX_HEAD_DIM, config.MAX_HEADS, tail._FIRST)
