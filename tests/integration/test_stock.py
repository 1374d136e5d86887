"""What tqgguf uses of llama_cpp's private names is there, and nothing of llama_cpp is replaced."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import tqgguf
from tqgguf._native import import_llama_cpp
from tqgguf.model import stock, turns

api: Any = import_llama_cpp()
PACKAGE = Path(tqgguf.__file__).parent
OURS = {"_bindings", "lib", "include"}
FOLDER = Path(stock.__file__).parent
FILES = sorted(FOLDER.glob("*.py"))


def private(path: Path) -> set[tuple[str, str]]:
    """Attributes with private names in a file, and what they are attributes of."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    found = [node for node in nodes if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr)]
    return {(ast.unparse(node.value), node.attr) for node in found}


def test_the_private_names_exist() -> None:
    source = inspect.getsource(api.Llama)
    used = {name for owner, name in private(Path(stock.__file__)) if owner == "self"}
    used -= {name for name in used if name in vars(stock.GuardedLlama) and not hasattr(api.Llama, name)}
    used -= {*vars(stock.GuardedLlama)["__annotations__"], "_tensors"} - {"_turns"}
    assert {"_stack", "_turns", "_logits_all", "_seed", "_requires_eval"} <= used
    assert {name for name in used if not re.search(rf"self\.{name}\b", source)} == set()
    assert issubclass(turns.ModelTurns, api._internals.Turns) and api.Llama._turns_type is api._internals.Turns
    assert "_mtmd_cpp" in inspect.getsource(api.llama_chat_format)


def test_no_other_file_uses_private_names_of_another() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if OURS & set(path.parts) or path.name in ("stock.py", "turns.py", "app.py"):  # app.py: of llama_cpp.server
            continue
        defined = {name for pair in re.findall(r"\b(?:def|class) (_\w+)|\bself\.(_\w+)\b", text) for name in pair}
        foreign = {name for owner, name in private(path) if owner not in ("self", "cls", "sys", "os", "argparse")}
        assert "llama_cpp" not in text or foreign <= defined, path


def test_what_is_overridden_is_what_a_cache_needs() -> None:
    """The bindings' own bugs are mended in the bindings (patches/bindings)."""
    mine = {**vars(tqgguf.Llama), **vars(stock.GuardedLlama)}
    methods = {name for name, value in mine.items() if callable(value) or isinstance(value, property)}
    overridden = {name for name in methods if name in vars(api.Llama) and name != "_turns_type"}
    assert overridden == {"__init__", "__getstate__", "close", "eval", "save_state", "load_state"}


def test_nothing_of_the_bindings_is_replaced() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(target, ast.Attribute):
                    assert not ast.unparse(target).startswith(("llama_cpp.", "_Stock.")), (path, ast.unparse(node))
                    assert target.attr != "__class__", (path, ast.unparse(node))
            assert not (isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr"), (path, ast.unparse(node))
