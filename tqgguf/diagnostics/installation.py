"""Checks this installation: versions, libraries, kernels."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .. import __version__, _native
from .._native import backends
from .._native.cuda import cuda_library, cuda_library_path
from .._native.libggml import library_of
from ..cache.calibration import calibration_folder, default_choice
from ..errors import TqggufError

UPSTREAM_VERSION: Final = "0.3.36"
"""The release of llama-cpp-python that llama.cpp and the bindings come from, pinned in patches/upstream.toml."""

_MARKS: Final = {
    "ggml-base": b"tq_ggml_policy_set\0",
    "ggml-cpu": b"tq_ggml_flash_attn_ext\0",
    "llama": b"tq_ggml_policy_type_k\0",
}
"""Names that the patched libraries define or call, and stock ones do not have."""

_FEATURES: Final = (
    *("AVX", "F16C", "FMA", "AVX2", "BMI2", "AVX_VNNI"),
    *("AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16", "AMX_INT8"),
)
_FLAGS: Final = {name: name.lower() for name in _FEATURES} | {"AVX512": "avx512f", "AVX512_VBMI": "avx512vbmi"}
"""Names of instruction sets in ggml, and the same in Linux's /proc/cpuinfo."""

_CPUINFO: Final = Path("/proc/cpuinfo")

