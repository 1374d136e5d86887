"""What tqgguf uses of llama_cpp's private names is there, and is used in model/stock.py alone."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import tqgguf
from tqgguf._native import import_llama_cpp
from tqgguf.model import stock

api: Any = import_llama_cpp()
PACKAGE = Path(tqgguf.__file__).parent
OURS = {"_bindings", "lib", "include"}


def private(path: Path) -> set[tuple[str, str]]:
    """Attributes with private names in a file, and what they are attributes of."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    found = [node for node in nodes if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr)]
    return {(ast.unparse(node.value), node.attr) for node in found}


def test_the_private_names_exist() -> None:
    source = inspect.getsource(api.Llama)
    set_here = set(re.findall(r"self\.(_\w+)[:,]? ", inspect.getsource(stock.GuardedLlama.__init__)))
    used = {name for owner, name in private(Path(stock.__file__)) if owner == "self"}
    used -= {name for name in used if name in vars(stock.GuardedLlama) and not hasattr(api.Llama, name)}
    used -= {
        *vars(stock.GuardedLlama)["__annotations__"],
        "_model_params",
        "_name",
        "_tensors",
        "_answering",
        "_n_last",
    }
    used -= {"_workers", "_closed"} & set_here
    assert {"_stack", "_model", "_ctx", "_logits_all", "_n_vocab", "_seed", "_requires_eval"} <= used
    assert {name for name in used if not re.search(rf"self\.{name}\b", source)} == set()
    assert hasattr(api.Llama, "_init_sampler") and hasattr(api._internals, "LlamaSampler")
    grammar = api.LlamaGrammar.from_string('root ::= "a"', verbose=False)
    assert (grammar._grammar, grammar._root) == ('root ::= "a"', "root")
    assert api.llama_grammar._build_repetition is stock._bounded
    assert "_mtmd_cpp" in inspect.getsource(api.llama_chat_format)


def test_no_other_file_uses_private_names_of_another() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if OURS & set(path.parts) or path.name in ("stock.py", "app.py"):  # app.py: of llama_cpp.server
            continue
        defined = {name for pair in re.findall(r"\b(?:def|class) (_\w+)|\bself\.(_\w+)\b", text) for name in pair}
        foreign = {name for owner, name in private(path) if owner not in ("self", "cls", "sys", "os", "argparse")}
        assert "llama_cpp" not in text or foreign <= defined, path
