"""What a user may give is listed, and nothing that he gives ends the process or leaves a wrong answer behind.

`python benchmarks/endurance/surface.py` makes 20,000 calls where these are 250.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import tqgguf
from tqgguf.demo import model as demo

ROOT = Path(__file__).parents[2]
_SPEC = importlib.util.spec_from_file_location("surface", ROOT / "benchmarks" / "endurance" / "surface.py")
assert _SPEC is not None and _SPEC.loader is not None
surface: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(surface)

pytestmark = [pytest.mark.model, pytest.mark.long]

PAGE = ROOT / "docs" / "surface.md"
STOCK = tqgguf.Llama.__mro__[2]


def test_odd_arguments_are_errors_or_answers() -> None:
    outcomes, failure = surface.run(1, 250, str(demo.MODEL_PATH))
    assert failure == ""
    assert sum(outcomes.values()) == 250 and min(outcomes["answer"], outcomes["ArgumentError"]) > 20


def test_a_call_that_ends_the_process_or_has_no_end_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert surface.run(1, 1, "nowhere.gguf")[1].startswith("seed 1: exit status 1")
    monkeypatch.setattr(surface.subprocess, "run", _too_late)
    assert surface.run(3, 1, "model.gguf")[1] == "seed 3: no end of ['embed(input=5)']"


def _too_late(command: list[str], **_: object) -> None:
    raise surface.subprocess.TimeoutExpired(command, 5, output=b"tokenize(text=5)\nembed(input=5)\n")


@pytest.mark.parametrize(
    ("title", "functions"),
    [
        ("Llama", (tqgguf.Llama.__init__, STOCK.__init__)),
        ("create_completion", (STOCK.create_completion,)),
        ("create_chat_completion", (STOCK.create_chat_completion,)),
        ("embed", (STOCK.embed,)),
        ("tokenize", (STOCK.tokenize,)),
        ("detokenize", (STOCK.detokenize,)),
    ],
)
def test_the_page_lists_every_argument(title: str, functions: tuple[object, ...]) -> None:
    part = re.search(rf"^## `{title}`\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert part is not None
    first = re.findall(r"^\| (`.*?`) \|", part[1], re.MULTILINE)
    listed = [name for cell in first for name in re.findall(r"`(\w+)`", cell)]
    names = {name for function in functions for name in inspect.signature(function).parameters}  # type: ignore[arg-type]
    names -= {"self", "kwargs", "model_options"}
    assert sorted(listed) == sorted(names)
