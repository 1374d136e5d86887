"""Writes abi.json: what the public headers declare, by ABI version, so that no change of theirs goes unnoticed.

Usage: python tests/native/abi.py

A declaration that is new is added, and so is a value at the end of an enum. One that has changed or gone is an
incompatible change: then this refuses until TQ_ABI_VERSION (tqgguf.h) or TQ_CUDA_ABI_VERSION (tq_cuda.h) has been
raised.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_name("abi.json")
HEADERS = {
    "tqgguf.h": (ROOT / "native" / "include" / "tqgguf.h", "TQ_ABI_VERSION"),
    "tq_cuda.h": (ROOT / "native" / "cuda" / "tq_cuda.h", "TQ_CUDA_ABI_VERSION"),
}


def interface(text: str, version: str) -> dict[str, Any]:
    """The version, the numbers and the declarations of a header by name, without comments and white space."""
    text = re.sub(r"/\*.*?\*/", lambda m: m[0] if m[0].startswith("/* cffi:") else " ", text, flags=re.DOTALL)
    numbers = dict(re.findall(r"#define\s+(TQ_\w+)\s+(\d+)\b", text))
    declarations: dict[str, str] = {}
    region = re.split(r"/\* cffi: (?:begin|end) \*/", text)[1].replace("TQ_CUDA_API ", "")
    for part in re.findall(r"(?:[^;{]|\{[^}]*\})+;", region):
        declaration = re.sub(r"\s*([*,;(){}=\[\]])\s*", r"\1", " ".join(part.split()))
        assert declaration.count("{") == declaration.count("}") <= 1, declaration
        patterns = (r"(\w+);$", r"^typedef [^{]*\(\*(\w+)\)\(", r"^enum\{(\w+)", r"^[^{(]*?(\w+)\(")
        name = next(filter(None, (re.search(pattern, declaration) for pattern in patterns)))[1]
        assert name not in declarations, f"{name} is declared twice"
        declarations[name] = declaration
    return {"version": int(numbers.pop(version)), "numbers": numbers, "declarations": declarations}


def current() -> dict[str, dict[str, Any]]:
    """The interface of every header as it is in the tree."""
    return {name: interface(path.read_text(), version) for name, (path, version) in HEADERS.items()}


def incompatible(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names whose numbers or declarations have changed or gone since."""
    return [
        name
        for part in ("numbers", "declarations")
        for name, text in then[part].items()
        if not continues(text, now[part].get(name, ""))
    ]


def continues(then: str, now: str) -> bool:
    """Whether a declaration is as it was, but for values at the end of an enum."""
    if then == now:
        return True
    start, end = then.partition("}")[::2]
    return "enum" in start and now.startswith(start + ",") and now.endswith("}" + end)


def refusals(then: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> list[str]:
    """What must not be recorded, in words: incompatible changes under the version that was."""
    return [
        f"{header} {'has another' if name in {**now[header]['numbers'], **now[header]['declarations']} else 'lost'} "
        f"{name}: an incompatible change, so raise {HEADERS[header][1]} above {then[header]['version']}"
        for header in now
        if header in then and now[header]["version"] <= then[header]["version"]
        for name in incompatible(then[header], now[header])
    ]


def main() -> int:
    now = current()
    refused = refusals(json.loads(RECORD.read_text()), now) if RECORD.exists() else []
    if refused:
        print(*refused, sep="\n", file=sys.stderr)
        return 1
    RECORD.write_text(json.dumps(now, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
