"""`Llama`: a `llama_cpp.Llama` whose KV cache type is given by name, checked before loading and compared after."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._native import import_llama_cpp
from ..cache.calibration import Calibration
from ..cache.info import CacheInfo, cache_info
from ..cache.policy import CachePolicy, PolicySpec, needs_tqgguf, refuse_idle_tail, refuse_impossible, resolve
from ..cache.tail import check_tail
from ..errors import SessionError
from ..gguf.info import ModelInfo
from ..session.file import Owner, Session, belongs_to, check_target, load, put, save
from .context import make_context
from .control import Control, Progress
from .options import cache_settings, checked_request
from .stock import GuardedLlama
from .workers import Workers

llama_cpp: Any = import_llama_cpp()


class Llama(GuardedLlama):
    """A `llama_cpp.Llama` with a compressed KV cache.

    Everything the stock class does works unchanged. Before loading, the GGUF header is read and the cache type is
    checked against the model's head sizes; after loading, every tensor of llama.cpp's KV cache (its type, bytes, cells,
    tail and mean) is compared with what was asked for, so a cache type is never silently ignored.

    Args:
        model_path: a GGUF file.
        cache: type of the KV cache: "pqo3", "pqo4", "pqt2" to "pqt5", or a stock type ("f16", "q8_0", ...); a pair for
            K and V apart; or types by layer: `{"default": "pqo3", "layers": {"0-1": "q8_0", "-2:": "pqo4"}}`, a
            `CachePolicy`, or the path of a policy file. A policy measured on another model gives a warning.
        tail: how many of the newest tokens are kept in f16 as well, and read from there, where a type is quantized (and
            with them those in the first four cells); 0 turns it off. None means 128 for types of tqgguf and 0 for stock
            types, whose tail is for the CPU alone. Sessions and `save_state` hold them. With a cache on CUDA `eval`
            reads a prompt in batches of as many tokens: in longer ones most would not find their neighbours in the
            tail.
        flash_attn: None switches it on where the cache needs it. A quantized V, every type of tqgguf, and every tail
            needs it.
        rpc: workers (`tqgguf worker`), each "host:port", that hold the model's layers and their cache in its place; the
            first layers go to the first. For networks that are trusted only: nothing is encrypted, nobody is asked for
            a password. All layers lie on workers unless `n_gpu_layers` says how many; `tensor_split` says in which
            proportions, otherwise their free memory does. `offload_kqv=False` keeps the cache here.
        calibration: a mean and a gain for each channel of quantized keys, which lessen their error and change nothing
            else. None calibrates keys of tqgguf's types where the model allows it, unless the policy brings means or
            gains of its own, with the calibration that is kept for this model in the user's cache folder. If there is
            none yet, the model reads a text of 1,408 tokens first, once, and a line on stderr says so; on workers, a
            warning says that there is none. "auto": the same for every quantized type, and an error where it cannot be.
            "off": none. Or a `Calibration`, or the path of one (`tqgguf calibrate`). The environment variable
            TQGGUF_CALIBRATION=off makes None mean "off".
        progress: called as progress(title, done, total) while the model is loaded, from 0 to 100, and while a prompt of
            more than one batch is read, in tokens. What it raises ends that, and is raised.
        **kwargs: as for `llama_cpp.Llama`, except `type_k` and `type_v`, which `cache` replaces.

    Attributes:
        n_tokens_read: tokens computed since the model was first loaded, of prompts and answers.

    Raises:
        ArgumentError: unknown cache type (the message lists the valid ones), `type_k` or `type_v` given,
            `flash_attn=False` with a cache that needs it, a tail with types that are not quantized, an option that the
            stock class does not have, or a number that llama.cpp cannot take; more workers than layers.
        CalibrationError: a calibration of another model, or damaged; nothing of the model may be calibrated.
        WorkerError: a worker that cannot be reached, is of another version, lacks the types, or went away.
        ModelNotFoundError: no such file, or no such file as `lora_path` names.
        ModelFileError: not GGUF, truncated, or without the keys its architecture requires.
        CacheTypeError: a head size is no multiple of the type's block (the message names layer and value), or llama.cpp
            did not use the types it was given.
        OutOfMemoryError: no memory for the KV buffers.
        LibraryError: the native libraries are missing or not those of this package.
        TqggufError: llama.cpp could not load the model; the message carries its own errors.
    """

    _owned: dict[str, Any] | None = None

    def __init__(
        self,
        model_path: str | Path,
        *,
        cache: PolicySpec = "pqo3",
        tail: int | None = None,
        flash_attn: bool | None = None,
        rpc: Sequence[str] | None = None,
        calibration: Calibration | str | Path | None = None,
        progress: Progress | None = None,
        **kwargs: Any,
    ) -> None:
        self.n_tokens_read = 0
        self._arguments = (model_path, cache, tail, flash_attn, rpc, calibration, kwargs)
        self._control = Control(progress)
        self._load()

    def _load(self) -> None:
        """Loads what the arguments name, for the first time or once more."""
        tell = self._control.progress
        title = "calibrating"
        request = checked_request(*self._arguments, (lambda done, total: tell(title, done, total)) if tell else None)
        self._control.failure, self._owned = None, None
        workers = Workers(request.workers, request.types_on_workers) if request.workers else None
        self._open(request, workers, verbose=request.options.get("verbose", True))

    @property
    def model_info(self) -> ModelInfo:
        """What the GGUF file says about the model's KV cache."""
        return self._request.info

    @property
    def has_chat_template(self) -> bool:
        """Whether the model's file brings a chat template."""
        return "tokenizer.chat_template" in self.metadata

    @property
    def cache_policy(self) -> CachePolicy:
        """The type of every layer's K and V."""
        return self._request.policy

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
                that also has types of tqgguf it does not.

        Yields:
            A `llama_context` pointer for llama_cpp's low-level functions.

        Raises:
            ArgumentError: unknown cache type, or a tail with types that are not quantized.
            CacheTypeError: the model cannot have this type, or llama.cpp did not use it.
            OutOfMemoryError: no memory for the KV buffers.
            TqggufError: llama.cpp could not make the context; the message carries its own errors.
        """
        policy = resolve(cache, self._request.info.n_layer)
        n_tail = self._request.tail if tail is None else check_tail(tail)
        refuse_idle_tail(policy, tail)
        refuse_impossible(self._request.info, policy)
        params = type(self.context_params).from_buffer_copy(self.context_params)
        if n_ubatch is not None:
            params.n_ubatch = min(params.n_batch, n_ubatch)
        if self._workers is not None and needs_tqgguf(policy, n_tail) and params.offload_kqv:
            self._workers.need_types()
        making = make_context(self.model, self._request.info, policy, params, tail=n_tail, rotate=rotate)
        with making as (context, _):
            yield context

    def cache_info(self) -> CacheInfo:
        """Types, bytes and cells of the KV cache, per layer and in all.

        All of it is what llama.cpp made: the list of its cache's tensors.

        Raises:
            CacheClosedError: the model was closed.
        """
        with self._turns.looking("cache_info"):
            memory = llama_cpp.llama_get_memory(self.ctx)
            used = int(llama_cpp.llama_memory_seq_pos_max(memory, 0)) + 1 if memory else 0
            n_ctx = self.n_ctx()
        policy = self._request.policy
        return cache_info(
            self._tensors,
            (policy.types_k, policy.types_v),
            n_ctx=n_ctx,
            used=used,
            exact=self._request.info.exact,
            place=self._workers.place if self._workers else str,
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
        with self._turns.taken("save_session"):
            check_target(path)
            tokens = self.input_ids[: self.n_tokens]
            return save(path, self.ctx, tokens, self._session_owner(), extra or {})

    def load_session(self, path: str | Path) -> Session:
        """Takes up a saved session in the place of what the model has read.

        The precise tail is taken up as well, so that a conversation goes on bit for bit in an empty cache of the same
        tail. A session of version 1 has none: its tokens are read from their blocks alone.

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
        with self._turns.taken("load_session", changes=True):
            session, tokens, state = load(path, self._session_owner(), len(self.input_ids), self.n_vocab())
            self.reset()
            if not put(self.ctx, state, session):
                self.reset()
                raise SessionError(f"llama.cpp refused the cache in {path}; the model is empty now")
            self.input_ids[: session.n_tokens] = tokens
            self.n_tokens = session.n_tokens
            return session

    def _state_owner(self) -> dict[str, Any]:
        if self._owned is None:  # it reads the model's file, and is asked for after each answer
            self._owned = belongs_to(self._session_owner())
        return self._owned

    def _session_owner(self) -> Owner:
        return Owner(self._request.info, self._request.policy, cache_settings(self, self._tensors))

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

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        del state["type_k"], state["type_v"], state["model_options"]
        same = self._request.policy.uniform
        state["tail"] = self._request.tail
        state["calibration"] = None if self._request.policy.calibrated else "off"  # the policy has it
        state["rpc"] = self._arguments[4]
        state["cache"] = tuple(kind.name for kind in same) if same else self._request.policy
        return state

    # ---- Workers ----

    @property
    def workers(self) -> tuple[str, ...]:
        """The workers the model lies on, "host:port" each; none if it lies here."""
        return self._workers.names if self._workers else ()

    def reload(self) -> None:
        """Loads the model again, as it was first loaded: after `WorkerError`, when the worker is back.

        What was read is forgotten. Prefix caches (`set_cache`) are kept.

        Raises:
            WorkerError: a worker cannot be reached or used. The model is as it was.
            TqggufError: as when it was first loaded. The model is closed then; it can be tried again.
        """
        if self._workers is not None:
            self._workers.greet()
        workers, prefixes = self._workers, self.cache
        self.close()
        try:
            self._load()
        except BaseException:
            self.close()
            self._workers = workers  # what was lost still is
            raise
        self.set_cache(prefixes)
