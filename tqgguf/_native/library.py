"""Loads `libtqgguf` through cffi (ABI mode) and turns its status codes into exceptions.

The declarations are not written down a second time: they are read from the installed `tqgguf.h`, from the region that
the header marks for it.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from ..errors import ArgumentError, LibraryError, OutOfMemoryError, TqggufError, UnsupportedError

PACKAGE_DIR: Final = Path(__file__).absolute().parent.parent

LIB_DIR: Final = PACKAGE_DIR / "lib"
"""Where the build puts libtqgguf, libggml*, libllama and libmtmd."""

SUFFIX: Final = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")


def library_path(name: str = "tqgguf") -> Path:
    """Path of one of our shared libraries, which need not exist; TQGGUF_LIB names another libtqgguf."""
    if name == "tqgguf" and os.environ.get("TQGGUF_LIB"):
        return Path(os.environ["TQGGUF_LIB"])
    prefix = "" if sys.platform == "win32" else "lib"
    return LIB_DIR / f"{prefix}{name}{SUFFIX}"


def header_path(name: str = "tqgguf.h") -> Path:
    """Where a header is: installed in the package, or in a checkout that is not built."""
    installed = PACKAGE_DIR / "include" / name
    return installed if installed.is_file() else next(PACKAGE_DIR.parent.glob(f"native/*/{name}"), installed)


@functools.cache
def read_header(path: Path | None = None) -> str:
    """The text of a header, tqgguf.h by default."""
    path = path or header_path()
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise LibraryError(f"cannot read {path}: {error.strerror}; this installation of tqgguf is incomplete") from None


def version_in(header: str, name: str) -> int:
    """The number that a header defines."""
    match = re.search(rf"#define\s+{name}\s+(\d+)", header)
    if match is None:
        raise LibraryError(f"the header of tqgguf does not define {name}; this installation of tqgguf is incomplete")
    return int(match.group(1))


def abi_version_expected() -> int:
    """TQ_ABI_VERSION of the header this package was written against."""
    return version_in(read_header(), "TQ_ABI_VERSION")


def declarations(header: str) -> str:
    """The part of a header that cffi reads."""
    parts = re.split(r"/\* cffi: (?:begin|end) \*/", header)
    if len(parts) != 3:
        raise LibraryError("a header of tqgguf lacks the region between 'cffi: begin' and 'cffi: end'")
    return re.sub(r"\bTQ_\w*API ", "", parts[1])


class NativeLibrary:
    """A library of this package, loaded if its version is the one that its headers have.

    Attributes:
        ffi: the cffi instance that knows the headers' types.
        lib: the functions and enum constants of the headers.
        path: the file that was loaded.

    Args:
        path: the file.
        prefix: what the names of its functions begin with.
        expected: its version.
        headers: the texts of its headers.
        missing: what to say where there is no file.
        make: the command that builds it.
        flags: for dlopen.

    Raises:
        LibraryError: the file does not exist, cannot be loaded, or is of another version.
    """

    def __init__(
        self, path: Path, prefix: str, expected: int, headers: Sequence[str], missing: str, make: str, flags: int = 0
    ) -> None:
        import cffi  # type: ignore[import-untyped]

        if not path.is_file():
            raise LibraryError(f"{path} does not exist: {missing}")
        # The version comes first, with a declaration of its own: nothing else of a foreign library may be trusted.
        probe = cffi.FFI()
        probe.cdef(f"int {prefix}_abi_version(void);")
        try:
            opened = probe.dlopen(str(path), flags)
            try:
                found = int(getattr(opened, f"{prefix}_abi_version")())
            finally:
                probe.dlclose(opened)  # one that is refused must not stay in the process
        except (OSError, AttributeError) as error:
            raise LibraryError(f"cannot load {path}: {error}") from None
        if found != expected:
            raise LibraryError(
                f"{path} has ABI version {found}, this tqgguf needs {expected}: "
                f"library and package come from different builds; rebuild with `{make}` or reinstall the wheel"
            )
        self.ffi: Any = cffi.FFI()
        for header in headers:
            self.ffi.cdef(declarations(header))
        self.lib: Any = self.ffi.dlopen(str(path), flags)
        self.path = path
        self._last_error = getattr(self.lib, f"{prefix}_last_error")

    def check(self, status: int) -> int:
        """Returns a status that is not negative; raises what a negative one means, with the library's message."""
        if status >= 0:
            return status
        raise self.error(status)

    def error(self, status: int) -> TqggufError:
        """The exception that a status of the last call stands for, with the library's message."""
        message = self.ffi.string(self._last_error()).decode("utf-8", "replace") or f"status {status}"
        kinds: dict[int, type[TqggufError]] = {
            self.lib.TQ_E_ARGUMENT: ArgumentError,
            self.lib.TQ_E_MEMORY: OutOfMemoryError,
            self.lib.TQ_E_UNSUPPORTED: UnsupportedError,
        }
        return kinds.get(status, TqggufError)(message)


