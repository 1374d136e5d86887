"""ggml's CUDA nodes with our types (native/ggml/tq_ggml_cuda.c), kernels emulated, against the CPU backend."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest

from tqgguf import _native, reference
from tqgguf._native import library_path
from tqgguf.config import CACHE_TYPES

ROOT = Path(__file__).parents[2]
UPSTREAM = ROOT / "build" / "upstream" / "llama.cpp" / "ggml"
NUMBERS = {"f32": 0, "f16": 1, "q8_0": 8, "i32": 26, "i64": 27, "bf16": 30} | {
    name: CACHE_TYPES[name].number for name in reference.TYPES
}
TOLERANCE = 3e-3
"""Relative L2 error of attention: 2e-3 of the fused kernel (test_cuda_attention.py), and the CPU kernels' own."""
FUSED_VECTORS = 32
"""TQ_GGML_CUDA_FUSED_VECTORS."""


class Tensor(ctypes.Structure):
    """struct ggml_tensor."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.POINTER(Tensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]
Pointer = ctypes.POINTER(Tensor)
SUPPORTED = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_int, Pointer)
COMPUTE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, Pointer)


class Params(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_: ClassVar = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class Dense(ctypes.Structure):
    """struct tq_ggml_cuda_dense."""

    _fields_: ClassVar = [
        ("device", ctypes.c_int),
        ("supported", SUPPORTED),
        ("compute", COMPUTE),
        ("context", ctypes.c_void_p),
    ]


def build_adapter(cuda: Any, folder: Path) -> Path:
    """The adapter as a library that finds its kernels in the emulated one."""
    if not (UPSTREAM / "include" / "ggml.h").is_file() or shutil.which("cc") is None:
        pytest.skip("the adapter needs build/upstream (make install) and a C compiler")
    source = ROOT / "native/ggml/tq_ggml_cuda.c"
    kernels, ggml = cuda.path, Path(library_path("ggml-base"))
    headers = [*(ROOT / "native/ggml").glob("*.h"), ROOT / "native/cuda/tq_cuda.h", ROOT / "native/include/tqgguf.h"]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in (source, *sorted(headers))))
    out = folder / f"libtq_ggml_cuda-{digest.hexdigest()[:16]}.so"
    includes = [
        *(f"-I{ROOT / 'native' / name}" for name in ("ggml", "cuda", "include")),
        *(f"-I{UPSTREAM / name}" for name in ("include", "src")),
    ]
    flags = ["-std=c11", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function"]
    libraries = [str(kernels), str(ggml), f"-Wl,-rpath,{kernels.parent},-rpath,{ggml.parent}"]
    subprocess.run(["cc", *flags, *includes, str(source), *libraries, "-o", str(out)], check=True)
    return out


class Ggml:
    """A ggml context, the CPU backend, and the adapter."""

    def __init__(self, adapter: Path) -> None:
        self.base = ctypes.CDLL(str(library_path("ggml-base")))
        _native.import_llama_cpp()
        self.cpu = ctypes.CDLL(str(_native.cpu_backend_path()))
        self.adapter = ctypes.CDLL(str(adapter))
        self.base.ggml_init.restype = ctypes.c_void_p
        self.base.ggml_row_size.restype = ctypes.c_size_t
        self.base.ggml_nbytes.restype = ctypes.c_size_t
        self.base.ggml_new_graph.restype = ctypes.c_void_p
        self.adapter.tq_ggml_cuda_reason.restype = ctypes.c_char_p
        self.adapter.tq_ggml_cuda_supported.restype = self.adapter.tq_ggml_cuda_used.restype = ctypes.c_bool
        self.adapter.tq_ggml_cuda_alloc_bytes.restype = ctypes.c_size_t
        self.context = ctypes.c_void_p(self.base.ggml_init(Params(64 << 20, None, False)))
        self.n_dense = 0
        self.dense_takes = True
        self.dense = Dense(5, SUPPORTED(self._dense_supported), COMPUTE(self._dense_compute), None)

    def free(self) -> None:
        self.base.ggml_free(self.context)

    def _dense_supported(self, device: int, node: Any) -> bool:
        assert device == 5
        assert {node.contents.src[i].contents.type for i in (1, 2)} == {NUMBERS["f16"]}
        assert not any(node.contents.src[i] for i in range(5, 10))
        return self.dense_takes

    def _dense_compute(self, _: int | None, node: Any) -> None:
        self.n_dense += 1
        self._compute(node)

    def _compute(self, node: Any) -> None:
        graph = ctypes.c_void_p(self.base.ggml_new_graph(self.context))
        self.base.ggml_build_forward_expand(graph, node)
        assert self.cpu.ggml_graph_compute_with_ctx(self.context, graph, 2) == 0

    def call(self, name: str, *args: Any) -> Any:
        """ggml_<name>(context, ...): a tensor. Integers are int64, numbers float."""
        function = getattr(self.base, f"ggml_{name}")
        function.restype = Pointer
        convert = {int: ctypes.c_int64, float: ctypes.c_float}
        return function(self.context, *(convert.get(type(a), lambda a: a)(a) for a in args))

    def new(self, type: str, *ne: int) -> Any:
        shape = [*ne, 1, 1, 1][:4]
        return self.call("new_tensor_4d", ctypes.c_int(NUMBERS[type]), *shape)

    def view(self, t: Any, ne: tuple[int, int, int, int], nb: tuple[int, int, int], offset: int = 0) -> Any:
        return self.call("view_4d", t, *ne, *(ctypes.c_size_t(n) for n in (*nb, offset)))

    def permute(self, t: Any) -> Any:
        return self.call("permute", t, *(ctypes.c_int(i) for i in (0, 2, 1, 3)))

    def row_size(self, type: str, n: int) -> int:
        return int(self.base.ggml_row_size(ctypes.c_int(NUMBERS[type]), ctypes.c_int64(n)))

    def bytes_of(self, t: Any) -> npt.NDArray[np.uint8]:
        """The memory of a tensor, to read and to write."""
        n = int(self.base.ggml_nbytes(t))
        return np.ctypeslib.as_array(ctypes.cast(t.contents.data, ctypes.POINTER(ctypes.c_uint8)), (n,))

    def put(self, t: Any, array: npt.NDArray[Any]) -> Any:
        self.bytes_of(t)[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return t

    def floats(self, type: str, array: npt.NDArray[np.float32]) -> Any:
        t = self.new(type, *array.shape[::-1])
        if type == "bf16":
            return self.put(t, (array.view(np.uint32) >> 16).astype(np.uint16))
        return self.put(t, array.astype({"f32": np.float32, "f16": np.float16}[type]))

    def encoded(self, type: str, array: npt.NDArray[np.float32]) -> Any:
        """A tensor of any type with these values, written by the CPU."""
        t = self.new(type, *array.shape[::-1])
        self._compute(self.call("cpy", self.floats("f32", array), t))
        return t

    def both(self, node: Any, *written: Any) -> list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]:
        """What the node writes into its own tensor and the others named: (adapter, CPU) of each."""
        tensors = (node, *written)
        before = [self.bytes_of(t).copy() for t in tensors]
        self._compute(node)
        want = [self.bytes_of(t).copy() for t in tensors]
        for t, data in zip(tensors, before, strict=True):
            self.bytes_of(t)[:] = data
        self.compute(node)
        return [(self.bytes_of(t).copy(), data) for t, data in zip(tensors, want, strict=True)]

    def compute(self, node: Any) -> None:
        """The node by the adapter, as the hook in ggml-cuda.cu does it."""
        assert self.adapter.tq_ggml_cuda_used(node)
        assert self.adapter.tq_ggml_cuda_supported(node), self.adapter.tq_ggml_cuda_reason()
        n = self.adapter.tq_ggml_cuda_alloc_bytes(node, ctypes.byref(self.dense))
        data, size = node.contents.data, int(self.base.ggml_nbytes(node))
        if n == size:
            self.adapter.tq_ggml_cuda_compute(node, ctypes.byref(self.dense), None)
            return
        memory = np.full(n + 128, 0xFF, np.uint8)
        node.contents.data = -(-memory.ctypes.data // 128) * 128
        self.adapter.tq_ggml_cuda_compute(node, ctypes.byref(self.dense), None)
        ctypes.memmove(data, node.contents.data, size)
        assert (memory[node.contents.data - memory.ctypes.data + n :] == 0xFF).all()
        node.contents.data = data

    def refusal(self, node: Any) -> str:
        assert self.adapter.tq_ggml_cuda_used(node)
        assert not self.adapter.tq_ggml_cuda_supported(node)
        return str(self.adapter.tq_ggml_cuda_reason().decode())


@pytest.fixture(scope="module")
def adapter(cuda_build: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not cuda_build.emulated:
        pytest.skip("on a GPU test-backend-ops tests the adapter")
    return build_adapter(cuda_build, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def ggml(adapter: Path) -> Any:
    made = Ggml(adapter)
    yield made
    made.free()


def normal(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("type", reference.TYPES)
@pytest.mark.parametrize("source", ["f32", "f16"])
@pytest.mark.parametrize("ids", ["i64", "i32"])
def test_set_rows(ggml: Ggml, type: str, source: str, ids: str) -> None:
    cache = ggml.encoded(type, normal(2, 3, 20, 96))
    values = ggml.floats(source, normal(2, 3, 7, 96, seed=1))
    rows = np.array([[[3, 0, 19, 7, 11, 2, 5]], [[1, 2, 3, 4, 5, 6, 18]]])
    numbers = ggml.put(ggml.new(ids, 7, 1, 2), rows.astype({"i64": np.int64, "i32": np.int32}[ids]))
    ((got, want),) = ggml.both(ggml.call("set_rows", cache, values, numbers))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("type", reference.TYPES)
def test_get_rows(ggml: Ggml, type: str) -> None:
    cache = ggml.encoded(type, normal(2, 3, 20, 96))
    numbers = ggml.put(ggml.new("i32", 5, 3, 2), np.random.default_rng(2).integers(0, 20, 30).astype(np.int32))
    ((got, want),) = ggml.both(ggml.call("get_rows", cache, numbers))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("type", reference.TYPES)
def test_copies(ggml: Ggml, type: str) -> None:
    blocks = ggml.encoded(type, normal(3, 5, 128))
    for other in ("f32", "f16", "bf16", *(t for t in reference.TYPES if t != type)):
        pairs = ggml.both(ggml.call("cpy", blocks, ggml.new(other, 128, 5, 3)))
        np.testing.assert_array_equal(*pairs[0])
        if other not in reference.TYPES:
            pairs = ggml.both(ggml.call("cpy", ggml.floats(other, normal(3, 5, 128, seed=3)), ggml.new(type, 64, 30)))
            np.testing.assert_array_equal(*pairs[0])
    # a context shift: two of four blocks of each head, out and back
    row = ggml.row_size(type, 32)
    part = ggml.view(blocks, (64, 5, 3, 1), (4 * row, 20 * row, 60 * row), row)
    shown = ggml.new("f32", 64, 5, 3)
    pairs = ggml.both(ggml.call("cpy", part, shown))
    np.testing.assert_array_equal(*pairs[0])
    pairs = ggml.both(ggml.call("cpy", shown, part), blocks)
    np.testing.assert_array_equal(*pairs[1])


def cache_of(ggml: Ggml, type: str, n_head: int, head_dim: int, n_cells: int, n_stream: int, seed: int) -> Any:
    t = ggml.encoded(type, normal(n_stream, n_cells, n_head * head_dim, seed=seed))
    assert t.contents.op == 0
    return t


def attention_node(
    ggml: Ggml,
    k: Any,
    v: Any,
    types: tuple[str, ...],
    dims: tuple[int, int],
    n_head: int,
    n_head_kv: int,
    n_q: int,
    n_kv: int,
    first_stream: int = 0,
    bias: float = 0.0,
) -> Any:
    """FLASH_ATTN_EXT over the first cells of caches (n_stream, n_cells, n_head_kv head_dim), as libllama makes it."""
    n_stream = k.contents.ne[2] - first_stream

    def heads(t: Any, type: str, dim: int, stride: int) -> Any:
        nb = (ggml.row_size(type, stride), t.contents.nb[1], t.contents.nb[2])
        return ggml.permute(ggml.view(t, (dim, n_head_kv, n_kv, n_stream), nb, first_stream * t.contents.nb[2]))

    same = ctypes.addressof(k.contents) == ctypes.addressof(v.contents)
    q = ggml.floats("f32", normal(n_stream, n_q, n_head, dims[0], seed=7))
    mask = np.zeros((n_stream, 1, n_q, n_kv), np.float16)
    mask[np.random.default_rng(8).random(mask.shape) < 0.3] = -np.inf
    mask[:] -= np.random.default_rng(9).uniform(0, 0.5, mask.shape)
    return ggml.call(
        "flash_attn_ext",
        ggml.permute(q),
        heads(k, types[0], dims[0], dims[0]),
        heads(v, types[1], dims[1], dims[0] if same else dims[1]),
        ggml.put(ggml.new("f16", n_kv, n_q, 1, n_stream), mask),
        float(dims[0] ** -0.5),
        bias,
        0.0,
    )


def check_attention(ggml: Ggml, node: Any) -> None:
    ((got, want),) = ggml.both(node)
    a, b = got.view(np.float32), want.view(np.float32)
    assert np.isfinite(a).all()
    assert np.linalg.norm(a - b) <= TOLERANCE * np.linalg.norm(b)


@pytest.mark.parametrize(
    "types",
    [("pqo3", "pqo3"), ("pqo4", "pqt3"), ("pqt4", "f16"), ("f16", "pqo4"), ("q8_0", "pqt3"), ("pqo3", "q8_0")],
)
@pytest.mark.parametrize("n_q", [1, 4, 9, 40])
@pytest.mark.parametrize("dense", [True, False])
def test_attention(ggml: Ggml, types: tuple[str, str], n_q: int, dense: bool) -> None:
    """Few query vectors: the fused kernel. Many: upstream's on decoded K and V, the fused one where it has none."""
    ggml.dense_takes = dense
    k = cache_of(ggml, types[0], 2, 64, 100, 2, 1)
    v = cache_of(ggml, types[1], 2, 96, 100, 2, 2)
    check_attention(ggml, attention_node(ggml, k, v, types, (64, 96), 8, 2, n_q, 90))
    assert ggml.n_dense == (dense and 4 * n_q > FUSED_VECTORS)
    check_attention(ggml, attention_node(ggml, k, v, types, (64, 96), 2, 2, n_q, 33, first_stream=1, bias=8.0))


