"""`Llama`: a `llama_cpp.Llama` whose KV cache type is given by name, checked before loading and verified after."""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import inspect
import os
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from jinja2 import TemplateError

from .._native import import_llama_cpp
from .._native.threads import kept_threads
from ..cache.info import CacheInfo, LayerCacheInfo
from ..cache.policy import CachePolicy, PolicySpec, applied, model_hash, resolve
from ..cache.tail import DEFAULT_TAIL, check_tail, kept, tail_batch, tail_bytes, warn_unread
from ..config import CACHE_TYPES, parse_cache
from ..errors import (
    ArgumentError,
    CacheClosedError,
    CacheTypeError,
    ModelFileError,
    ModelNotFoundError,
    OutOfMemoryError,
    StateFileError,
    StoppedError,
    TqggufError,
    UnsupportedError,
    WorkerError,
)
from ..gguf.info import ModelInfo, read_model_info
from ..memory import machine_memory
from ..session.file import Session, restore, save
from .control import Control, Progress
from .grammar import GrammarSampler, check_grammar, check_schemas
from .large_stack import longest_stretch, on_large_stack
from .load_log import (
    KVBuffer,
    base_types,
    buffer_of,
    cache_words,
    captured_log,
    devices,
    load_error,
    load_lock,
    needs_flash,
    rotation,
    told_aborts,
    verify_buffers,
)
from .prefix import take_back
from .workers import Workers, check_split

__all__ = ["CacheInfo", "LayerCacheInfo", "Llama", "refuse_impossible"]

llama_cpp: Any = import_llama_cpp()
_Stock: Any = llama_cpp.Llama

_STOCK_OPTIONS: Final = frozenset(inspect.signature(_Stock.__init__).parameters) - {"self", "model_path", "kwargs"}
_LIMITS: Final = {
    "n_ctx": (0, 2**31 - 1),
    "n_batch": (1, 2**31 - 1),
    "n_ubatch": (1, 2**31 - 1),
    "n_threads": (1, 512),
    "n_threads_batch": (1, 512),
    "seed": (0, 2**32 - 1),
}
"""Beyond these llama.cpp ends the process, or takes the number modulo 2^32."""


