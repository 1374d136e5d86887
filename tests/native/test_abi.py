"""The public headers declare what abi.json records for their ABI version, and the library exports just that."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import program
import pytest

from tqgguf import _native

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def abi() -> Any:
    return program.load("tests/native/abi.py")


def test_a_header_does_not_change_without_its_version(abi: Any) -> None:
    then, now = json.loads((HERE / "abi.json").read_text()), abi.current()
    assert not abi.refusals(then, now)
    assert then == now, "the headers declare more, or another version: run python tests/native/abi.py"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("int n_head_kv;", "int64_t n_head_kv;", "has another tq_cache_config: an incompatible change, so raise"),
        ("int64_t n_tokens,", "int32_t n_tokens,", "has another tq_cache_prefill"),
        ("TQ_TYPE_PQT4 = 303", "TQ_TYPE_PQT4 = 304", "has another tq_type"),
        ("TQ_TYPE_PQT5 = 305", "TQ_TYPE_PQT5 = 305, TQ_TYPE_PQT6 = 306", None),
        ("TQ_TYPE_PQT4 = 303,", "", "has another tq_type"),
        ("#define TQ_BLOCK 32", "#define TQ_BLOCK 64", "has another TQ_BLOCK"),
        ("int tq_cache_reset(tq_cache * cache);", "", "tqgguf.h lost tq_cache_reset"),
        ("/* Empties every layer and gives its memory back. */", "/* Another comment. */", None),
        ("/* cffi: end */", "int tq_more(void);\n/* cffi: end */", None),
    ],
)
def test_what_a_change_needs(abi: Any, old: str, new: str, said: str | None) -> None:
    now = abi.current()
    path, version = abi.HEADERS["tqgguf.h"]
    text = path.read_text()
    assert old in text
    changed = copy.deepcopy(now)
    changed["tqgguf.h"] = abi.interface(text.replace(old, new, 1), version)
    refused = abi.refusals(now, changed)
    assert len(refused) == (said is not None)
    assert (changed == now) == (new.startswith("/* Another"))
    if said:
        assert said in refused[0]
        changed["tqgguf.h"]["version"] += 1
        assert not abi.refusals(now, changed)


def test_the_library_exports_what_the_header_declares_and_nothing_else(abi: Any) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm (binutils)")
    path = _native.library_path()
    done = subprocess.run([nm, "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True)
    exported = set(re.findall(r" [TDBRW] (\w+)$", done.stdout, re.MULTILINE))
    declared = {
        name for name, text in abi.current()["tqgguf.h"]["declarations"].items() if not text.startswith("typedef")
    }
    assert len(declared) > 20 and exported == declared
