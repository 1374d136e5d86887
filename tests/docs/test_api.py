"""docs/api.md agrees with the docstrings, and every public name has one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import program
import pytest

import tqgguf

pytest.importorskip("griffe", reason="griffe is not installed: pip install -r requirements-dev.txt")

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "docs" / "generate" / "api.py"


@pytest.fixture
def generator() -> Any:
    return program.load("docs/generate/api.py")


def test_the_page_is_what_the_docstrings_say() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_in_it() -> None:
    page = (REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^### ([\w.]+)$", page, re.MULTILINE)) | set(re.findall(r"^- \*\*(\w+)\*\*", page, re.M))
    assert set(tqgguf.__all__) - {"__version__", "reference"} <= named
    assert {"fit", "FitRow", "ContextPlan"} <= {name.rsplit(".", 1)[-1] for name in named}  # what results are made of
    assert 'caches: Sequence[PolicySpec] = ("f16", "q8_0", ' in page  # constants are shown as what they are


def test_what_nothing_is_said_about_is_an_error(generator: Any) -> None:
    for name, change, missing in (
        ("quantize", lambda thing: setattr(thing, "docstring", None), "tqgguf.pqo.codec.quantize"),
        (
            "CacheInfo",
            lambda thing: setattr(thing.members["ratio"], "docstring", None),
            "tqgguf.cache.info.CacheInfo.ratio",
        ),
        ("CacheInfo", lambda thing: rewrite(thing, "cells_used", "x"), "tqgguf.cache.info.CacheInfo.cells_used"),
        ("compare", lambda thing: rewrite(thing, "n_batch", "x"), "tqgguf.diagnostics.compare.compare(n_batch)"),
    ):
        page = generator.Page()
        change(page.target(name))
        with pytest.raises(generator.MissingDocstringError, match=re.escape(missing)):
            page.text()


def test_a_new_public_name_needs_a_chapter(generator: Any) -> None:
    page = generator.Page()
    page.public.append("model_hash")
    with pytest.raises(generator.MissingDocstringError, match="model_hash"):
        page.text()


def rewrite(thing: Any, old: str, new: str) -> None:
    """Replaces a name in a docstring."""
    thing.docstring.value = thing.docstring.value.replace(old, new)
    thing.docstring.__dict__.pop("parsed", None)