@pytest.mark.parametrize("n_q", [1, 20])
def test_values_that_are_a_part_of_the_keys(ggml: Ggml, n_q: int) -> None:
    k = cache_of(ggml, "pqo4", 1, 192, 64, 1, 1)
    node = attention_node(ggml, k, k, ("pqo4", "pqo4"), (192, 128), 4, 1, n_q, 64)
    check_attention(ggml, node)
    n = ggml.adapter.tq_ggml_cuda_alloc_bytes(node, ctypes.byref(ggml.dense)) - int(ggml.base.ggml_nbytes(node))
    assert ggml.n_dense == (n_q == 20)
    assert n_q == 1 or n == 64 * 192 * 2  # V is not decoded for itself


def caches_with_tail(ggml: Ggml, types: tuple[str, str]) -> list[Any]:
    """K and V of 2 heads of 64, 48 cells and 2 streams, with a tail where the type is ours."""
    ggml.base.tq_ggml_tail_set(8, 0)
    caches = []
    for i, type in enumerate(types):
        t = cache_of(ggml, type, 2, 64, 48, 2, i)
        ggml.base.tq_ggml_tail_new(ggml.context, t, ctypes.c_bool(True))
        if t.contents.src[1]:
            ggml.bytes_of(t.contents.src[1]).fill(0)
        caches.append(t)
    ggml.base.tq_ggml_tail_set(0, 0)
    return caches