NOT_BUILT: Final = (
    "the native libraries of this tqgguf are not built. In a source checkout, type `make`; otherwise reinstall the "
    "tqgguf wheel."
)


class Library(NativeLibrary):
    """The loaded libtqgguf."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "tq", abi_version_expected(), [read_header()], NOT_BUILT, "make")
        forced = os.environ.get("TQGGUF_KERNEL")
        if forced:
            # Left to itself the library ends the process over a bad name when a kernel is first needed.
            try:
                self.force_kernel(forced)
            except TqggufError as error:
                raise type(error)(f"environment variable TQGGUF_KERNEL: {error}") from None

    def kernels(self) -> dict[str, bool]:
        """Kernel names in the library's order of preference, and whether this machine can run each."""
        names = (self.ffi.string(self.lib.tq_kernel_name(i)).decode() for i in range(self.lib.tq_kernel_count()))
        return {name: self.lib.tq_kernel_supported(i) == 1 for i, name in enumerate(names)}

    def active_kernel(self) -> str:
        """Name of the kernel in use."""
        name: str = self.ffi.string(self.lib.tq_kernel_active()).decode()
        return name

    def force_kernel(self, name: str = "auto") -> None:
        """Selects a kernel for the whole process; `auto` is the best one this machine can run.

        Raises:
            ArgumentError: no kernel of this library has the name.
            UnsupportedError: this machine cannot run the kernel.
        """
        self.check(self.lib.tq_kernel_force(name.encode()))

    def version(self) -> str:
        """Version of the library itself."""
        text: str = self.ffi.string(self.lib.tq_version()).decode()
        return text


@functools.cache
def library() -> Library:
    """The one libtqgguf of this process, loaded at the first call.

    Raises:
        LibraryError: it is missing, cannot be loaded, or is of another version.
        ArgumentError: the environment variable TQGGUF_KERNEL names a kernel that does not exist.
        UnsupportedError: it names one that this machine cannot run.
    """
    return Library(library_path())


def check(status: int) -> int:
    """`Library.check` of the loaded library."""
    return library().check(status)


def loaded_libraries() -> dict[str, list[Path]] | None:
    """Files mapped into this process, by family: `tqgguf`, `llama`, `ggml` (all of them), `mtmd`.

    None where the platform does not tell (it is read from /proc/self/maps).
    """
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
    found: dict[str, set[Path]] = {"tqgguf": set(), "llama": set(), "ggml": set(), "mtmd": set()}
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or not fields[5].startswith("/"):
            continue
        path = Path(fields[5].removesuffix(" (deleted)"))
        match = re.fullmatch(r"lib(tqgguf|llama|mtmd|ggml(?:-[\w.-]+?)?)\.so[.\d]*", path.name)
        if match:
            found[match.group(1).split("-")[0]].add(path)
    return {family: sorted(paths) for family, paths in found.items()}
