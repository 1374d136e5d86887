"""The order of the package's folders, no circle of imports, and the lengths of files and functions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tqgguf"
ORDER = (
    *("errors", "_machine", "_util", "config", "reference"),
    *("gguf", "cache", "_native", "pqo", "session", "model", "demo", "diagnostics", "serve", "cli", "__main__"),
)
"""Each imports only from itself and from what stands before it; `tqgguf` itself imports `_native` alone."""

MOST_LINES = 600
MOST_LINES_OF_A_FUNCTION = 70

FILES = sorted(
    path for path in PACKAGE.rglob("*.py*") if path.suffix in (".py", ".pyi") and "_bindings" not in path.parts
)


def name_of(path: Path) -> str:
    """The module's name, "cache.policy"; "" is the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES if path.suffix == ".py"}


def imports(name: str) -> set[str]:
    """Modules of the package that a module imports anywhere: at its top, in functions, and for type checkers alone."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [part for part in package if part]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {".".join(parts[1:]) for parts in names if parts[0] == "tqgguf"}
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")
            if node.level:
                module = ["tqgguf", *package[: len(package) - node.level + 1], *filter(None, module)]
            if module[0] == "tqgguf":
                base = module[1:]
                inner = [".".join([*base, alias.name]) for alias in node.names]
                found |= {each if each in MODULES else ".".join(base) for each in inner}
    return found - {name}


GRAPH = {name: imports(name) for name in MODULES}


def test_every_import_is_of_a_module_that_is_there() -> None:
    assert len(MODULES) > 60 and {"model.llama", "_native", ""} <= MODULES.keys()
    assert {part for parts in GRAPH.values() for part in parts} <= MODULES.keys()
    assert "cache.policy" in GRAPH["model.llama"] and "config" in GRAPH["_native.libggml"]


def test_folders_import_only_what_stands_before_them() -> None:
    wrong = []
    for name, parts in GRAPH.items():
        own = name.split(".")[0]
        for part in parts - {""}:
            if own and ORDER.index(part.split(".")[0]) > ORDER.index(own):
                wrong.append(f"{name} imports {part}")
    assert not wrong
    assert {part.split(".")[0] for part in GRAPH[""]} == {"_native"}


def test_libraries_are_loaded_in_one_folder() -> None:
    assert not [name for name, path in MODULES.items() if "CDLL(" in path.read_text() and "_native" not in name]


def test_no_import_goes_in_a_circle() -> None:
    graph = {name: sorted(parts - {""}) for name, parts in GRAPH.items() if name}
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for part in graph[name]:
                walk(part, [*way, name])
            done.add(name)

    for name in graph:
        walk(name, [])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_function_is_too_long(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < MOST_LINES_OF_A_FUNCTION, node.name


def test_no_file_is_too_long() -> None:
    folders = ("native", "patches", "tqgguf", "tests", "benchmarks", "docs/generate", "examples", "tools")
    suffixes = (".py", ".pyi", ".c", ".h", ".cpp", ".cu", ".cuh", ".inc", ".sh", ".cmake", ".html")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.*") if path.is_file()]
    files = [path for path in files if path.suffix in suffixes and "_bindings" not in path.parts]
    lines = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n") for path in files}
    assert {"tqgguf/config.py", "tests/conftest.py", "benchmarks/speed/cuda.py", "native/src/cache.c"} <= lines.keys()
    assert {name: n for name, n in lines.items() if n > MOST_LINES} == {}
