"""What the build downloads is pinned: requirements-dev.txt says what its source does, and has a hash for everything."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PINS = [
    (Requirement(part[0].strip()), re.findall(r"--hash=sha256:([0-9a-f]{64})\b", part[1]))
    for part in re.findall(
        r"^([^#\s][^\\\n]*)((?: \\\n +--hash=\S+)*)$", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE
    )
]
WANTED = [
    Requirement(line) for line in (ROOT / "requirements-dev.in").read_text().splitlines() if line and line[0] != "#"
]


def chosen(pins: list[Requirement], python: str, machine: str) -> dict[str, str]:
    """Versions by name that pip takes for a Python on Linux; more than one of a name is an error."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.5",
        "platform_machine": machine,
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
        "os_name": "posix",
    }
    found: dict[str, str] = {}
    for pin in pins:
        if pin.marker is None or pin.marker.evaluate(environment):
            assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), f"{pin} is no exact version"
            assert pin.name not in found, f"{pin.name} is pinned twice for Python {python}"
            found[pin.name] = str(pin.specifier)
    return found


def test_nothing_is_installed_without_hashes() -> None:
    """Every list is pinned by hash, and no recipe names a package that is in none."""
    for path in ROOT.glob("requirements-*.txt"):
        packages = re.findall(r"^[^#\s].*", path.read_text().replace(" \\\n", ""), re.MULTILINE)
        assert packages and all("--hash=sha256:" in package for package in packages), path.name
    recipes = [(ROOT / "Makefile").read_text(), *(path.read_text() for path in (ROOT / "tools").glob("*.sh"))]
    installs = re.findall(r"pip install (.*)", "\n".join(recipes))
    others = [line for line in installs if "--require-hashes -r requirements-" not in line]
    assert len(installs) > 3 and all("--no-deps --force-reinstall . " in line for line in others), others


def test_every_file_is_pinned_by_hash() -> None:
    lines = [line for line in (ROOT / "requirements-dev.txt").read_text().splitlines() if re.match(r"[^#\s]", line)]
    assert len(PINS) == len(lines) > 60
    assert [str(pin) for pin, hashes in PINS if not hashes] == []
    assert "install --quiet --require-hashes -r requirements-dev.txt" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_the_list_is_that_of_its_source_for_every_python(python: str, machine: str) -> None:
    wanted = chosen(WANTED, python, machine)
    pinned = chosen([pin for pin, _ in PINS], python, machine)
    assert {"openai", "langchain-openai", "numpy", "pip"} <= wanted.keys()
    assert {name: pinned.get(name) for name in wanted} == wanted, "see requirements-dev.in for the command"


def test_the_build_asks_for_the_same_versions() -> None:
    requires = re.search(r"^requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert requires
    build = {r.name: str(r.specifier) for r in map(Requirement, re.findall(r'"([^"]+)"', requires[1]))}
    wanted = chosen(WANTED, "3.12", "x86_64")
    assert build.keys() == {"scikit-build-core", "pip"} and build == {name: wanted[name] for name in build}
