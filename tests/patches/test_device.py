"""Whether devices are asked for all that a graph wants of a cache that lies on them (native/ggml/tq_ggml_device.c).

The devices are made up: they support what a test lets them.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tqgguf._native import library_path
from tqgguf.config import CACHE_TYPES
from tqgguf.demo.model import MODEL_PATH

pytestmark = pytest.mark.skipif(not library_path("ggml-base").exists(), reason="the native libraries are not built")

N_CELLS = 256
NUMBERS = {"f32": 0, "i64": 27} | {name: kind.number for name, kind in CACHE_TYPES.items()}
GPU, META = 1, 4
"""Of enum ggml_backend_dev_type; META is several devices that share every tensor: split mode tensor."""

NAME = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
KIND = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
HOST = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)
SUPPORTS = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_void_p)
PROC_ADDRESS = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
REASON = ctypes.CFUNCTYPE(ctypes.c_void_p)


class InitParams(ctypes.Structure):
    _fields_: ClassVar = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class Device(ctypes.Structure):
    """struct ggml_backend_device of ggml-backend-impl.h; three of its fifteen functions matter."""

    _fields_: ClassVar = [
        ("get_name", NAME),
        ("unused", ctypes.c_void_p * 2),
        ("get_type", KIND),
        ("others", ctypes.c_void_p * 5),
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


class BufferType(ctypes.Structure):
    """struct ggml_backend_buffer_type."""

    _fields_: ClassVar = [
        ("unused", ctypes.c_void_p * 5),
        ("is_host", HOST),
        ("device", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    ]


class Buffer(ctypes.Structure):
    """struct ggml_backend_buffer."""

    _fields_: ClassVar = [
        ("functions", ctypes.c_void_p * 11),
        ("buft", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("usage", ctypes.c_int),
    ]


class Made:
    """A device that supports the operations for which allowed says so, what it was asked, and a buffer on it."""

    def __init__(
        self, base: Any, allowed: Callable[[str], bool], *, host: bool, kind: int, reason: bytes | None, rpc: bool
    ) -> None:
        self.names: list[str] = []

        def supports(_: int, node: int) -> bool:
            self.names.append(base.ggml_op_desc(ctypes.c_void_p(node)).decode())
            return allowed(self.names[-1])

        self.texts = [ctypes.create_string_buffer(text) for text in (b"Made0", reason or b"")]
        self.reason = REASON(lambda: ctypes.addressof(self.texts[1]))
        address = ctypes.cast(self.reason, ctypes.c_void_p).value if reason else None
        known = {b"tq_ggml_reason": address, b"ggml_backend_rpc_add_server": 1 if rpc else None}
        proc = PROC_ADDRESS(lambda _, name: known.get(name))
        self.registry = Registry(0, (ctypes.c_void_p * 3)(), proc, None)
        self.device = Device(
            get_name=NAME(lambda _: ctypes.addressof(self.texts[0])),
            get_type=KIND(lambda _: kind),
            supports_op=SUPPORTS(supports),
            reg=ctypes.addressof(self.registry),
        )
        self.type = BufferType(is_host=HOST(lambda _: host), device=ctypes.addressof(self.device))
        self.buffer = Buffer(buft=ctypes.addressof(self.type))


class Ggml:
    """A context of tensors without memory."""

    def __init__(self) -> None:
        self.base: Any = ctypes.CDLL(str(library_path("ggml-base")))
        for name in ("init", "new_graph"):
            getattr(self.base, f"ggml_{name}").restype = ctypes.c_void_p
        self.base.ggml_op_desc.restype = self.base.tq_ggml_graph_obstacle.restype = ctypes.c_char_p
        self.context = ctypes.c_void_p(self.base.ggml_init(InitParams(1 << 20, None, True)))

    def call(self, name: str, *args: Any) -> Any:
        function = getattr(self.base, f"ggml_{name}")
        function.restype = ctypes.c_void_p
        convert = {int: ctypes.c_int64, float: ctypes.c_float}
        return ctypes.c_void_p(function(self.context, *(convert.get(type(a), lambda a: a)(a) for a in args)))

    def new(self, type: str, *ne: int) -> Any:
        return self.call("new_tensor_4d", ctypes.c_int(NUMBERS[type]), *[*ne, 1, 1, 1][:4])

    def layer(self, types: tuple[str, str], buffer: Any, *, flash: bool, tail: int) -> Any:
        """A graph that writes a cache in buffer, of 8 heads of 64, and reads it, as one of libllama does."""
        graph = ctypes.c_void_p(self.base.ggml_new_graph(self.context))
        heads = []
        for type, name in zip(types, (b"cache_k_l0", b"cache_v_l0"), strict=True):
            cache = self.new(type, 512, N_CELLS)
            self.base.ggml_set_name(cache, name)
            assert cache.value
            ctypes.c_void_p.from_address(cache.value + 8).value = ctypes.addressof(buffer)  # behind ggml_tensor's type
            self.base.tq_ggml_tail_set(tail, tail)
            self.base.tq_ggml_tail_new(self.context, cache, ctypes.c_bool(flash))
            self.base.tq_ggml_tail_set(0, 0)
            written = self.call("set_rows", cache, self.new("f32", 512, 3), self.new("i64", 3))
            self.base.ggml_build_forward_expand(graph, written)
            split = self.call("reshape_4d", cache, 64, 8, N_CELLS, 1)
            heads.append(self.call("permute", split, *(ctypes.c_int(i) for i in (0, 2, 1, 3))))
        q = self.new("f32", 64, 3, 32)
        if flash:
            attended = self.call("flash_attn_ext", q, *heads, None, 0.125, 0.0, 0.0)
        else:
            attended = self.call("mul_mat", heads[0], q)
        self.base.ggml_build_forward_expand(graph, attended)
        return graph


def obstacle(
    types: tuple[str, str],
    allowed: Callable[[str], bool],
    *,
    host: bool = False,
    kind: int = GPU,
    reason: bytes | None = None,
    rpc: bool = False,
    flash: bool = True,
    tail: int = 0,
) -> tuple[str | None, list[str]]:
    """What is said of a graph, and what the device was asked."""
    ggml = Ggml()
    made = Made(ggml.base, allowed, host=host, kind=kind, reason=reason, rpc=rpc)
    said = ggml.base.tq_ggml_graph_obstacle(ggml.layer(types, made.buffer, flash=flash, tail=tail))
    ggml.base.ggml_free(ggml.context)
    return (said.decode() if said else None), made.names


def test_all_that_works_on_a_cache_of_ours_is_asked_for() -> None:
    said, names = obstacle(("pqo3", "pqt4"), lambda _: True)
    assert said is None
    assert set(names) == {"SET_ROWS", "FLASH_ATTN_EXT"}
    assert names.count("SET_ROWS") == 2


def test_stock_caches_and_those_in_memory_of_the_cpu_are_not_asked_for() -> None:
    assert obstacle(("f16", "q8_0"), lambda _: False) == (None, [])
    assert obstacle(("pqo3", "pqo3"), lambda _: False, host=True) == (None, [])


def test_a_tail_beside_a_stock_type_is_refused_by_backends_that_do_not_know_it() -> None:
    """They would say that they support the node, and leave the tail out."""
    said, names = obstacle(("q4_0", "f16"), lambda _: True, tail=8)
    assert said is not None and not names
    for text in ("Made0 cannot do SET_ROWS with cache_k_l0", "type q4_0 with a precise tail", "knows no tail"):
        assert text in said
    assert obstacle(("q4_0", "f16"), lambda _: True, tail=8, flash=False) == (None, [])
    assert obstacle(("q4_0", "f16"), lambda _: False, tail=8, host=True) == (None, [])
    assert obstacle(("f16", "f16"), lambda _: False, tail=8) == (None, [])
    for knows in ({"reason": b"because of the moon"}, {"rpc": True}):
        said, names = obstacle(("f16", "q4_0"), lambda _: True, tail=8, **knows)
        assert said is None and set(names) == {"SET_ROWS", "FLASH_ATTN_EXT"}
    said, _ = obstacle(("f16", "q4_0"), lambda _: False, tail=8, reason=b"because of the moon")
    assert said is not None and "q4_0 with a precise tail: because of the moon" in said
    said, _ = obstacle(("f16", "q4_0"), lambda _: True, tail=8, kind=META)
    assert said is not None and "q4_0 with a precise tail, which is not cut" in said


@pytest.mark.parametrize("op", ["SET_ROWS", "FLASH_ATTN_EXT"])
def test_what_is_missing_is_named(op: str) -> None:
    said, _ = obstacle(("f16", "pqo4"), lambda name: name != op)
    assert said is not None
    for text in (f"Made0 cannot do {op} with cache_v_l0", "type pqo4", "no kernel for this type", "--no-kv-offload"):
        assert text in said
    said, _ = obstacle(("pqo3", "pqo4"), lambda name: name != op, reason=b"because of the moon")
    assert said is not None
    assert "because of the moon" in said


def test_caches_are_not_cut_up_between_devices() -> None:
    said, names = obstacle(("f16", "pqo3"), lambda _: True, kind=META)
    assert said is not None
    assert not names
    for text in ("cache_v_l0", "type pqo3", "split mode tensor"):
        assert text in said
    assert obstacle(("f16", "q8_0"), lambda _: True, kind=META) == (None, [])


def test_without_flash_attention_the_product_is_asked_for() -> None:
    said, _ = obstacle(("pqo3", "f16"), lambda name: name != "MUL_MAT", flash=False, reason=b"nothing")
    assert said is not None
    assert "flash attention" in said


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
    """The library that is preloaded answers in ggml's stead, and refuses every graph."""
    source, library = tmp_path / "refuse.c", tmp_path / "refuse.so"
    source.write_text('const char * tq_ggml_graph_obstacle(void) { return "Made0 holds no such cache"; }')
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)

    def load(**environment: str) -> str:
        command = [sys.executable, "-c", PROGRAM, str(MODEL_PATH), "pqo3"]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
        return done.stdout

    assert load() == "loaded\n"
    assert "Made0 holds no such cache" in load(LD_PRELOAD=str(library))
