"""The stock `llama_cpp.Llama` with guards: errors where it or llama.cpp would end the process or answer wrongly.

All of llama_cpp's private names that tqgguf uses are used here (tests/integration/test_stock.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import numpy as np
from jinja2 import TemplateError

from .._native import import_llama_cpp
from .._native.rpc import local_gpus
from .._native.settings import tail_in_states
from .._native.threads import kept_threads
from ..cache.tail import tail_batch
from ..cache.tensors import CacheTensor, check_tensors
from ..errors import (
    ArgumentError,
    CacheClosedError,
    CacheTypeError,
    ModelFileError,
    OutOfMemoryError,
    StateFileError,
    StoppedError,
    TqggufError,
    UnsupportedError,
    WorkerError,
)
from .context import cache_of, load_error, making
from .control import Control
from .grammar import MAX_REPEATS, check_grammar, check_schemas
from .options import Request
from .workers import Workers

llama_cpp: Any = import_llama_cpp()
T = TypeVar("T")
_Stock: Any = llama_cpp.Llama
_Sampler: Any = llama_cpp._internals.LlamaSampler


class GuardedLlama(_Stock):  # type: ignore[misc]
    """A `llama_cpp.Llama` with guards; `Llama` says what it is given, and loads it.

    Attributes:
        n_tokens_read: tokens computed since the model was first loaded, of prompts and answers.
    """

    _control: Control
    _request: Request
    _tensors: list[CacheTensor]

    def __init__(self) -> None:
        # The stock destructor closes this stack, also when nothing was loaded.
        self._stack = contextlib.ExitStack()
        self._workers: Workers | None = None
        self._closed = False
        self._name = ""
        self._n_last = 1  # tokens computed last, whose logits llama.cpp has
        self.n_tokens_read = 0

    # ---- Loading ----

    def _open(self, request: Request, workers: Workers | None, *, verbose: bool) -> None:
        """Loads a model by the stock constructor, and compares the cache that llama.cpp made with the request."""
        self._request, self._workers, self._closed, self._tensors = request, workers, False, []
        self._name = request.info.path.name
        with making(request.policy, request.tail, verbose=verbose) as made:
            try:
                super().__init__(str(request.info.path), **request.options)
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
        # llama.cpp rounds a context up to 256 cells. The stock class fills them all, but made room for fewer tokens.
        n_ctx = self.n_ctx()
        if n_ctx > len(self.input_ids):  # type: ignore[has-type]
            self.input_ids = np.zeros(n_ctx, np.intc)
            if self._logits_all:
                self.scores = np.zeros((n_ctx, self._n_vocab), np.float32)
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

    @property
    def model_params(self) -> Any:
        """llama.cpp's parameters of the model; the stock constructor makes and fills them."""
        return self._model_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        if self._control.progress is not None:
            params.progress_callback = self._control.on_load
        if self._workers is not None:
            params.devices = ctypes.addressof(self._workers.devices)
        self._model_params = params

    def reset(self) -> None:
        """Forgets all tokens, and empties the KV cache at once (the stock method leaves that to the next prompt).

        Raises:
            CacheClosedError: the model was closed.
        """
        self._refuse_closed()
        super().reset()
        memory = llama_cpp.llama_get_memory(self.ctx)
        if memory:
            llama_cpp.llama_memory_clear(memory, False)

    def close(self) -> None:
        """Frees weights and cache. A second call does nothing."""
        self._closed = True
        super().close()
        self._model = self._ctx = self.tokenizer_ = _Closed(self._name)
        if self._workers is not None:
            self._workers.release()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise CacheClosedError(f"the model {self._name} was closed")

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
        """For calls of llama_cpp's low-level functions: raises WorkerError if a worker is lost, before or in the end.

        llama.cpp itself returns zeros then, and no error. The methods of this class need no such care.

        Raises:
            WorkerError: a worker is lost; nothing that was computed is of any use.
            CacheClosedError: the model was closed.
        """
        self._refuse_lost()
        self._refuse_closed()
        try:
            yield
        finally:
            if self._workers is not None:
                llama_cpp.llama_synchronize(self.ctx)
            self._refuse_lost()

    # ---- States ----

    def save_state(self) -> Any:
        """As the stock method, which the prefix caches call, but without a matrix of logits that nothing has written.

        With a vocabulary of 128,000 that matrix takes 262 MB, many times what the compressed cache does.
        """
        with self.watched(), tail_in_states():
            if self._logits_all:
                whole = super().save_state()
                whole.calibration, whole.tail = self._calibration_digest(), True
                return whole
            size = llama_cpp.llama_state_get_size(self.ctx)
            state = (ctypes.c_uint8 * size)()
            if llama_cpp.llama_state_get_data(self.ctx, state, size) != size:
                raise TqggufError("llama.cpp could not write its state")
        kept = llama_cpp.LlamaState(
            input_ids=self.input_ids.copy(),
            scores=np.zeros((1, self.n_vocab()), np.float32),  # load_state spreads it over all rows
            n_tokens=self.n_tokens,
            llama_state=bytes(state),
            llama_state_size=size,
            seed=self._seed,
        )
        kept.calibration, kept.tail = self._calibration_digest(), True
        return kept

    def _calibration_digest(self) -> str:
        """What a state must have in common with the model beside what llama.cpp knows: how its keys are calibrated."""
        return ""

    def load_state(self, state: Any) -> None:
        """As the stock method, but a state of a context of another length is taken if its tokens fit.

        After a state that is refused the model is empty; the stock class counts tokens that are not there, and answers
        without them.

        Args:
            state: what `save_state` gave.

        Raises:
            StateFileError: it holds more tokens than the context, or is of another model or cache type.
            WorkerError: a worker is lost.
        """
        n = state.n_tokens
        if not 0 <= n <= min(len(self.input_ids), len(state.input_ids)):
            raise StateFileError(f"the state holds {n:,} tokens, the context has room for {len(self.input_ids):,}")
        if getattr(state, "calibration", "") != self._calibration_digest():
            raise StateFileError(
                "the state is of a cache whose keys are calibrated otherwise; the model is as it was. "
                "Prefix caches (set_cache) cannot be shared between calibrations"
            )
        with self.watched(), tail_in_states(getattr(state, "tail", False)):
            data = (ctypes.c_uint8 * len(state.llama_state)).from_buffer_copy(state.llama_state)
            if llama_cpp.llama_state_set_data(self.ctx, data, len(data)) != len(data):
                self.reset()
                raise StateFileError(
                    "llama.cpp refused a saved state (the model is empty now): it is of another model or cache type, "
                    "or damaged. Prefix caches (set_cache) cannot be shared between cache types"
                )
        if self._logits_all:
            self.scores[:n], self.scores[n:] = state.scores[:n], 0
        self.input_ids[:n] = state.input_ids[:n]
        self.n_tokens = n
        self._requires_eval = True  # the logits of its last token are not in it
        self._seed = state.seed

    # ---- Computing ----

    def eval(self, tokens: Sequence[int]) -> None:
        """Reads tokens behind those in the cache, in batches; reports progress between them.

        Where tokens were taken back that a recurrent state or a window cannot give back, all are read again first.

        Raises:
            StoppedError: `stop` was called.
            UnsupportedError: they cannot be read again, because there may be pictures among them.
            CacheClosedError: the model was closed.
        """
        self._refuse_closed()
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
                with self.watched():
                    super().eval(tokens[start : start + step])
            except RuntimeError:
                self._refuse_stopped()
                raise
            self._n_last = len(tokens[start : start + step])
            self.n_tokens_read += self._n_last
            if progress and len(tokens) > step:
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

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """As the stock method, but a long word does not end the process.

        Args:
            text: in UTF-8.
            add_bos: whether the token of the beginning comes first, if the model has it so.
            special: whether names of control tokens are these tokens.

        Raises:
            ArgumentError: the text has a word, or white space, of more than 1 MiB.
            OutOfMemoryError: no room for the stack that a long word takes.
        """
        by_words = self._model.vocab_type() == llama_cpp.LLAMA_VOCAB_TYPE_BPE and isinstance(text, bytes)
        stretch = max((len(match[0]) for match in _STRETCH.finditer(text)), default=0) if by_words else 0
        stock = super().tokenize
        if stretch:
            return _on_large_stack(lambda: stock(text, add_bos, special), stretch)
        tokens: list[int] = stock(text, add_bos, special)
        return tokens

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        """As the stock method, but a number that is no token is an error, where llama.cpp ends the process.

        Args:
            tokens: of the text that is wanted.
            prev_tokens: those before, which decide whether it begins with a space.
            special: whether control tokens are written out.

        Raises:
            ArgumentError: a number is no token of the model.
        """
        if len(tokens) and not 0 <= min(tokens) <= max(tokens) < self.n_vocab():
            wrong = next(token for token in tokens if not 0 <= token < self.n_vocab())
            raise ArgumentError(f"{wrong} is no token of this model, whose tokens are 0 to {self.n_vocab() - 1:,}")
        text: bytes = super().detokenize(tokens, prev_tokens, special)
        return text

    def create_chat_completion(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock method, but a JSON schema that cannot be read is an error, where that takes any JSON.

        Args:
            *args: as there.
            **kwargs: as there.

        Raises:
            ArgumentError: no grammar can be made of the schema of `response_format`, or of the function that
                `tool_choice` names.
        """
        check_schemas(kwargs)
        return super().create_chat_completion(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """As the stock method, but an answer that another one has interrupted does not go on in that one's cache.

        Args:
            *args: as there.
            **kwargs: as there.

        Raises:
            ArgumentError: a later answer of this model has begun since.
        """
        mine = self._answering = object()
        tokens = super().generate(*args, **kwargs)
        given = None
        with contextlib.closing(tokens), contextlib.suppress(StopIteration):
            while True:
                given = yield tokens.send(given)
                if self._answering is not mine:
                    raise ArgumentError(
                        "this answer cannot go on: another one of the same model has begun, and a model has one cache. "
                        "Read one to its end before the next, or load the model twice"
                    )

    def _init_sampler(self, *args: Any, grammar: Any = None, **kwargs: Any) -> Any:
        if grammar is None:
            return super()._init_sampler(*args, **kwargs)
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        check_grammar(vocabulary, str(grammar._grammar), str(grammar._root))
        sampler = super()._init_sampler(*args, grammar=grammar, **kwargs)
        sampler.__class__ = _GrammarSampler
        return sampler

    def sample(self, *args: Any, idx: int | None = None, **kwargs: Any) -> int:
        """As the stock method.

        Args:
            *args: as there.
            idx: the token of the last batch after which to sample; None for the last one.
            **kwargs: as there.

        Raises:
            ArgumentError: the draft model drafted more tokens than a batch takes; llama.cpp would end the process.
        """
        if idx is not None and idx < self.n_tokens - self._n_last:
            raise ArgumentError(
                f"the draft model drafts more than the {self.n_batch - 1} tokens that fit in a batch beside the last "
                f"one: let it draft fewer, or give a larger n_batch"
            )
        token: int = super().sample(*args, idx=idx, **kwargs)
        return token

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock method.

        Args:
            *args: as there.
            **kwargs: as there.

        Raises:
            WorkerError: a worker is lost.
        """
        with self.watched():
            return super().embed(*args, **kwargs)


class _Closed:
    """In the place of what has been freed, which the stock class would use all the same, and end the process."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, _name: str) -> Any:
        raise CacheClosedError(f"the model {self._name} was closed")


class _GrammarSampler(_Sampler):  # type: ignore[misc]
    """A chain of samplers with a grammar in it, which looks at the token chosen before the grammar is told of it."""

    def sample(self, ctx: Any, idx: int = -1) -> int:
        """A token for the logits of the token idx of the last batch.

        Raises:
            ArgumentError: no token is both allowed by the grammar and possible otherwise.
        """
        n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(ctx.ctx)))
        candidates = np.zeros(n_vocab, [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        candidates["id"] = np.arange(n_vocab)
        candidates["logit"] = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(ctx.ctx, idx), (n_vocab,))
        data = candidates.ctypes.data_as(llama_cpp.llama_token_data_p)
        array = llama_cpp.llama_token_data_array(data=data, size=n_vocab, selected=-1, sorted=False)
        llama_cpp.llama_sampler_apply(self.sampler, ctypes.byref(array))
        chosen = array.data[array.selected]
        if not chosen.logit > -np.inf:  # a grammar forbids by -inf; NaN comes of that at an infinite temperature
            raise ArgumentError(
                "the grammar allows no token here that logit_bias, min_tokens or another option does not forbid: "
                "leave these out, or let the grammar go on"
            )
        token = int(chosen.id)
        self.accept(token)
        return token


def _bounded(item: str, least: int, most: int | None, *args: Any, **kwargs: Any) -> str:
    """In the place of llama_cpp's function of the same arguments."""
    if max(least, most or 0) > MAX_REPEATS:
        raise ArgumentError(f"it repeats a part {max(least, most or 0):,} times, at most {MAX_REPEATS:,} are read")
    text: str = _repetition(item, least, most, *args, **kwargs)
    return text


_repetition: Any = llama_cpp.llama_grammar._build_repetition
llama_cpp.llama_grammar._build_repetition = _bounded


# ---- Long words ----

# The tokenizers of many models (those of gpt-oss, DeepSeek, Mistral Nemo) cut texts by regular expressions, for which
# llama.cpp takes std::regex; that calls itself for every character of a match, with 321 bytes of stack each time (GCC
# 12). 26,000 spaces, dashes or letters in a row, as padding or a sequence of DNA has, overran the 8 MiB of a thread and
# ended the process.
_LONGEST: Final = 1 << 20
"""Bytes of a stretch that are taken; the stack for it is address space, of which what is used takes memory."""

_SAFE: Final = 2048
_STACK_PER_BYTE: Final = 640
_STACK: Final = 8 << 20
_STRETCH: Final = re.compile(rb"\S{%d,}|\s{%d,}" % (_SAFE, _SAFE))
"""A stretch without white space, or of white space alone, that needs a large stack."""
_lock = threading.Lock()


def _on_large_stack(call: Callable[[], T], stretch: int) -> T:
    """What `call` returns or raises, from a thread whose stack suffices for a stretch of so many bytes.

    Raises:
        ArgumentError: the stretch is longer than `_LONGEST`.
        OutOfMemoryError: the system has no room for such a stack.
    """
    if stretch > _LONGEST:
        raise ArgumentError(
            f"the text has a word, or white space, of {stretch:,} bytes, at most {_LONGEST:,} are read: is it a text?"
        )
    with ThreadPoolExecutor(1, "tqgguf-large-stack") as pool:
        with _lock:  # the size is one for all threads that are started
            before = threading.stack_size(_STACK + _STACK_PER_BYTE * stretch & ~4095)
            try:
                result = pool.submit(call)
            except RuntimeError:
                raise OutOfMemoryError(f"no room for a stack that suffices for a word of {stretch:,} bytes") from None
            finally:
                threading.stack_size(before)
        return result.result()