class Llama(_Stock):  # type: ignore[misc]
    """A `llama_cpp.Llama` with a compressed KV cache.

    Everything the stock class does works unchanged. Before loading, the GGUF header is read and the cache type is
    checked against the model's head sizes; after loading, the types, cells and bytes that llama.cpp reports for its KV
    buffers are compared with what was asked for, so a cache type is never silently ignored.

    Args:
        model_path: a GGUF file.
        cache: type of the KV cache: "pqo3", "pqo4", "pqt3", "pqt4", or a stock type ("f16", "q8_0", ...); a pair for K
            and V apart; or types by layer: `{"default": "pqo3", "layers": {"0-1": "q8_0", "-2:": "pqo4"}}`, a
            `CachePolicy`, or the path of a policy file. A policy measured on another model gives a warning.
        tail: how many of the newest tokens are kept in f16 as well, and read from there, where a type is ours (and with
            them those in the first four cells); 0 turns it off. Saved states do not hold them. `eval` reads a prompt in
            batches of as many tokens: in longer ones most tokens would not find their neighbours in the tail.
        flash_attn: None switches it on where the types need it. A quantized V, and every type of tqgguf, needs it.
        rpc: workers (`tqgguf worker`), each "host:port", that hold the model's layers and their cache in its place; the
            first layers go to the first. For networks that are trusted only: nothing is encrypted, nobody is asked for
            a password. All layers lie on workers unless `n_gpu_layers` says how many; `tensor_split` says in which
            proportions, otherwise their free memory does. `offload_kqv=False` keeps the cache here.
        progress: called as progress(title, done, total) while the model is loaded, from 0 to 100, and while a prompt of
            more than one batch is read, in tokens. What it raises ends that, and is raised.
        **kwargs: as for `llama_cpp.Llama`, except `type_k` and `type_v`, which `cache` replaces.

    Attributes:
        n_tokens_read: tokens computed since the model was first loaded, of prompts and answers.

    Raises:
        ArgumentError: unknown cache type (the message lists the valid ones), `type_k` or `type_v` given,
            `flash_attn=False` with types that need it, an option that the stock class does not have, or a number
            that llama.cpp cannot take; more workers than layers.
        WorkerError: a worker that cannot be reached, is of another version, lacks the types, or went away.
        ModelNotFoundError: no such file, or no such file as `lora_path` names.
        ModelFileError: not GGUF, truncated, or without the keys its architecture requires.
        CacheTypeError: a head size is no multiple of the type's block (the message names layer and value), or llama.cpp
            did not use the types it was given.
        OutOfMemoryError: no memory for the KV buffers.
        LibraryError: the native libraries are missing or not those of this package.
        TqggufError: llama.cpp could not load the model; the message carries its own errors.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        cache: PolicySpec = "pqo3",
        tail: int = DEFAULT_TAIL,
        flash_attn: bool | None = None,
        rpc: Sequence[str] | None = None,
        progress: Progress | None = None,
        **kwargs: Any,
    ) -> None:
        self._arguments: dict[str, Any] = {**kwargs, "model_path": model_path, "cache": cache, "tail": tail}
        self._arguments |= {"flash_attn": flash_attn, "rpc": rpc, "progress": progress}
        self._workers: Workers | None = None
        self._control = Control(progress)
        self.n_tokens_read = 0
        self._n_last = 1  # tokens computed last, whose logits llama.cpp has
        # The stock destructor closes this stack, also when a check below has raised before the stock constructor ran.
        self._stack = contextlib.ExitStack()
        self._closed = False
        for name in ("type_k", "type_v"):
            if kwargs.get(name) is not None:
                raise ArgumentError(f"{name} is set by cache: give cache=(K type, V type) by name instead")
            kwargs.pop(name, None)
        if not isinstance(model_path, (str, os.PathLike)):
            raise ArgumentError(f"model_path must be a path, not {model_path!r}")
        _check_options(kwargs)
        self._tail = check_tail(tail)
        if isinstance(cache, (str, tuple, list)) and not str(cache).endswith(".gguf"):
            parse_cache(cache)  # a wrong name is told before the file is opened
        self._info = read_model_info(model_path)
        self._policy = policy = resolve(cache, self._info.n_layer)
        with_flash = needs_flash(policy)
        if flash_attn is False and with_flash:
            raise ArgumentError(
                f"flash_attn=False cannot be combined with {cache_words(policy)}: "
                f"a quantized V, and every type of tqgguf, needs flash attention"
            )
        if not kwargs.get("vocab_only"):
            refuse_impossible(self._info, policy)
            if rpc is None:
                _refuse_too_long(self._info, policy, kwargs)
        warn_unread(self._tail if policy.ours else 0, self._info.architecture)
        if rpc is not None:
            check_split(rpc, self._info, kwargs)
            if not kwargs.get("vocab_only"):
                here = kwargs.get("offload_kqv") is False  # then no worker sees a cache
                self._workers = Workers(rpc, policy.ours and not here)
        k, v = base_types(policy, self._info)
        told = told_aborts(kwargs.get("verbose", True))
        with load_lock, captured_log() as log, applied(policy), kept(self._tail), told:
            try:
                super().__init__(
                    str(model_path),
                    type_k=k.number,
                    type_v=v.number,
                    flash_attn=with_flash if flash_attn is None else flash_attn,
                    **kwargs,
                )
            except (ValueError, RuntimeError) as error:
                if self._workers is not None:
                    self._workers.release()
                if self._control.failure is not None:
                    raise self._control.failure from None
                self._refuse_lost()
                raise load_error(str(error), log, self._info) from error
            except TemplateError as error:  # read last, when all else is loaded
                self.close()
                raise ModelFileError(f"{model_path} has a chat template that is none: {error}") from error
        # llama.cpp rounds a context up to 256 cells. The stock class fills them all, but made room for fewer tokens.
        n_ctx = self.n_ctx()
        if n_ctx > len(self.input_ids):  # type: ignore[has-type]
            self.input_ids = np.zeros(n_ctx, np.intc)
            if self._logits_all:
                self.scores = np.zeros((n_ctx, self._n_vocab), np.float32)
        self._stack.enter_context(kept_threads(self.ctx, self.n_threads, self.n_threads_batch))
        llama_cpp.llama_set_abort_callback(self.ctx, self._control.on_step, ctypes.addressof(self._control.flag))
        self._buffers: list[KVBuffer] = []
        self._devices = devices(log)
        if not kwargs.get("vocab_only"):
            try:
                self._refuse_lost()
                self._buffers = verify_buffers(log, self._info, policy, self._tail)
            except (CacheTypeError, WorkerError):
                self.close()
                raise

    @property
    def model_info(self) -> ModelInfo:
        """What the GGUF file says about the model's KV cache."""
        return self._info

    @property
    def has_chat_template(self) -> bool:
        """Whether the model's file brings a chat template."""
        return "tokenizer.chat_template" in self.metadata

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

    @property
    def cache_policy(self) -> CachePolicy:
        """The type of every layer's K and V."""
        return self._policy

    def add_context(self, cache: PolicySpec, *, tail: int | None = None) -> Any:
        """Makes a further context that lives as long as the model; see `further_context`.

        Args:
            cache: as for `Llama`.
            tail: as for `Llama`; None for the model's own.

        Returns:
            A `llama_context` pointer for llama_cpp's low-level functions. It belongs to the model, which frees it in
            `close`.
        """
        return self._stack.enter_context(self.further_context(cache, tail=tail))

    @contextlib.contextmanager
    def further_context(
        self, cache: PolicySpec, *, tail: int | None = None, n_ubatch: int | None = None, rotate: bool = True
    ) -> Iterator[Any]:
        """A further context on the same weights, equal to the model's own but for its KV cache.

        Its cache is checked and verified as the model's own was. It is freed when the `with` statement ends, which must
        be before the model is closed.

        Args:
            cache: as for `Llama`.
            tail: as for `Llama`; None for the model's own.
            n_ubatch: tokens computed at once; None for the model's own.
            rotate: whether llama.cpp may rotate a cache of stock quantized types, as it does by itself. In a policy
                that also has types of ours it does not.

        Yields:
            A `llama_context` pointer for llama_cpp's low-level functions.

        Raises:
            ArgumentError: unknown cache type.
            CacheTypeError: the model cannot have this type, or llama.cpp did not use it.
            OutOfMemoryError: no memory for the KV buffers.
            TqggufError: llama.cpp could not make the context; the message carries its own errors.
        """
        policy = resolve(cache, self._info.n_layer)
        n_tail = self._tail if tail is None else check_tail(tail)
        refuse_impossible(self._info, policy)
        params = type(self.context_params).from_buffer_copy(self.context_params)
        params.type_k, params.type_v = (kind.number for kind in base_types(policy, self._info))
        if n_ubatch is not None:
            params.n_ubatch = min(params.n_batch, n_ubatch)
        if self._workers is not None and policy.ours and params.offload_kqv:
            self._workers.need_types()
        if needs_flash(policy):
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        quiet = not rotate  # llama.cpp warns, each time, of the rotation that we ourselves switch off
        with load_lock, captured_log(quiet) as log, applied(policy), kept(n_tail), rotation(rotate):
            context = llama_cpp.llama_init_from_model(self.model, params)
        if not context:
            raise load_error("no context", log, self._info)
        try:
            verify_buffers(log, self._info, policy, n_tail)
            yield context
        finally:
            llama_cpp.llama_free(context)

    def cache_info(self) -> CacheInfo:
        """Types, bytes and cells of the KV cache, per layer and in all.

        The number of cells and the types are those llama.cpp reported when it allocated the cache.

        Raises:
            CacheClosedError: the model was closed.
        """
        self._refuse_closed()
        f16 = CACHE_TYPES["f16"]
        used = self._cells_used()
        layers: list[LayerCacheInfo] = []
        for layer in self._info.layers:
            buffer = buffer_of(layer, self._info, self._buffers)
            if buffer is None:
                continue
            cells = buffer.cells * buffer.n_stream
            k, v = self._policy.types(layer.index)
            per_token = layer.bytes_per_token(k, v)
            tail = buffer.n_stream * tail_bytes(layer, k, v, self._tail, buffer.cells)
            layers.append(
                LayerCacheInfo(
                    layer=layer.index,
                    type_k=k.name,
                    type_v=v.name,
                    device=self._place(layer.index),
                    cells=cells,
                    cells_used=min(used, cells),
                    bytes_per_token=per_token,
                    tail_bytes=tail,
                    bytes=cells * per_token + tail,
                    f16_bytes=cells * layer.bytes_per_token(f16, f16),
                )
            )
        return CacheInfo(
            type_k=_shared_name([layer.type_k for layer in layers] or self._policy.types_k),
            type_v=_shared_name([layer.type_v for layer in layers] or self._policy.types_v),
            n_ctx=self.n_ctx(),
            cells_used=used,
            bytes_per_token=sum(layer.bytes_per_token for layer in layers),
            tail=self._tail if any(layer.tail_bytes for layer in layers) else 0,
            tail_bytes=sum(layer.tail_bytes for layer in layers),
            bytes=sum(layer.bytes for layer in layers),
            f16_bytes=sum(layer.f16_bytes for layer in layers),
            layers=tuple(layers),
            exact=self._info.exact,
        )

    # ---- Sessions ----

    def save_session(self, path: str | Path, extra: Mapping[str, Any] | None = None) -> Session:
        """Saves the tokens read so far and their cache, compressed as it is, so that nothing need be read again.

        The file is written whole or not at all: a failure, even the end of the process, leaves a session that was there
        as it is. It needs a copy of the used part of the cache in memory.

        Args:
            path: the file; one that exists must be a session. Its folder must be there.
            extra: something to keep beside it, such as the messages of a chat; what JSON can hold.

        Raises:
            ArgumentError: `path` cannot be written, or is something else; `extra` is nothing JSON can hold.
            OSError: it could not be written; no space left on the device, for example.
            OutOfMemoryError: no memory for the copy.
            CacheClosedError: the model was closed.
        """
        self._refuse_closed()
        return save(self, path, extra or {})

    def load_session(self, path: str | Path) -> Session:
        """Takes up a saved session in the place of what the model has read.

        The precise tail is not saved: restored tokens are read from their blocks alone, so that an answer may differ
        from the one an uninterrupted conversation would have had, as rounding differs.

        Args:
            path: a file that `save_session` wrote.

        Returns:
            What the file says, with the `extra` that was saved.

        Raises:
            FileNotFoundError: no such file.
            SessionError: no session, damaged, of another version, model or cache, or longer than the context. The model
                is as it was, unless the message says otherwise.
            OutOfMemoryError: no memory to read it into.
            CacheClosedError: the model was closed.
        """
        with self.watched():
            return restore(self, path)

    def save_state(self) -> Any:
        """As the stock method, which the prefix caches call, but without a matrix of logits that nothing has written.

        With a vocabulary of 128,000 that matrix takes 262 MB, many times what the compressed cache does.
        """
        with self.watched():
            if self._logits_all:
                return super().save_state()
            size = llama_cpp.llama_state_get_size(self.ctx)
            state = (ctypes.c_uint8 * size)()
            if llama_cpp.llama_state_get_data(self.ctx, state, size) != size:
                raise TqggufError("llama.cpp could not write its state")
        return llama_cpp.LlamaState(
            input_ids=self.input_ids.copy(),
            scores=np.zeros((1, self.n_vocab()), np.float32),  # load_state spreads it over all rows
            n_tokens=self.n_tokens,
            llama_state=bytes(state),
            llama_state_size=size,
            seed=self._seed,
        )

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
        with self.watched():
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

    def stop(self) -> None:
        """Ends what the model computes now, within one step of its graph, and whatever it is asked to compute after.

        That raises `StoppedError` until `resume` is called. May be called from another thread or a signal handler. The
        tokens read before stay in the cache.
        """
        self._control.stopped = True

    def resume(self) -> None:
        """Takes `stop` back."""
        self._control.stopped = False

    def eval(self, tokens: Sequence[int]) -> None:
        """Reads tokens behind those in the cache, in batches that suit the tail; reports progress between them.

        Where tokens were taken back that the cache cannot do without (see `prefix`), all are read again first.

        Raises:
            StoppedError: `stop` was called.
            UnsupportedError: they cannot be read again, because there may be pictures among them.
            CacheClosedError: the model was closed.
        """
        self._refuse_closed()
        self._refuse_stopped()
        if not take_back(self.ctx, self.n_tokens):
            before = self.input_ids[: self.n_tokens].tolist()
            if hasattr(self.chat_handler, "_mtmd_cpp"):
                raise UnsupportedError("the cache no longer holds this prompt's beginning: load with swa_full=True")
            self.reset()
            self.eval(before)
        progress = self._control.progress
        most = min(self.context_params.n_ubatch, self.n_batch) if progress else self.n_batch
        step = tail_batch(self._tail if self._policy.ours else 0, most)
        if self.draft_model is not None and self.n_tokens:
            step = most  # what is drafted is sampled from one batch
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

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """As the stock method, but a long word does not end the process (see `large_stack`).

        Args:
            text: in UTF-8.
            add_bos: whether the token of the beginning comes first, if the model has it so.
            special: whether names of control tokens are these tokens.

        Raises:
            ArgumentError: the text has a word, or white space, of more than 1 MiB.
            OutOfMemoryError: no room for the stack that a long word takes.
        """
        by_words = self._model.vocab_type() == llama_cpp.LLAMA_VOCAB_TYPE_BPE
        stretch = longest_stretch(text) if by_words and isinstance(text, bytes) else 0
        tokenize = super().tokenize
        tokens: list[int] = (
            on_large_stack(lambda: tokenize(text, add_bos, special), stretch)
            if stretch
            else tokenize(text, add_bos, special)
        )
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
        check_grammar(self, grammar)
        sampler = super()._init_sampler(*args, grammar=grammar, **kwargs)
        sampler.__class__ = GrammarSampler
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

    def _refuse_stopped(self) -> None:
        if self._control.stopped:
            raise StoppedError("the computation was stopped")

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        del state["type_k"], state["type_v"]
        same = self._policy.uniform
        state["tail"] = self._tail
        state["rpc"] = self._arguments["rpc"]
        state["cache"] = tuple(kind.name for kind in same) if same else self._policy
        return state

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
        self._model = self._ctx = self.tokenizer_ = _Closed(self._arguments["model_path"])
        if self._workers is not None:
            self._workers.release()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise CacheClosedError(f"the model {self._info.path.name} was closed")

    # ---- Workers ----

    @property
    def workers(self) -> tuple[str, ...]:
        """The workers the model lies on, "host:port" each; none if it lies here."""
        return self._workers.names if self._workers else ()

    @property
    def lost(self) -> str:
        """Which of its workers the model has lost, and what to do; "" if none, and where there are no workers."""
        return self._workers.lost() if self._workers else ""

    def reload(self) -> None:
        """Loads the model again, as it was first loaded: after `WorkerError`, when the worker is back.

        What was read is forgotten. Prefix caches (`set_cache`) are kept.

        Raises:
            WorkerError: a worker cannot be reached or used. The model is as it was.
            TqggufError: as when it was first loaded. The model is closed then; it can be tried again.
        """
        if self._workers is not None:
            self._workers.greet()
        workers, control, prefixes, n_read = self._workers, self._control, self.cache, self.n_tokens_read
        self.close()
        try:
            type(self).__init__(self, **self._arguments)
        except BaseException:
            self._closed, self._workers = True, workers  # what was lost still is
            raise
        self.set_cache(prefixes)
        self.n_tokens_read = n_read
        self._control.stopped |= control.stopped

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

    def _refuse_lost(self) -> None:
        if message := self.lost:
            raise WorkerError(message)

    def _place(self, layer: int) -> str:
        device = self._devices.get(layer, "CPU")
        return self._workers.place(device) if self._workers else device

    def _cells_used(self) -> int:
        memory = llama_cpp.llama_get_memory(self.ctx)
        return int(llama_cpp.llama_memory_seq_pos_max(memory, 0)) + 1 if memory else 0


