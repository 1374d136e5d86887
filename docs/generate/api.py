"""Writes docs/api.md from the docstrings of tqgguf's public names: python docs/generate/api.py [--check].

griffe reads the sources without importing them, so the page is the same on every machine. A public name, method,
property, parameter or attribute without documentation is an error. `--check` writes nothing and fails if the page
differs from what the sources give.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "api.md"

CHAPTERS = {
    "A model with a compressed cache": ("Llama", "CacheInfo", "LayerCacheInfo", "Session", "read_session"),
    "Cache types and policies": ("CACHE_TYPES", "CacheType", "parse_cache", "CachePolicy", "read_policy"),
    "Calibrated keys": ("calibrate", "Calibration", "read_calibration"),
    "Blocks and a cache without llama.cpp": ("quantize", "dequantize", "CacheConfig", "PqoCache", "DeviceArray"),
    "What a model's file says": ("ModelInfo", "read_model_info"),
    "Will it fit": ("fit", "Fit"),
    "What it costs": (
        "compare",
        "Comparison",
        "TypeQuality",
        "Divergence",
        "continuation",
        "Continuation",
        "ContinuationQuality",
        "recall",
        "Recall",
        "RecallScore",
    ),
    "Types by layer, measured": ("tune", "Tuning"),
    "What lies in a cache": ("inspect_cache", "inspect_session", "CacheContents"),
}
"""The public names by chapter. The errors and the two modules have their own chapters and are not listed here."""

INTRODUCTION = """\
# The Python interface

Every name on this page is in the package itself: `import tqgguf`, then `tqgguf.Llama`. A name loads when it is first
used, so the import is fast. Headings with a module, such as `tqgguf.diagnostics`, are types of return values. Sizes
are in bytes and lengths in tokens, unless stated otherwise.