@pytest.mark.parametrize("types", [("pqo3", "pqo3"), ("pqt4", "f16"), ("q8_0", "pqt3")])
@pytest.mark.parametrize("n_tokens", [1, 30])
def test_a_precise_tail(ggml: Ggml, types: tuple[str, str], n_tokens: int) -> None:
    """Written by SET_ROWS, three times for a row each, and read by both ways of attention."""
    caches = caches_with_tail(ggml, types)
    for round in range(3):
        cells = np.random.default_rng(round).permutation(96)[:n_tokens].astype(np.int64)
        if round == 2:
            cells = np.arange(60, 60 + n_tokens)  # one after another, in the second stream
        for i, (t, type) in enumerate(zip(caches, types, strict=True)):
            values = ggml.floats("f32", normal(n_tokens, 128, seed=10 * round + i))
            numbers = ggml.put(ggml.new("i64", n_tokens), cells)
            node = ggml.call("set_rows", ggml.call("reshape_2d", t, 128, 96), values, numbers)
            if type not in reference.TYPES:
                ggml._compute(node)
                continue
            node.contents.src[3], node.contents.src[4] = t.contents.src[0], t.contents.src[1]
            for got, want in ggml.both(node, t.contents.src[0], t.contents.src[1]):
                np.testing.assert_array_equal(got, want)
    for n_q in (1, 20):
        for first_stream in (0, 1):
            node = attention_node(ggml, caches[0], caches[1], types, (64, 64), 4, 2, n_q, 40, first_stream)
            for i in range(2):
                if types[i] in reference.TYPES:
                    node.contents.src[5 + 2 * i] = caches[i].contents.src[0]
                    node.contents.src[6 + 2 * i] = caches[i].contents.src[1]
            check_attention(ggml, node)
            plain = attention_node(ggml, caches[0], caches[1], types, (64, 64), 4, 2, n_q, 40, first_stream)
            ggml.compute(node)
            ggml.compute(plain)
            a, b = (ggml.bytes_of(x).copy().view(np.float32) for x in (node, plain))
            assert n_tokens == 1 or np.linalg.norm(a - b) > 2 * TOLERANCE * np.linalg.norm(b)  # the tail was read


