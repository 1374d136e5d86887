"""The README's Python examples run as they stand, on the demo model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tqgguf import demo

pytestmark = pytest.mark.model

README = Path(__file__).parents[2] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES)
def test_example(python: Callable[..., Any], tmp_path: Path, code: str) -> None:
    (tmp_path / "model.gguf").symlink_to(demo.MODEL_PATH)
    done = python("-c", code.replace("n_ctx=32768", "n_ctx=2048, verbose=False"))
    assert done.returncode == 0, done.stderr
    if "cache_info" in code:
        assert "28.4% of f16" in done.stdout  # 14/64, and the tail: 128 of 2,048 tokens


def test_examples_were_found() -> None:
    assert len(EXAMPLES) == 2
