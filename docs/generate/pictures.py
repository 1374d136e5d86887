"""The folder of the pictures, and the command line of the scripts that draw them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).parents[2]
PICTURES: Final = REPOSITORY / "docs" / "pictures"


def draw_asked(about: str, known: Collection[str], draw: Callable[[str, Path], object]) -> None:
    """Draws the pictures named on the command line, or all.

    Args:
        about: text of the help.
        known: names of the pictures that the script can draw.
        draw: draws the picture of a name into a file.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(known)} (default: all)")
    args = parser.parse_args()
    if unknown := set(args.names) - set(known):
        parser.error(f"unknown picture {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    PICTURES.mkdir(exist_ok=True)
    for name in args.names or known:
        path = PICTURES / f"{name}.svg"
        draw(name, path)
        print(f"{path.relative_to(REPOSITORY)}: {path.stat().st_size:,} bytes")