@pytest.mark.parametrize("n_tokens", [2, 9, 16])
@pytest.mark.parametrize("n_stream", [1, 2])
def test_a_batch_reads_its_own_copy_of_the_tail(ggml: Ggml, n_tokens: int, n_stream: int) -> None:
    """Two batches, of cells that have been written before, too; each token reads rows that later ones take."""
    types = ("pqo3", "pqt3")
    caches = caches_with_tail(ggml, types)
    first = 2 - n_stream  # of the streams
    for round in range(2):
        rng = np.random.default_rng(round)
        cells = np.concatenate([48 * s + rng.permutation(48)[:n_tokens] for s in range(first, 2)])
        if round == 1:
            cells = np.concatenate([48 * s + 20 + np.arange(n_tokens) for s in range(first, 2)])
        node = attention_node(ggml, *caches, types, (64, 64), 4, 2, n_tokens, 48, first)
        plain = attention_node(ggml, *caches, types, (64, 64), 4, 2, n_tokens, 48, first)
        for i, t in enumerate(caches):
            values = ggml.floats("f32", normal(n_stream * n_tokens, 128, seed=10 * round + i))
            numbers = ggml.put(ggml.new("i64", n_stream * n_tokens), cells)
            write = ggml.call("set_rows", ggml.call("reshape_2d", t, 128, 96), values, numbers)
            ggml.base.tq_ggml_tail_set_rows.restype = Pointer
            ggml.base.tq_ggml_tail_set_rows(ggml.context, write, ctypes.c_int64(first), ctypes.c_int64(n_stream))
            for j in range(2):
                copy = write.contents.src[5 + j]
                ((got, want),) = ggml.both(copy)
                np.testing.assert_array_equal(got, want)
                copy.contents.op = 0  # what it holds now is read, not made again
                node.contents.src[5 + 2 * i + j] = copy
                plain.contents.src[5 + 2 * i + j] = t.contents.src[j]
            for got, want in ggml.both(write, t.contents.src[0], t.contents.src[1]):
                np.testing.assert_array_equal(got, want)
        check_attention(ggml, node)
        ggml.compute(node)
        ggml.compute(plain)
        a, b = (ggml.bytes_of(x).copy().view(np.float32) for x in (node, plain))
        # the copy was read: of more tokens than rows, the last ones take rows of the first
        assert n_tokens < 9 or np.linalg.norm(a - b) > 2 * TOLERANCE * np.linalg.norm(b)


