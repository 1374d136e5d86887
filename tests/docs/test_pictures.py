"""The pictures equal what their scripts draw, need no network, and the page quotes their figures."""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import program
import pytest

pytestmark = pytest.mark.model

REPOSITORY = Path(__file__).parents[2]
PICTURES = REPOSITORY / "docs" / "pictures"
MOST_BYTES = 60_000


def load(name: str, needs: str) -> Any:
    pytest.importorskip(needs, reason=f"{needs} is not installed: pip install -r requirements-dev.txt")
    return program.load(f"docs/generate/{name}.py")


def drawn_lines(svg: str) -> list[str]:
    """The lines of a drawn terminal, title first. Speeds and bar heights are masked: they differ from run to run."""
    lines: dict[str, str] = {}
    for y, text in re.findall(r'<text [^>]*?y="([\d.]+)"[^>]*>([^<]*)</text>', svg):
        lines[y] = lines.get(y, "") + html.unescape(text).replace("\xa0", " ")
    return [re.sub(r"[\d.,]+ tokens/s", "N tokens/s", re.sub("[▁-█]", "#", line)).strip() for line in lines.values()]


@pytest.mark.parametrize("path", sorted(PICTURES.glob("*")), ids=lambda path: path.name)
def test_a_picture_stands_alone(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    ET.fromstring(text)
    assert len(text.encode()) < MOST_BYTES
    assert not re.search(r"<script|@font-face|@import|<image|<foreignObject|(?:href|src|url)\W{1,3}https?:", text)
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    assert any(f"pictures/{path.name}" in page.read_text(encoding="utf-8") for page in pages), "no page shows it"


def test_every_picture_has_a_script() -> None:
    scenes, figures = load("terminal", "pyte").SCENES, load("figures", "matplotlib").FIGURES
    assert {path.stem for path in PICTURES.glob("*")} == {*scenes, *figures}


@pytest.mark.parametrize("name", ["chat", "fit"])
def test_a_session_is_what_the_program_shows_today(name: str) -> None:
    terminal = load("terminal", "pyte")
    scene = terminal.SCENES[name]
    again = terminal.svg(scene, terminal.screen(scene))
    stored = drawn_lines((PICTURES / f"{name}.svg").read_text(encoding="utf-8"))
    assert drawn_lines(again) == stored, "python docs/generate/terminal.py draws it anew"
    assert any("Paris" in line or "Recommended" in line for line in stored)


def test_the_figures_of_the_page_are_those_computed() -> None:
    facts = load("figures", "matplotlib").facts()
    page = (REPOSITORY / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    page = re.sub(r"\s+", " ", page)
    for pattern, names in {
        r"largest value is ([\d.]+) times its RMS before and ([\d.]+) times after": ("crest before", "crest after"),
        r"relative squared error of ([\d.]+) with it and ([\d.]+) without": ("keys with", "keys without"),
        r"pqo3 has ([\d.]+) with the transform and ([\d.]+) without": ("hot 8 with", "hot 8 without"),
        r"error of pqo3 is ([\d.]+); .* it is ([\d.]+)\. \*\*Trellis": ("error pqo3", "error maxnorm"),
    }.items():
        match = re.search(pattern, page)
        assert match, pattern
        for text, name in zip(match.groups(), names, strict=True):
            assert float(text) == pytest.approx(facts[name], rel=0.03), name
    head, row = re.findall(
        r"\| (?:Gaussian blocks|squared error / squared values) \|([^\n]*?) \|(?= \||$| The| Stock)", page
    )
    names = [cell.strip() for cell in head.split("|")]
    for name, text in zip(names, row.split("|"), strict=True):
        assert float(text) == pytest.approx(facts[f"error {name}"], rel=0.15 if name == "q8_0" else 0.03), name
    assert len(names) == 9
    # Twice the levels at the same bytes: a quarter less error, as the page says.
    assert facts["error pqt3"] / facts["error pqo3"] == pytest.approx(0.75, abs=0.03)
    assert facts["error pqt4"] / facts["error pqo4"] == pytest.approx(0.75, abs=0.03)
