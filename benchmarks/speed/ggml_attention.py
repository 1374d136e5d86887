"""Flash attention as llama.cpp computes it, through libggml's C interface, on the GPU's backend or the CPU's."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

import numpy as np

F32, F16 = 0, 1
CPU, GPU = 0, 1
"""GGML_BACKEND_DEVICE_TYPE_CPU, _GPU"""


class _InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """libggml's libraries in a folder, and one backend.

    Raises:
        OSError: they cannot be loaded.
        RuntimeError: there is no backend of that kind in this build or on this machine.
    """

    def __init__(self, folder: Path, device: int) -> None:
        self.base = ctypes.CDLL(str(folder / "libggml-base.so"))
        self.lib = ctypes.CDLL(str(folder / "libggml.so"))
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
        for lib, name, result, *arguments in (
            (self.lib, "ggml_backend_init_by_type", pointer, ctypes.c_int, pointer),
            (self.base, "ggml_backend_name", ctypes.c_char_p, pointer),
            (self.base, "ggml_backend_supports_op", ctypes.c_bool, pointer, pointer),
            (self.base, "ggml_backend_alloc_ctx_tensors", pointer, pointer, pointer),
            (self.base, "ggml_backend_buffer_free", None, pointer),
            (self.base, "ggml_backend_tensor_set", None, pointer, pointer, size, size),
            (self.base, "ggml_backend_graph_compute", ctypes.c_int, pointer, pointer),
            (self.base, "ggml_init", pointer, _InitParams),
            (self.base, "ggml_free", None, pointer),
            (self.base, "ggml_nbytes", size, pointer),
            (self.base, "ggml_row_size", size, ctypes.c_int, number),
            (self.base, "ggml_tensor_overhead", size),
            (self.base, "ggml_graph_overhead_custom", size, size, ctypes.c_bool),
            (self.base, "ggml_new_graph_custom", pointer, pointer, size, ctypes.c_bool),
            (self.base, "ggml_build_forward_expand", None, pointer, pointer),
            (self.base, "ggml_new_tensor_4d", pointer, pointer, ctypes.c_int, *[number] * 4),
            (self.base, "ggml_permute", pointer, pointer, pointer, *[ctypes.c_int] * 4),
            (self.base, "ggml_flash_attn_ext", pointer, *[pointer] * 5, *[ctypes.c_float] * 3),
        ):
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
        self.backend = self.lib.ggml_backend_init_by_type(device, None)
        if not self.backend:
            raise RuntimeError(f"{folder} has no {'GPU' if device == GPU else 'CPU'} backend that works here")
        self.name: str = self.base.ggml_backend_name(self.backend).decode()


class Attention:
    """A graph of calls of flash attention: one query row per stream, a mask, K and V laid out as in llama.cpp's cache.

    Args:
        blocks: bytes of the first tokens of K and V; they are repeated.
        n_copies: pairs of K and V, which the calls take in turn.
        n_calls: nodes of the graph.

    Raises:
        RuntimeError: the backend cannot compute this, or has no memory for it.
    """

    def __init__(
        self,
        ggml: Ggml,
        type: int,
        blocks: np.ndarray,
        *,
        head_dim: int,
        n_head: int,
        n_head_kv: int,
        n_kv: int,
        n_stream: int,
        n_copies: int,
        n_calls: int,
    ) -> None:
        base = self.base = ggml.base
        self.ggml, self.n_calls, self.buffer = ggml, n_calls, None
        n_tensors = 6 * n_copies + n_calls + 8
        n_bytes = n_tensors * base.ggml_tensor_overhead() + base.ggml_graph_overhead_custom(n_calls + 8, False)
        self.context: Any = base.ggml_init(_InitParams(n_bytes + 4096, None, True))
        try:
            q = base.ggml_new_tensor_4d(self.context, F32, head_dim, 1, n_head, n_stream)
            mask = base.ggml_new_tensor_4d(self.context, F16, n_kv, 1, 1, 1)
            stored = [
                [base.ggml_new_tensor_4d(self.context, type, head_dim, n_head_kv, n_kv, n_stream) for _ in "kv"]
                for _ in range(n_copies)
            ]
            pairs = [[base.ggml_permute(self.context, x, 0, 2, 1, 3) for x in pair] for pair in stored]
            self.graph = base.ggml_new_graph_custom(self.context, n_calls + 8, False)
            for i in range(n_calls):
                k, v = pairs[i % n_copies]
                node = base.ggml_flash_attn_ext(self.context, q, k, v, mask, head_dim**-0.5, 0.0, 0.0)
                if i == 0 and not base.ggml_backend_supports_op(ggml.backend, node):
                    raise RuntimeError(f"{ggml.name} does not compute attention over type {type}")
                base.ggml_build_forward_expand(self.graph, node)
            self.buffer = base.ggml_backend_alloc_ctx_tensors(self.context, ggml.backend)
            if not self.buffer:
                raise RuntimeError(f"{ggml.name} has no memory for this")
            self._set(q, np.random.default_rng(0).standard_normal(head_dim * n_head * n_stream, dtype=np.float32))
            self._set(mask, np.zeros(n_kv, np.float16))
            for pair in stored:
                for tensor in pair:
                    self._set(tensor, blocks)
        except BaseException:
            self.close()
            raise

    def _set(self, tensor: Any, values: np.ndarray) -> None:
        """Fills a tensor with values, again and again."""
        size, data = self.base.ggml_nbytes(tensor), np.ascontiguousarray(values)
        for at in range(0, size, data.nbytes):
            self.base.ggml_backend_tensor_set(tensor, data.ctypes.data, at, min(data.nbytes, size - at))

    def seconds(self) -> float:
        """Computes the graph and waits for it. Launches are ggml's own, by CUDA graphs where it uses them."""
        start = time.perf_counter()
        if self.base.ggml_backend_graph_compute(self.ggml.backend, self.graph) != 0:
            raise RuntimeError(f"{self.ggml.name} failed")
        return time.perf_counter() - start

    def close(self) -> None:
        """Frees its memory."""
        if self.buffer:
            self.base.ggml_backend_buffer_free(self.buffer)
        if self.context:
            self.base.ggml_free(self.context)
        self.buffer = self.context = None
