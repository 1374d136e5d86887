"""What a release has beside its wheels: notes, from CHANGELOG.md, and checksums.

python tools/release.py notes FILE     fails if CHANGELOG.md has no section of the version or calls it unreleased
python tools/release.py sums FILE      fails if dist/ has not exactly one wheel of it for each architecture
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("x86_64", "aarch64")


def version(root: Path) -> str:
    """The version, from tqgguf/__init__.py."""
    found = re.search(
        r'^__version__ = "(.+)"$', (root / "tqgguf/__init__.py").read_text(encoding="utf-8"), re.MULTILINE
    )
    if found is None:
        raise ValueError("tqgguf/__init__.py has no line __version__ = ...")
    return found[1]


def notes(root: Path) -> str:
    """The section of this version in CHANGELOG.md, without its heading."""
    name = version(root)
    parts = re.split(r"^## (.*)\n", (root / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    heading = next((heading for heading in sections if heading.split()[:1] == [name]), None)
    if heading is None:
        raise ValueError(f"CHANGELOG.md has no section {name}")
    if not re.fullmatch(r"\S+ \(\d{4}-\d\d-\d\d\)", heading):
        raise ValueError(f"CHANGELOG.md says `## {heading}`: a release has its day there, `## {name} (2030-12-31)`")
    return sections[heading].strip() + "\n"


def wheels(root: Path) -> list[Path]:
    """The wheels of this version in dist/, one for each of ARCHITECTURES."""
    found = sorted((root / "dist").glob(f"tqgguf-{version(root)}-*.whl"))
    for machine in ARCHITECTURES:
        fitting = [path.name for path in found if re.search(rf"-manylinux_\w+_{machine}\.whl$", path.name)]
        if len(fitting) != 1:
            raise ValueError(
                f"dist/ has {len(fitting)} wheels of {version(root)} for {machine} Linux, not one: {fitting}"
            )
    if len(found) != len(ARCHITECTURES):
        raise ValueError(f"dist/ has other wheels of {version(root)}, too: {[path.name for path in found]}")
    return found


def sums(root: Path) -> str:
    """A line for each wheel, as sha256sum reads it."""
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in wheels(root))


WRITERS = {"notes": notes, "sums": sums}

if __name__ == "__main__":
    what, file = sys.argv[1], Path(sys.argv[2])
    try:
        text = WRITERS[what](ROOT)
    except ValueError as problem:
        sys.exit(f"the release is not ready: {problem}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
