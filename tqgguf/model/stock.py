"""The stock `llama_cpp.Llama` as tqgguf loads it, and what its cache needs: reading, taking back, and saved states.

All of llama_cpp's private names that tqgguf uses are used here and in turns.py (tests/integration/test_stock.py).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, Final

from jinja2 import TemplateError

from .._native import import_llama_cpp
from .._native.rpc import local_gpus
from .._native.settings import tail_in_states
from .._native.threads import kept_threads
from ..cache.tail import tail_batch
from ..cache.tensors import CacheTensor, check_tensors
from ..errors import (
    ArgumentError,
    CacheTypeError,
    ModelFileError,
    StateFileError,
    StoppedError,
    TqggufError,
    UnsupportedError,
    WorkerError,
)
from .context import cache_of, load_error, making
from .control import Control
from .options import Request
from .turns import ModelTurns
from .workers import Workers

llama_cpp: Any = import_llama_cpp()
_Stock: Any = llama_cpp.Llama

_OTHER: Final = (
    "the state is of another {}; the model is as it was. A prefix cache (set_cache) belongs to one model with one cache"
)
_WORDS: Final = {
    "model_hash": "model",
    "model_identity": "model, of the same shape",
    "types_k": "cache type of K",
    "types_v": "cache type of V",
    "k_means": "calibration of keys",
    "lora_identity": "adapter",
}
"""What names of `tqgguf.session.file.belongs_to` are called in messages."""


class GuardedLlama(_Stock):  # type: ignore[misc]
    """A `llama_cpp.Llama` as tqgguf loads it; `Llama` says what it is given.

    Attributes:
        n_tokens_read: tokens computed since the model was first loaded, of prompts and answers.
    """

    _control: Control
    _request: Request
    _tensors: list[CacheTensor]
    _turns: ModelTurns
    _turns_type = ModelTurns
    _workers: Workers | None = None

    # ---- Loading ----

    def _open(self, request: Request, workers: Workers | None, *, verbose: bool) -> None:
        """Loads a model by the stock constructor, and compares the cache that llama.cpp made with the request."""
        self._request, self._workers, self._tensors = request, workers, []
        options: dict[str, Any] = {}
        if self._control.progress is not None:
            options["progress_callback"] = self._control.on_load
        if workers is not None:
            options["devices"] = ctypes.addressof(workers.devices)
        with making(request.policy, request.tail, verbose=verbose) as made:
            try:
                super().__init__(str(request.info.path), model_options=options, **request.options)
            except (ValueError, RuntimeError) as error:
                if workers is not None:
                    workers.release()
                if self._control.failure is not None:
                    raise self._control.failure from None
                self._refuse_lost()
                raise load_error(str(error), made.log, request.info) from error
            except TemplateError as error:  # read last, when all else is loaded
                self.close()
                raise ModelFileError(
                    f"{request.info.path} has a chat template that Jinja cannot read: {error}"
                ) from error
        self._turns.workers, self._turns.context = workers, self.ctx
        self._stack.enter_context(kept_threads(self.ctx, self.n_threads, self.n_threads_batch))
        llama_cpp.llama_set_abort_callback(self.ctx, self._control.on_step, ctypes.addressof(self._control.flag))
        if request.vocab_only:
            return
        try:
            self._refuse_lost()
            shape = cache_of(self.ctx, self.context_params, request.tail)
            check_tensors(made.tensors, request.info, request.policy, shape)
        except (CacheTypeError, WorkerError):
            self.close()
            raise
        self._tensors = made.tensors

    def close(self) -> None:
        """Frees weights and cache, when no other thread uses them. A second call does nothing."""
        super().close()
        if self._workers is not None:
            self._workers.release()

    def _refuse_stopped(self) -> None:
        if self._control.stopped:
            raise StoppedError("the computation was stopped")

    def _refuse_lost(self) -> None:
        if message := self.lost:
            raise WorkerError(message)

    @property
    def lost(self) -> str:
        """Which of its workers the model has lost, and what to do; "" if none, and where there are no workers."""
        return self._workers.lost() if self._workers else ""

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """For calls of llama_cpp's low-level functions: other threads' calls wait, and a lost worker is an error.

        llama.cpp itself lets two threads compute with one context, and returns zeros without an error if a worker is
        lost. The methods of this class need no such care.

        Raises:
            WorkerError: a worker is lost, before or in the end; nothing that was computed is of any use.
            CacheClosedError: the model was closed.
        """
        with self._turns.taken("watched", changes=True):
            yield

    # ---- States ----

    def save_state(self) -> Any:
        """As the stock method, which the prefix caches call, with the precise tail."""
        with self._turns.taken("save_state"), tail_in_states():
            state = super().save_state()
            if not state.llama_state_size:
                raise TqggufError("llama.cpp could not write its state")
            state.owner, state.tail = self._state_owner(), True
            return state

    def _state_owner(self) -> dict[str, Any]:
        """What a state must have in common with the model that takes it up."""
        return {}

    def load_state(self, state: Any) -> None:
        """As the stock method, but a state of a context of another length is taken if its tokens fit.

        Args:
            state: what `save_state` gave.

        Raises:
            StateFileError: it holds more tokens than the context, or is of another model, cache or setting
                (docs/reliability.md); the model is as it was. Or it is damaged; then the model is empty.
            WorkerError: a worker is lost.
        """
        with self._turns.taken("load_state", changes=True):
            if not isinstance(state, llama_cpp.LlamaState):
                raise ArgumentError(f"state is of type {type(state).__name__}, must be what save_state gave")
            n = state.n_tokens
            if not 0 <= n <= min(len(self.input_ids), len(state.input_ids)):
                raise StateFileError(f"the state holds {n:,} tokens, the context has room for {len(self.input_ids):,}")
            self._refuse_other(getattr(state, "owner", None))
            with tail_in_states(getattr(state, "tail", False)):
                data = (ctypes.c_uint8 * len(state.llama_state)).from_buffer_copy(state.llama_state)
                if llama_cpp.llama_state_set_data(self.ctx, data, len(data)) != len(data):
                    self.reset()
                    raise StateFileError("llama.cpp refused a saved state (the model is empty now): it is damaged")
            if self._logits_all:
                self.scores[:n], self.scores[n:] = state.scores[:n], 0
            self.input_ids[:n] = state.input_ids[:n]
            self.n_tokens = n
            self._requires_eval = True  # the logits of its last token are not in it
            self._seed = state.seed

    def _refuse_other(self, owner: dict[str, Any] | None) -> None:
        """Raises StateFileError unless a state's owner is what this model is."""
        mine = self._state_owner()
        if owner is None:
            raise StateFileError("the state does not say what it is of: llama-cpp-python alone saved it")
        for name in [each for each in mine if each != "settings"]:  # the model first
            if owner.get(name) != mine.get(name):
                raise StateFileError(_OTHER.format(_WORDS.get(name, name)))
        for name in sorted({*mine["settings"], *owner["settings"]}):
            then, now = (each["settings"].get(name) for each in (owner, mine))
            if then != now:
                was = "" if name.endswith("identity") else f" ({then!r:.80}, here {now!r:.80})"
                raise StateFileError(_OTHER.format(_WORDS.get(name, name) + was))

    # ---- Computing ----

    def eval(self, tokens: Sequence[int]) -> None:
        """Reads tokens behind those in the cache, in batches; reports progress between them.

        Where tokens were taken back that a recurrent state or a window cannot give back, all are read again first.

        Raises:
            ArgumentError: a number is no token of the model, or there are more tokens than the context has room for.
            StoppedError: `stop` was called.
            UnsupportedError: they cannot be read again, because there may be pictures among them.
            CacheClosedError: the model was closed.
        """
        with self._turns.taken("eval", changes=True):
            self._refuse_stopped()
            if not self._take_back():
                before = self.input_ids[: self.n_tokens].tolist()
                if hasattr(self.chat_handler, "_mtmd_cpp"):
                    raise UnsupportedError("the cache no longer holds this prompt's beginning: load with swa_full=True")
                self.reset()
                self.eval(before)
            progress = self._control.progress
            step = min(self.context_params.n_ubatch, self.n_batch) if progress else self.n_batch
            if len(tokens) > 1 and self.context_params.offload_kqv and self.model_params.n_gpu_layers and local_gpus():
                step = tail_batch(self._request.tail_used, step)
            for start in range(0, len(tokens), step):
                self._refuse_stopped()
                try:
                    super().eval(tokens[start : start + step])
                except RuntimeError:
                    self._refuse_stopped()
                    raise
                self.n_tokens_read += len(tokens[start : start + step])
                if progress and len(tokens) > step:
                    with self._turns.lent("progress"):
                        progress("reading the prompt", min(start + step, len(tokens)), len(tokens))

    def _take_back(self) -> bool:
        """Removes what lies behind the last token; whether the cache still holds what the next one attends to.

        llama-cpp-python takes tokens back (a prompt that shares a beginning with the last one, drafts that were wrong)
        and reads on without asking. The cache does not hold it where a state cannot be taken back (recurrent layers),
        nor where the cache of a sliding window, of the size of the window (`swa_full=False`), has given its old cells
        away: llama.cpp then attends to what is left.
        """
        memory = llama_cpp.llama_get_memory(self.ctx)
        if not memory or self.n_tokens == 0:
            return True
        if not llama_cpp.llama_memory_seq_rm(memory, 0, self.n_tokens, -1):
            return False
        window = int(llama_cpp.llama_model_n_swa(self.model))
        # Of a hybrid's state nothing is taken back without saying so.
        if not window or llama_cpp.llama_model_is_hybrid(self.model):
            return True
        first = int(llama_cpp.llama_memory_seq_pos_min(memory, 0))  # of a window's cache; -1: nothing of it is left
        return 0 <= first <= max(0, int(self.n_tokens) - window + 1)