def test_what_is_refused_is_named(ggml: Ggml) -> None:
    k, other = cache_of(ggml, "pqo3", 2, 64, 64, 1, 1), cache_of(ggml, "bf16", 2, 64, 64, 1, 2)
    node = attention_node(ggml, k, other, ("pqo3", "bf16"), (64, 64), 4, 2, 1, 64)
    assert "K of pqo3 with V of bf16" in ggml.refusal(node)
    other = cache_of(ggml, "q8_0", 2, 64, 64, 1, 2)
    wide = cache_of(ggml, "pqo3", 1, 544, 64, 1, 1)
    node = attention_node(ggml, wide, wide, ("pqo3", "pqo3"), (544, 544), 4, 1, 1, 64)
    assert "head_dim = 544" in ggml.refusal(node)
    assert "copying pqo3 to q8_0" in ggml.refusal(ggml.call("cpy", k, other))
    row = ggml.row_size("pqo3", 64)
    part = ggml.view(k, (64, 64, 1, 1), (2 * row, 128 * row, 128 * row))
    assert "other strides" in ggml.refusal(ggml.call("cpy", part, ggml.new("pqo3", 64, 64)))
    for turned in (ggml.call("transpose", k), ggml.call("permute", k, *(ctypes.c_int(i) for i in (2, 1, 0, 3)))):
        node = ggml.call("cpy", turned, ggml.new("f32", *turned.contents.ne))
        assert "do not lie side by side" in ggml.refusal(node)
    node = attention_node(ggml, k, k, ("pqo3", "pqo3"), (64, 64), 4, 2, 1, 64)
    node.contents.src[0].contents.nb[0] = 8
    assert "in one piece" in ggml.refusal(node)


