"""Where the pictures of docs/ are, and how a script draws those that it is asked for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).parents[2]
PICTURES: Final = REPOSITORY / "docs" / "pictures"


def draw_asked(about: str, known: Collection[str], draw: Callable[[str, Path], object]) -> None:
    """Draws the pictures that the command line names, or all.

    Args:
        about: what the script does, for its help.
        known: names of its pictures.
        draw: draws one of them into a file.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(known)} (default: all)")
    args = parser.parse_args()
    if unknown := set(args.names) - set(known):
        parser.error(f"there is no picture {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    PICTURES.mkdir(exist_ok=True)
    for name in args.names or known:
        path = PICTURES / f"{name}.svg"
        draw(name, path)
        print(f"{path.relative_to(REPOSITORY)}: {path.stat().st_size:,} bytes")