`docs/generate/api.py` generates this page from the docstrings. A test compares them.
"""


class MissingDocstringError(Exception):
    """Public names without documentation."""


def page() -> str:
    """The whole page."""
    return Page().text()


class Page:
    """The public names of the package, and the Markdown of each."""

    def __init__(self) -> None:
        self.package = griffe.load("tqgguf", search_paths=[REPOSITORY], docstring_parser="google", resolve_aliases=True)
        stub = (REPOSITORY / "tqgguf" / "__init__.pyi").read_text(encoding="utf-8")
        self.public = re.findall(r"^from .* import \w+ as (\w+)$", stub, re.MULTILINE)
        self.missing: list[str] = []
        self.shown = {self.target(name).path: name for name in self.public if name != "reference"}
        self.waiting: list[Any] = []
        self.aliases: dict[str, Any] = {}

    def target(self, name: str) -> Any:
        """The griffe object of a public name."""
        found = self.package[name]
        return found.final_target if found.is_alias else found

    def text(self) -> str:
        """The page; raises MissingDocstringError if a name lacks a docstring or a chapter."""
        errors = [name for name in self.public if name.endswith("Error")]
        named = {name for names in CHAPTERS.values() for name in names}
        if lost := named ^ (set(self.public) - set(errors) - {"reference"}):
            raise MissingDocstringError(f"CHAPTERS and tqgguf.__all__ differ in {', '.join(sorted(lost))}")
        parts = [INTRODUCTION]
        for title, names in CHAPTERS.items():
            parts.append(f"## {title}\n")
            self.waiting.clear()
            parts += [self.entry(self.target(name), name) for name in names]
            parts += list(self.further())
        parts.append("## Types in the signatures above\n")
        parts.append(
            "\n".join(
                self.alias(thing) for _, thing in sorted(self.aliases.items(), key=lambda item: (item[1].name, item[0]))
            )
            + "\n"
        )
        parts.append("## Errors\n\nEvery error is a `TqggufError`. Brackets name its other base classes.\n")
        parts.append("\n".join(self.error(self.target(name)) for name in errors) + "\n")
        parts.append(self.reference())
        if self.missing:
            raise MissingDocstringError("no documentation of " + ", ".join(self.missing))
        return "\n".join(parts)

    def further(self) -> Iterator[str]:
        """Entries of the tqgguf classes that signatures and fields name, recursively."""
        while self.waiting:
            found = self.waiting.pop(0)
            if found.path not in self.shown:
                self.shown[found.path] = found.path
                yield self.entry(found, found.path)

    # ---- Entries ----

    def entry(self, thing: Any, name: str) -> str:
        """A heading, the signature and the docstring; for a class also its methods."""
        if thing.is_attribute:
            return f"### {name}\n\n{self.prose(thing)}\n"
        lines = [f"### {name}\n"]
        if thing.is_function or not self.is_record(thing):
            lines.append(self.call(thing, name.split(".")[-1]))
        lines.append(self.prose(thing))
        if thing.is_class:
            for member in self.members(thing).values():
                if member.is_function and self.is_public(member):
                    title = f"#### {thing.name}.{member.name}\n"
                    lines += [title, self.call(member, member.name), self.prose(member)]
        return "\n".join(lines)

    def members(self, thing: Any) -> dict[str, Any]:
        """What a class has, and then what it has from classes of this package that have no public name."""
        found = dict(thing.members)
        for base in map(self.ours, thing.bases):
            if base is not None and base.is_class and base.path not in self.shown:
                found |= {name: member for name, member in self.members(base).items() if name not in found}
        return found

    def alias(self, thing: Any) -> str:
        """A type alias in one line; with its module if another alias has the same name."""
        shared = sum(other.name == thing.name for other in self.aliases.values()) > 1
        of = f" of {thing.parent.path}" if shared else ""
        return f"- **{thing.name}**{of}, `{thing.value}`: {self.words(self.prose(thing))}"

    def error(self, thing: Any) -> str:
        """An exception in one line."""
        bases = [str(base) for base in thing.bases if str(base) not in ("TqggufError", "Exception")]
        also = f" ({', '.join(bases)})" if bases else ""
        return f"- **{thing.name}**{also}: {self.words(self.prose(thing))}"

    def reference(self) -> str:
        """The module tqgguf.reference: one line for each of its functions."""
        module = self.package["reference"]
        text = module.docstring.value.split("\n\n")
        lines = ["## tqgguf.reference\n", self.words(text[0]), "", self.words(text[1]), ""]
        for name in module.exports:
            thing = module[str(name)]
            if thing.is_function:
                summary = self.words(self.prose(thing).split("\n\n")[0])
                lines.append(f"- `{thing.name}({', '.join(p.name for p in thing.parameters)})`: {summary}")
        return "\n".join(lines) + "\n"

    # ---- Parts of an entry ----

    def is_public(self, member: Any) -> bool:
        return not member.name.startswith("_")

    def is_record(self, thing: Any) -> bool:
        """Whether users only read objects of this class and do not construct them."""
        return thing.name not in ("Llama", "PqoCache", "CacheConfig", "CachePolicy")

    def call(self, thing: Any, name: str) -> str:
        """The signature in a code fence."""
        function = thing
        if thing.is_class and "dataclass" not in thing.labels:
            function = thing.members.get("__init__")
            if function is None:
                return ""
        head = "class " if thing.is_class else ""
        one = self.signature(function, name)
        if len(head + one) > 110:
            one = re.sub(r"\n    self,", "", self.signature(function, name, broken=True))
        return f"```python\n{head}{one}\n```\n"

    def signature(self, function: Any, name: str, *, broken: bool = False) -> str:
        """The signature, on one line or, if broken, with one parameter a line."""
        parameters, star = [], False
        owner = function.docstring or function.parent.docstring
        said = owner.value if owner else ""
        for parameter in function.parameters:
            if parameter.name == "self":
                continue
            kind = parameter.kind.value
            if kind == "keyword-only" and not star:
                parameters.append("*")
            star = star or kind in ("keyword-only", "variadic positional")
            mark = {"variadic keyword": "**", "variadic positional": "*"}.get(kind, "")
            text = f"{mark}{parameter.name}: {parameter.annotation}"
            self.follow(parameter.annotation)
            if parameter.default is not None and not mark:
                text += f" = {self.value(parameter.default)}"
            if not re.search(rf"\b{parameter.name}\b", said):
                self.missing.append(f"{function.path}({parameter.name})")
            parameters.append(text)
        inner = "(\n    " + ",\n    ".join(parameters) + ",\n)" if broken else f"({', '.join(parameters)})"
        returns = getattr(function, "returns", None)
        made = "" if returns is None or function.name == "__init__" or function.is_class else f" -> {returns}"
        return name + inner + made

    def prose(self, thing: Any) -> str:
        """The docstring, with its sections as lists."""
        if not thing.docstring:
            self.missing.append(thing.path)
            return ""
        parts = []
        explained: set[str] = set()
        for section in thing.docstring.parsed:
            kind = section.kind.value
            if kind == "text":
                parts.append(self.literal(section.value) + "\n")
            elif kind in ("parameters", "attributes"):
                explained |= {item.name for item in section.value}
                parts.append(self.items("Arguments" if kind == "parameters" else "Attributes", section.value, thing))
            elif kind in ("returns", "yields"):
                said = " ".join(self.words(item.description) for item in section.value)
                parts.append(f"**{kind.title()}** {said}\n")
            elif kind == "raises":
                errors = [(str(item.annotation).strip("()"), self.words(item.description)) for item in section.value]
                parts.append("**Raises**\n\n" + "\n".join(f"- `{kind}`: {when}" for kind, when in errors) + "\n")
        if thing.is_class:
            parts.append(self.fields(thing, explained))
        return "\n".join(part for part in parts if part)

    def items(self, title: str, items: list[Any], thing: Any) -> str:
        lines = []
        for item in items:
            name = item.name.lstrip("*")
            kind = ""
            if title == "Attributes" and name in thing.members and (annotation := thing.members[name].annotation):
                kind = f" ({self.plain(annotation)})"
                self.follow(annotation)
            lines.append(f"- `{item.name}`{kind}: {self.words(item.description)}")
        return f"**{title}**\n\n" + "\n".join(lines) + "\n"

    def fields(self, thing: Any, explained: set[str]) -> str:
        """The properties as a list; notes dataclass fields that the docstring does not explain as missing."""
        lines = []
        for member in self.members(thing).values():
            if not member.is_attribute or not self.is_public(member) or member.name in explained:
                continue
            if "property" in member.labels:
                if "setter" not in member.labels and member.docstring is None:
                    self.missing.append(member.path)
                if member.docstring is not None:
                    said = self.words(member.docstring.value.split("\n\nRaises:")[0])
                    lines.append(f"- `{member.name}` ({self.plain(member.annotation)}): {said}")
                    self.follow(member.annotation)
            elif "dataclass" in thing.labels:
                self.missing.append(member.path)
        return "**Properties**\n\n" + "\n".join(lines) + "\n" if lines else ""

    def follow(self, annotation: Any) -> None:
        """Collects the tqgguf classes and aliases that an annotation names."""
        for part in () if annotation is None or isinstance(annotation, str) else annotation.iterate(flat=True):
            found = self.ours(part)
            if found is not None and found.is_class and "._" not in found.path:
                self.waiting.append(found)
            elif found is not None and found.is_attribute:
                self.aliases[found.path] = found

    def ours(self, expression: Any) -> Any:
        """The tqgguf object of a name in an annotation or default, or None."""
        path = getattr(expression, "canonical_path", "")
        if not path.startswith("tqgguf."):
            return None
        try:
            found = self.package[path.removeprefix("tqgguf.")]
        except KeyError:
            return None
        return found.final_target if found.is_alias else found

    def value(self, default: Any) -> str:
        """A default; a tqgguf constant is replaced by its value."""
        found = self.ours(default)
        return str(found.value if found is not None and found.is_attribute else default).replace("'", '"')

    def plain(self, annotation: Any) -> str:
        return f"`{annotation}`"

    def words(self, text: str) -> str:
        """The text on one line."""
        return re.sub(r"\s+", " ", text).strip()

    def literal(self, text: str) -> str:
        """Turns "::" before an indented block into ":"."""
        return re.sub(r"::\n", ":\n", text)


def main() -> int:
    """Writes or checks the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is not up to date")
    args = parser.parse_args()
    try:
        text = page()
    except MissingDocstringError as error:
        sys.exit(f"{error}")
    if args.check:
        if PAGE.read_text(encoding="utf-8") != text:
            sys.exit(f"{PAGE.name} differs from the docstrings; update it: python docs/generate/api.py")
        return 0
    PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE.relative_to(REPOSITORY)}: {len(text):,} characters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
