"""Loading libtqgguf: versions, missing and foreign files, forced kernels."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import here
import pytest

import tqgguf
from tqgguf import _native
from tqgguf._native.library import Library
from tqgguf.errors import ArgumentError, LibraryError, TqggufError


def test_versions_agree(native: Any) -> None:
    assert native.lib.tq_abi_version() == _native.abi_version_expected()
    assert native.version() == tqgguf.__version__
    assert native.path == _native.library_path()


def test_portable_is_listed_last_and_always_runs(native: Any) -> None:
    kernels = native.kernels()
    assert list(kernels)[-1] == "portable" and kernels["portable"]
    assert set(kernels) <= set(here.KERNELS)
    assert native.lib.tq_kernel_supported(len(kernels)) < 0
    assert native.lib.tq_kernel_supported(-1) < 0


def test_every_kernel_of_this_processor_is_tested(native: Any) -> None:
    """What the system says of the processor and what the library says of itself are two witnesses."""
    expected = here.kernels_by_flags()
    if expected is None:
        pytest.skip("the system does not say what this processor can do")
    assert set(here.kernels()) == expected
    assert [name for name, usable in native.kernels().items() if usable] == here.kernels()


def test_auto_takes_the_first_that_runs(native: Any) -> None:
    before = native.active_kernel()
    native.force_kernel("portable")
    native.force_kernel("auto")
    assert native.active_kernel() == next(name for name, usable in native.kernels().items() if usable)
    native.force_kernel(before)


def test_an_unknown_kernel_lists_the_valid_ones(native: Any) -> None:
    before = native.active_kernel()
    usable = ", ".join(name for name, runs in native.kernels().items() if runs)
    said = re.escape(f"kernel 'sse9' does not exist in this library; usable here: auto, {usable}")
    with pytest.raises(ArgumentError, match=said):
        native.force_kernel("sse9")
    assert native.active_kernel() == before


@pytest.mark.parametrize(("name", "good"), [("portable", True), ("auto", True), ("sse9", False)])
def test_the_environment_chooses_a_kernel(python: Callable[..., Any], name: str, good: bool) -> None:
    use = "tqgguf.quantize(numpy.ones(32, 'f4'), 'pqo3')"
    show = "print(tqgguf._native.library().active_kernel())"
    done = python("-c", f"import numpy, tqgguf; {use}; {show}", env={"TQGGUF_KERNEL": name})
    if good:
        assert done.returncode == 0 and (name == "auto" or done.stdout.strip() == name)
    else:
        assert done.returncode == 1
        assert "ArgumentError: environment variable TQGGUF_KERNEL: kernel 'sse9' does not exist" in done.stderr


def test_statuses_become_exceptions_with_the_message(native: Any) -> None:
    assert native.check(0) == 0 and native.check(7) == 7
    with pytest.raises(ArgumentError, match="mode 9"):
        native.check(native.lib.tq_codebook(300, 9, native.ffi.NULL, native.ffi.NULL))
    with pytest.raises(TqggufError):
        native.check(-99)


def test_a_missing_library_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match="make") as caught:
        Library(tmp_path / "libtqgguf.so")
    assert isinstance(caught.value, ImportError) and str(tmp_path) in str(caught.value)


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    path = tmp_path / "libtqgguf.so"
    path.write_bytes(b"not a library")
    with pytest.raises(LibraryError, match=r"libtqgguf\.so"):
        Library(path)


@pytest.mark.parametrize("source", ["int tq_abi_version(void) { return 99; }", "int other(void) { return 1; }"])
def test_a_library_of_another_version_is_refused(tmp_path: Path, source: str) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "stub.c").write_text(source)
    path = tmp_path / "libtqgguf.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(path), str(tmp_path / "stub.c")], check=True)
    with pytest.raises(LibraryError) as caught:
        Library(path)
    said = str(caught.value)
    assert str(path) in said
    if "99" in source:
        assert "99" in said and str(_native.abi_version_expected()) in said