@pytest.mark.parametrize("types", [("q8_0", "f16"), ("f16", "q8_0"), ("pqo3", "q8_0")])
def test_a_tail_beside_a_stock_type_is_refused(ggml: Ggml, types: tuple[str, str]) -> None:
    k, v = (cache_of(ggml, type, 2, 64, 64, 1, i) for i, type in enumerate(types))
    node = attention_node(ggml, k, v, types, (64, 64), 4, 2, 1, 64)
    ours = "pqo3" in types
    assert ggml.adapter.tq_ggml_cuda_used(node) == ours
    side = types.index("q8_0")
    node.contents.src[5 + 2 * side], node.contents.src[6 + 2 * side] = ggml.new("f16", 128, 8), ggml.new("i32", 8)
    assert "tail beside q8_0 is read and written on the CPU only" in ggml.refusal(node)
    cache = (k, v)[side]
    node = ggml.call("set_rows", cache, ggml.new("f32", 128, 1), ggml.new("i64", 1))
    assert not ggml.adapter.tq_ggml_cuda_used(node)
    node.contents.src[3], node.contents.src[4] = ggml.new("f16", 128, 8), ggml.new("i32", 8)
    assert "tail beside q8_0" in ggml.refusal(node)


def test_a_cache_in_host_memory_is_left_to_the_cpu(ggml: Ggml) -> None:
    """Else the scheduler would copy the view, and a tail be looked for beside the copy."""
    k = cache_of(ggml, "pqo3", 2, 64, 64, 1, 1)
    node = attention_node(ggml, k, k, ("pqo3", "pqo3"), (64, 64), 4, 2, 1, 64)
    ggml.base.ggml_backend_cpu_buffer_type.restype = ggml.base.ggml_backend_buft_alloc_buffer.restype = ctypes.c_void_p
    kind = ctypes.c_void_p(ggml.base.ggml_backend_cpu_buffer_type())
    k.contents.buffer = ggml.base.ggml_backend_buft_alloc_buffer(kind, ctypes.c_size_t(64))
    assert "in the CPU's memory" in ggml.refusal(node)
    ggml.base.ggml_backend_buffer_free(ctypes.c_void_p(k.contents.buffer))


def test_other_nodes_are_upstreams(ggml: Ggml) -> None:
    f16 = cache_of(ggml, "f16", 2, 64, 64, 1, 1)
    k = cache_of(ggml, "pqo3", 2, 64, 64, 1, 1)
    for node in (
        ggml.call("cpy", f16, ggml.new("f32", 128, 64)),
        ggml.call("cpy", k, ggml.new("pqo3", 128, 64)),
        attention_node(ggml, f16, f16, ("f16", "f16"), (64, 64), 4, 2, 1, 64),
        ggml.call("mul_mat", k, ggml.new("f32", 128, 2)),
    ):
        assert not ggml.adapter.tq_ggml_cuda_used(node)