class _Closed:
    """In the place of what has been freed, which the stock class would use all the same, and end the process."""

    def __init__(self, path: str | Path) -> None:
        self._path = path

    def __getattr__(self, _name: str) -> Any:
        raise CacheClosedError(f"the model {Path(self._path).name} was closed")


def _check_options(options: dict[str, Any]) -> None:
    """Raises ArgumentError for options that the stock class would swallow and numbers that llama.cpp cannot take."""
    for name, value in options.items():
        if name not in _STOCK_OPTIONS:
            near = difflib.get_close_matches(name, [*sorted(_STOCK_OPTIONS), "cache"], n=1)
            raise ArgumentError(f"Llama has no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if name in _LIMITS and value is not None:
            low, high = _LIMITS[name]
            if isinstance(value, bool) or not hasattr(value, "__index__") or not low <= value <= high:
                raise ArgumentError(f"{name} is {value!r}, must be an integer between {low} and {high}")
    lora = options.get("lora_path")
    if lora is not None and not Path(lora).is_file():
        raise ModelNotFoundError(f"lora_path {lora} does not exist or is no file")


def refuse_impossible(info: ModelInfo, policy: CachePolicy) -> None:
    """Raises CacheTypeError if the model cannot have such a cache; the message names layer and reason.

    Warns if the policy was measured on another model.
    """
    same = policy.uniform
    fits = policy.n_layer == info.n_layer
    obstacle = info.obstacle(*same) if same and fits and not policy.ranges else policy.obstacle(info)
    if obstacle:
        raise CacheTypeError(f"{info.path.name} cannot have {cache_words(policy)}: {obstacle}")
    if policy.model_hash and policy.model_hash != model_hash(info):
        warnings.warn(
            f"this cache policy was measured on another model than {info.path.name}: "
            f"its types and mean keys may not suit it",
            stacklevel=3,
        )


def _refuse_too_long(info: ModelInfo, policy: CachePolicy, options: Mapping[str, Any]) -> None:
    """Raises OutOfMemoryError for a context whose cache exceeds all memory, which llama.cpp would try to fill."""
    n_ctx = options.get("n_ctx", 512) or info.n_ctx_train
    have = machine_memory()
    if have is None or (options.get("n_gpu_layers") and options.get("offload_kqv", True)):
        return
    need = policy.bytes(info, n_ctx, 0, swa_full=options.get("swa_full") is not False)
    if need > have:
        raise OutOfMemoryError(
            f"the KV cache of {n_ctx:,} tokens of {info.path.name} takes {need:,} bytes, this machine has {have:,}: "
            f"take a shorter context (`tqgguf fit` says how long it can be)"
        )


def _shared_name(names: Sequence[str]) -> str:
    """The name that all layers share, or "mixed"."""
    return names[0] if len(set(names)) == 1 else "mixed"