_BUILD_ID: Final = b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0"
"""The bytes before the 20 bytes of an ELF file's build id (readelf -n)."""


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: the name of the check.
        ok: whether it passed.
        detail: the finding.
    """

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Installation:
    """The results of all checks.

    Attributes:
        checks: the results, in order.
        kernels: names of the kernels built in, and whether this machine can run each.
        kernel: the kernel in use; "" if the library could not be loaded.
    """

    checks: tuple[Check, ...]
    kernels: dict[str, bool]
    kernel: str

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)


def installation() -> Installation:
    """Loads the libraries and bindings and checks them; a failure becomes a failed check, not an exception."""
    kernels: dict[str, bool] = {}
    active = ""
    checks = [
        Check("tqgguf", True, f"{__version__} in {_native.LIB_DIR.parent}"),
        Check("python", sys.version_info >= (3, 10), f"{platform.python_version()} on {platform.platform()}"),
        Check("numpy", True, importlib.metadata.version("numpy")),
    ]

    def libtqgguf() -> str:
        nonlocal kernels, active
        native = _native.library()
        kernels, active = native.kernels(), native.active_kernel()
        if native.version() != __version__:
            raise TqggufError(f"{native.path} has version {native.version()}, the package {__version__}")
        return f"{native.version()}, ABI {_native.abi_version_expected()}, {native.path}"

    def kernel() -> str:
        forced = os.environ.get("TQGGUF_KERNEL")
        listed = ", ".join(name + ("" if usable else " (not on this machine)") for name, usable in kernels.items())
        return f"{active}{f' (TQGGUF_KERNEL={forced})' if forced else ''}; built in: {listed}"

    def bindings() -> str:
        module = _native.import_llama_cpp()
        if module.__version__ != UPSTREAM_VERSION:
            raise TqggufError(f"version {module.__version__} in {module.__file__}, pinned is {UPSTREAM_VERSION}")
        return f"{module.__version__} (the pinned upstream) in {os.path.dirname(str(module.__file__))}"

    def libraries() -> str:
        mapped = _native.loaded_libraries()
        if mapped is None:
            return "this platform does not tell which libraries are loaded"
        files = sorted(path for paths in mapped.values() for path in paths)
        if not files:
            raise TqggufError("none are loaded")
        foreign = [path for path in files if path.parent.resolve() != _native.LIB_DIR.resolve()]
        if foreign:
            raise TqggufError(f"not of this package: {', '.join(map(str, foreign))}; unset LD_LIBRARY_PATH, LD_PRELOAD")
        return f"{len(files)}, all from {files[0].parent}"

    checks.append(_look("libtqgguf", libtqgguf))
    if active:  # these load it, too, and would name its fault again
        looks: dict[str, Callable[[], str]] = {"kernel": kernel, "llama_cpp": bindings, "libraries": libraries}
        looks |= {f"lib{name}": functools.partial(_library, name) for name in _MARKS}
        checks += [_look(name, look) for name, look in {**looks, "cpu": _cpu}.items()]
    checks += [_look("cuda", _cuda), _look("calibrations", _calibrations)]
    return Installation(tuple(checks), kernels, active)


def _library(name: str) -> str:
    """The build of a library; raises TqggufError unless it is patched and loaded."""
    if name == "ggml-cpu" and _native.cpu_variants():
        return _variants()
    return _build(name, _native.library_path(name))


def _variants() -> str:
    """The variants of the CPU backend; raises TqggufError unless the best one, or the one asked for, is loaded."""
    variants = _native.cpu_variants()
    _native.import_llama_cpp()
    loaded = _native.cpu_backend_path()
    chosen = next((name for name, path in variants.items() if loaded and loaded.samefile(path)), None)
    if loaded is None or chosen is None:
        raise TqggufError(f"the CPU backend is {loaded or 'not loaded'}, none of {', '.join(variants)}")
    builds = {name: _build("ggml-cpu", path, loaded=name == chosen) for name, path in variants.items()}
    scores = {name: backends.score(path) for name, path in variants.items()}
    best = max(scores, key=lambda name: scores[name])
    listed = ", ".join(name + ("" if scores[name] else " (not on this machine)") for name in variants)
    found = f"{chosen}; built in: {listed}; {builds[chosen]}"
    if scores[best] == scores[chosen]:
        return found
    if os.environ.get(backends.VARIABLE) == chosen:
        return f"{backends.VARIABLE}={chosen}, though {best} is better here; {found}"
    raise TqggufError(f"{best} is better here and was not chosen: import tqgguf before other users of ggml; {found}")


def _cpu() -> str:
    """The processor's instruction sets that ggml uses; raises TqggufError if ggml uses one that it does not have."""
    told = _native.import_llama_cpp().llama_print_system_info().decode("utf-8", "replace")
    used = set(re.findall(r"(\w+) = 1", told))
    found = f"{os.cpu_count()} processors; ggml uses {', '.join(sorted(used)) or 'no extensions'}"
    try:
        flags = re.search(r"^flags\s*:(.*)$", _CPUINFO.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        flags = None
    if flags is None or platform.machine() == "aarch64":  # there qemu-user shows the flags of the machine it runs on
        return found
    has = {feature for feature, flag in _FLAGS.items() if flag in flags[1].split()}
    beyond = [feature for feature in _FLAGS if feature in used - has]
    if beyond:
        raise TqggufError(
            f"{found}; this processor has no {', '.join(beyond)}: ggml was compiled for another one and may end the "
            f"process with SIGILL; build on this machine or take the wheel for any processor (docs/wheels.md)"
        )
    if "AVX512_VNNI" in used:
        has.discard("AVX_VNNI")  # the same instructions on narrower registers
    unused = [feature for feature in _FLAGS if feature in has - used]
    return found + (f", not {', '.join(unused)}, which the processor has as well" if unused else "")


def _build(name: str, path: Path, loaded: bool = True) -> str:
    """The build of a file; raises TqggufError if it is not patched, or not loaded though it should be."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TqggufError(f"cannot read {path}: {error.strerror}; reinstall tqgguf") from None
    if _MARKS[name] not in data:
        raise TqggufError(f"{path} was built without the patches of tqgguf: reinstall tqgguf")
    mapped = _native.loaded_libraries()
    found = mapped is None or any(
        file.exists() and file.samefile(path) for files in mapped.values() for file in files if file.name == path.name
    )
    if loaded and not found:
        raise TqggufError(f"{path} exists but is not loaded: llama_cpp was not loaded, or was loaded from elsewhere")
    at = data.find(_BUILD_ID)
    build = data[at + len(_BUILD_ID) : at + len(_BUILD_ID) + 20].hex()[:12] if at >= 0 else "none"
    return f"ours; build id {build}, sha256 {hashlib.sha256(data).hexdigest()[:12]}"


def _cuda() -> str:
    """The CUDA libraries of this build; raises if one of them cannot be used."""
    driver = Path("/proc/driver/nvidia/version").exists()
    seen = "an NVIDIA driver is running" if driver else "no NVIDIA driver is running"
    found = []
    backend = _native.library_path("ggml-cuda")
    if backend.is_file():
        library_of(str(backend))
        found.append(f"{backend.name} (llama.cpp's backend)")
    kernels = cuda_library_path()
    if kernels.is_file():
        library = cuda_library()
        found.append(f"{library.path} ({'emulated on the CPU' if library.emulated else 'PqoCache on a GPU'})")
    if not found:
        return f"not in this build (docs/cuda.md says how to build it); {seen}"
    return f"{', '.join(found)}; {seen}"


def _calibrations() -> str:
    """Which calibration is the default; raises if the environment names none."""
    folder = calibration_folder()
    kept = len(list(folder.glob("*.gguf")))
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    closed = "" if nearest.is_dir() and os.access(nearest, os.W_OK) else ", which cannot be written to"
    return f"{default_choice()} by default; {kept} kept in {folder}{closed}"


def _look(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except (TqggufError, ImportError, OSError, RuntimeError) as error:
        return Check(name, False, str(error))
