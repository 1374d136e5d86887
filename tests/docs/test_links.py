"""Links between the pages have targets, including headings, and README links to every page."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Final

import pytest
from markdown_it import MarkdownIt

REPOSITORY: Final = Path(__file__).parents[2]
PAGES: Final = sorted({*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), REPOSITORY / "patches" / "README.md"})


def anchors(path: Path) -> set[str]:
    """The anchors of the headings, by GitHub's rule."""
    tokens = MarkdownIt("commonmark").parse(path.read_text(encoding="utf-8"))
    texts = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


def links(path: Path) -> list[str]:
    found: list[str] = []
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")):
        for child in token.children or ():
            target = child.attrs.get("href") or child.attrs.get("src")
            if target:
                found.append(str(target))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_of_a_page(page: Path) -> None:
    for target in links(page):
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), target
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}: there is no such file"
        assert not anchor or anchor in anchors(path), f"{page.name} links to {target}: there is no such heading"


def test_readme_names_every_page() -> None:
    named = links(REPOSITORY / "README.md")
    for page in (REPOSITORY / "docs").glob("*.md"):
        assert f"docs/{page.name}" in named, f"README.md has no line for docs/{page.name}"
