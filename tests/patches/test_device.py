"""Whether a device is asked for all that llama.cpp will want of it, before there is a cache (tq_ggml_device.c).

The devices are made up: they support what a test lets them.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tqgguf._native import library_path
from tqgguf.config import CACHE_TYPES
from tqgguf.demo import MODEL_PATH

pytestmark = pytest.mark.skipif(not library_path("ggml-base").exists(), reason="the native libraries are not built")

CPU, GPU = 0, 1
N_CELLS = 256


NAME = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
KIND = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
SUPPORTS = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_void_p)
PROC_ADDRESS = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
REASON = ctypes.CFUNCTYPE(ctypes.c_void_p)


class InitParams(ctypes.Structure):
    _fields_: ClassVar = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class Device(ctypes.Structure):
    """struct ggml_backend_device of ggml-backend-impl.h; three of its fifteen functions matter."""

    _fields_: ClassVar = [
        ("get_name", NAME),
        ("get_description", ctypes.c_void_p),
        ("get_memory", ctypes.c_void_p),
        ("get_type", KIND),
        ("unused", ctypes.c_void_p * 5),
        ("supports_op", SUPPORTS),
        ("more", ctypes.c_void_p * 5),
        ("reg", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    ]


class Registry(ctypes.Structure):
    """struct ggml_backend_reg."""

    _fields_: ClassVar = [
        ("api_version", ctypes.c_int),
        ("functions", ctypes.c_void_p * 3),
        ("get_proc_address", PROC_ADDRESS),
        ("context", ctypes.c_void_p),
    ]


class Asked:
    """A device that supports the operations for which allowed says so, and what it was asked."""

    def __init__(self, base: Any, allowed: Callable[[str], bool], kind: int, reason: bytes | None) -> None:
        self.names: list[str] = []

        def supports(_: int, node: int) -> bool:
            self.names.append(base.ggml_op_desc(ctypes.c_void_p(node)).decode())
            return allowed(self.names[-1])

        self.texts = [ctypes.create_string_buffer(text) for text in (b"Made0", reason or b"")]
        self.reason = REASON(lambda: ctypes.addressof(self.texts[1]))
        address = ctypes.cast(self.reason, ctypes.c_void_p).value if reason else None
        proc = PROC_ADDRESS(lambda _, name: address if name == b"tq_ggml_reason" else None)
        self.registry = Registry(0, (ctypes.c_void_p * 3)(), proc, None)
        self.device = Device(
            get_name=NAME(lambda _: ctypes.addressof(self.texts[0])),
            get_type=KIND(lambda _: kind),
            supports_op=SUPPORTS(supports),
            reg=ctypes.addressof(self.registry),
        )


@pytest.fixture
def base() -> Iterator[Any]:
    lib: Any = ctypes.CDLL(str(library_path("ggml-base")))
    lib.ggml_init.restype = lib.ggml_new_tensor_3d.restype = ctypes.c_void_p
    lib.ggml_op_desc.restype = lib.tq_ggml_device_obstacle.restype = ctypes.c_char_p
    lib.context = ctypes.c_void_p(lib.ggml_init(InitParams(1 << 16, None, True)))
    yield lib
    lib.ggml_free(lib.context)


def obstacle(
    base: Any,
    types: tuple[str, str | None],
    allowed: Callable[[str], bool],
    *,
    kind: int = GPU,
    reason: bytes | None = None,
    flash: bool = True,
    tail: int = 0,
) -> tuple[str | None, list[str]]:
    """What is said of a cache of two streams, 8 heads of 64, and what the device was asked."""
    base.tq_ggml_tail_set(tail)
    tensors = []
    for type in types:
        tensor = None
        if type is not None:
            number = CACHE_TYPES[type].number
            ne = [ctypes.c_int64(n) for n in (512, N_CELLS, 2)]
            tensor = ctypes.c_void_p(base.ggml_new_tensor_3d(base.context, ctypes.c_int(number), *ne))
            base.tq_ggml_tail_new(base.context, tensor)
        tensors.append(tensor)
    base.tq_ggml_tail_set(0)
    asked = Asked(base, allowed, kind, reason)
    heads = [ctypes.c_int64(n) for n in (64, 64, 32)]
    said = base.tq_ggml_device_obstacle(ctypes.byref(asked.device), *tensors, *heads, ctypes.c_bool(flash))
    return (said.decode() if said else None), asked.names


def test_all_that_a_cache_needs_is_asked_for(base: Any) -> None:
    said, names = obstacle(base, ("pqo3", "pqt4"), lambda _: True, tail=128)
    assert said is None
    assert names == ["SET_ROWS", "SET_ROWS", "FLASH_ATTN_EXT"] * 2 + ["CPY", "CPY"]
    _, names = obstacle(base, ("f16", "pqo4"), lambda _: True)
    assert names == ["SET_ROWS", "FLASH_ATTN_EXT"] * 2
    _, names = obstacle(base, ("pqo4", None), lambda _: True)  # MLA
    assert names == ["SET_ROWS", "FLASH_ATTN_EXT"] * 2 + ["CPY", "CPY"]


def test_stock_caches_and_the_cpu_are_not_asked(base: Any) -> None:
    assert obstacle(base, ("f16", "q8_0"), lambda _: False) == (None, [])
    assert obstacle(base, ("pqo3", "pqo3"), lambda _: False, kind=CPU) == (None, [])


@pytest.mark.parametrize("op", ["SET_ROWS", "FLASH_ATTN_EXT", "CPY"])
def test_what_is_missing_is_named(base: Any, op: str) -> None:
    said, _ = obstacle(base, ("pqo3", "pqo4"), lambda name: name != op)
    assert said is not None
    for text in ("Made0", op, "pqo3 (K) and pqo4 (V)", "--no-kv-offload"):
        assert text in said
    said, _ = obstacle(base, ("pqo3", "pqo4"), lambda name: name != op, reason=b"because of the moon")
    assert said is not None
    assert "because of the moon" in said


def test_without_flash_attention_the_product_is_asked_for(base: Any) -> None:
    said, names = obstacle(base, ("pqo3", "f16"), lambda name: name != "MUL_MAT", flash=False, reason=b"nothing")
    assert names[-1] == "MUL_MAT"
    assert said is not None
    assert "needs flash_attn" in said


PROGRAM = """
import sys, tqgguf
try:
    tqgguf.Llama(sys.argv[1], cache=sys.argv[2], n_ctx=256, verbose=False)
except tqgguf.TqggufError as error:
    print(error)
else:
    print("loaded")
"""


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="it preloads a library made by cc")
def test_a_cache_that_its_device_cannot_hold_is_an_error_of_loading(tmp_path: Path) -> None:
    """Every device is made one that refuses, the CPU too: the library that is preloaded answers in ggml's stead."""
    source, library = tmp_path / "refuse.c", tmp_path / "refuse.so"
    source.write_text('const char * tq_ggml_device_obstacle(void) { return "Made0 holds no such cache"; }')
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)

    def load(**environment: str) -> str:
        command = [sys.executable, "-c", PROGRAM, str(MODEL_PATH), "pqo3"]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
        return done.stdout

    assert load() == "loaded\n"
    assert "Made0 holds no such cache" in load(LD_PRELOAD=str(library))
