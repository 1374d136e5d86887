"""What llama.cpp would allocate for a model and a context, from llama.cpp itself, without allocating it.

llama.cpp can open a model without its weights (`llama_model_params.no_alloc`): it reads the header, makes every tensor
without memory, and plans contexts down to the compute buffers, whose size comes out of the very graphs that it would
run. The size of the KV cache is that of its tensors; the sizes of other buffers are in llama.cpp's log alone, in MiB
with two digits. That takes milliseconds, and is exact where a formula over layers and widths would have to follow every
architecture.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .._machine import machine_memory
from .._native import import_llama_cpp
from ..cache.policy import CachePolicy, refuse_impossible
from ..errors import OutOfMemoryError
from ..gguf.info import ModelInfo, read_model_info
from ..model.context import LoadLog, make_context, opened_model

llama_cpp: Any = import_llama_cpp()

N_BATCH: Final = 512
"""Tokens computed at once, as `llama_cpp.Llama` has it."""

CELL_BYTES: Final = 52
"""Of `llama_kv_cells` for a cell: position, place in a picture, shift, and a bit for each sequence."""

# llama.cpp prints a number with two digits behind the decimal point of the process's locale.
# sched_reserve:        CPU compute buffer size =     2.13 MiB
_COMPUTE: Final = re.compile(r"compute buffer size = +(\d+)\D(\d\d) MiB")
# llama_memory_recurrent: size =    0.03 MiB (     1 cells, ...
_STATE: Final = re.compile(r"llama_memory_recurrent: size = +(\d+)\D(\d\d) MiB")
_OUTPUT: Final = re.compile(r"output buffer size = +(\d+)\D(\d\d) MiB")


@dataclass(frozen=True)
class Setup:
    """How a context lays out its KV cache.

    Attributes:
        tail: newest tokens kept in f16, as for `Llama`.
        n_seq: sequences.
        unified: whether they share one cache, instead of a part for each.
        swa_full: whether layers with a sliding window keep all tokens nevertheless, as `Llama` has it by default.
    """

    tail: int | None = 0
    n_seq: int = 1
    unified: bool = False
    swa_full: bool = True

    def cache_bytes(self, info: ModelInfo, policy: CachePolicy, n_ctx: int) -> int:
        """Bytes of K and V, tails included, that a context of n_ctx tokens takes with a policy.

        Args:
            info: the model.
            policy: the type of every layer's K and V.
            n_ctx: tokens of all sequences together.
        """
        return policy.bytes(info, n_ctx, self.tail, n_seq=self.n_seq, unified=self.unified, swa_full=self.swa_full)


@dataclass(frozen=True)
class ContextPlan:
    """What one context would take beside the weights, in bytes.

    Attributes:
        cache: K and V of all layers and sequences, tails included.
        state: recurrent states, which have a fixed size.
        compute: the buffers that a graph of n_ubatch tokens needs, its inputs, masks and logits among them; and the
            logits handed out.
    """

    cache: int
    state: int
    compute: int

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.cache + self.state + self.compute


class PlannedModel:
    """A model opened without its weights.

    Attributes:
        info: what the GGUF says.
        weights: bytes of all weights, over all files of a split model.
    """

    def __init__(self, info: ModelInfo, model: Any) -> None:
        self.info = info
        self.weights = int(llama_cpp.llama_model_size(model))
        self._model = model

    def context(self, policy: CachePolicy, n_ctx: int, setup: Setup) -> ContextPlan:
        """What a context would take, with everything else set as `tqgguf.Llama` sets it.

        Args:
            policy: types of the KV cache.
            n_ctx: tokens of all sequences together, at least one for each.
            setup: how the cache is laid out.

        Raises:
            CacheTypeError: the model cannot have these types, or llama.cpp would make another cache than was asked for.
            OutOfMemoryError: the list of its cells alone exceeds this machine's memory.
            TqggufError: llama.cpp could not plan the context; the message carries its own errors.
        """
        refuse_impossible(self.info, policy)
        have = machine_memory()
        if self.info.layers and have is not None and CELL_BYTES * n_ctx > have:  # which it would try to fill
            raise self._too_long(n_ctx)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = n_ctx, setup.n_seq
        params.kv_unified, params.swa_full = setup.unified, setup.swa_full
        params.n_batch = min(n_ctx, N_BATCH)
        params.n_ubatch = params.n_batch
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # switched on where the policy needs it
        making = make_context(self._model, self.info, policy, params, tail=setup.tail, planned=True)
        try:
            with making as (_, made):
                cache = sum(tensor.bytes + tensor.tail_bytes for tensor in made.tensors)
        except OutOfMemoryError:
            raise self._too_long(n_ctx) from None
        return ContextPlan(cache, _mib(made.log, _STATE), _mib(made.log, _COMPUTE) + _mib(made.log, _OUTPUT))

    def _too_long(self, n_ctx: int) -> OutOfMemoryError:
        return OutOfMemoryError(
            f"no memory to plan a context of {n_ctx:,} tokens of {self.info.path.name}: llama.cpp lists "
            f"its cells, {CELL_BYTES} bytes each, even where it allocates none; look at a shorter one"
        )


@contextlib.contextmanager
def planned_model(path: str | Path) -> Iterator[PlannedModel]:
    """Opens a model without its weights; it is closed when the `with` statement ends.

    Raises:
        ModelFileError: see `read_model_info`.
        TqggufError: llama.cpp cannot load the model; the message carries its own errors.
    """
    info = read_model_info(path)
    params = llama_cpp.llama_model_default_params()
    params.no_alloc, params.load_mode = True, llama_cpp.LLAMA_LOAD_MODE_NONE
    params.n_gpu_layers = 0
    with opened_model(info, params) as model:
        yield PlannedModel(info, model)


def _mib(log: LoadLog, pattern: re.Pattern[str]) -> int:
    return round(sum(int(m[1]) + int(m[2]) / 100 for _, text in log if (m := pattern.search(text))) * 2**20)
