"""Q, K and V of a model as they enter attention, taken from llama.cpp's running graph through its eval callback.

The callback is public (`llama_context_params.cb_eval`) and sees every node of the graph. The node `FLASH_ATTN_EXT` has
the inputs of attention as its sources, after all that an architecture does before (biases, norms of Q and K, RoPE, a
fused QKV matrix), and scale, ALiBi bias and softcap as its parameters. Tensors are not chosen by the names `Qcur-3` and
`Kcur-3`, because some architectures name them before the last step: Gemma 2 scales Q afterwards, Llama 4 normalises it.
The number of the layer is that of the KV cache tensor which K is read from (`cache_k_l3`). A cache of f32 holds K and V
exactly as they were computed.

Behind attention come the matrix that its outputs are multiplied by, which is the first with as many columns as they
have values, and the addition to the residual stream, which is the first of two tensors that both have rows for tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from .._native import import_llama_cpp
from .._native.ggml import Tensor, op_name, read_tensor, tensor_at, tensor_name
from .._util import ranges
from ..cache.policy import resolve
from ..errors import TqggufError, UnsupportedError
from ..gguf.info import ModelInfo
from ..reference import alibi_slopes
from .context import make_context
from .control import called_by_c, interrupts_held

llama_cpp: Any = import_llama_cpp()

T = TypeVar("T")
F32 = npt.NDArray[np.float32]

_CACHE_NAME: Final = re.compile(rb"cache_([kv])_l(\d+)")


@dataclass(frozen=True)
class Loaded:
    """A model that llama.cpp has loaded.

    Attributes:
        pointer: its `llama_model`.
        info: what its file says.
        n_threads: threads that its contexts compute with.
    """

    pointer: Any
    info: ModelInfo
    n_threads: int


@dataclass(frozen=True)
class Branch:
    """What becomes of the outputs of one layer's attention.

    Attributes:
        matrix: (n_embd, n_head * head_dim_v) float32, which they are multiplied by.
        share: squares of what is added to the residual stream, relative to those of the stream behind it: the mean over
            tokens, because the first one may have a thousand times the norm of the others.
    """

    matrix: F32
    share: float


@dataclass(frozen=True)
class AttentionInputs:
    """The inputs of one layer's attention, for a text read into an empty cache.

    Attributes:
        layer: number of the layer.
        q: (n_tokens, n_head, head_dim_k) float32, after RoPE; query head h reads KV head h // (n_head // n_head_kv).
        k: (n_tokens, n_head_kv, head_dim_k) float32, after RoPE.
        v: (n_tokens, n_head_kv, head_dim_v) float32.
        scale: factor on the dot products.
        mask: (n_tokens, n_tokens) float32, added to the scores: 0 (with ALiBi, minus the distance) where a query sees
            a key, -inf elsewhere.
        sinks: (n_head,) float32 logits, or None.
        softcap: c of c tanh(score / c); 0 for none.
        max_bias: ALiBi's largest bias; 0 for none.
        branch: what becomes of the outputs; None if it was not asked for or not found.
    """

    layer: int
    q: F32
    k: F32
    v: F32
    scale: float
    mask: F32
    sinks: F32 | None
    softcap: float
    max_bias: float
    branch: Branch | None = None

    def weights(self, dots: F32, head: int, rows: npt.NDArray[np.intp]) -> F32:
        """What softmax makes of a query head's dot products q.k.

        Args:
            dots: (n_rows, n_keys), with the first n_keys keys: all that these queries see.
            head: number of the query head.
            rows: (n_rows,) numbers of the queries' tokens.

        Returns:
            (n_rows, n_keys): weights; with sinks, their sum is less than 1.
        """
        scores = dots * np.float32(self.scale)
        if self.softcap:
            scores = np.float32(self.softcap) * np.tanh(scores / np.float32(self.softcap))
        slope = alibi_slopes(self.q.shape[1], self.max_bias)[head]
        scores += self.mask[rows, : dots.shape[1]] * np.float32(slope)
        top = scores.max(axis=1, keepdims=True)
        if self.sinks is not None:
            top = np.maximum(top, self.sinks[head])
        p: F32 = np.exp(scores - top)
        total = p.sum(axis=1, keepdims=True)
        if self.sinks is not None:
            total += np.exp(self.sinks[head] - top)
        p /= total
        return p


def read_attention(
    model: Loaded,
    tokens: Sequence[int],
    layers: Collection[int],
    read: Callable[[AttentionInputs], T],
    cache: str = "f32",
    branches: bool = False,
    starts: Sequence[int] = (0,),
) -> dict[int, T]:
    """What `read` makes of each layer's inputs of attention, for tokens that are read into a new cache as one batch.

    Args:
        model: any loaded model; its own cache does not change.
        tokens: at least one.
        layers: numbers of the layers wanted; each must have a KV cache of its own.
        cache: type of the KV cache. With another type than f32, K and V are as decoded from it; if llama.cpp rotates
            the type, Q, K and V are rotated.
        read: called while the graph waits, so that the inputs of one layer are held at a time.
        branches: whether `AttentionInputs.branch` is wanted.
        starts: the first position of each part of the tokens. Parts are as equal as can be, and sequences of their own,
            which do not see each other.

    Returns:
        By layer, ascending.

    Raises:
        UnsupportedError: the model does not run flash attention.
        TqggufError: llama.cpp could not run the tokens.
    """
    info = model.info
    hook = _Hook(frozenset(layers), lambda layer, node: _inputs(info, len(tokens), layer, node), read, branches)
    _decode(model, tokens, hook, cache, starts)
    hook.finish()
    missing = sorted(set(layers) - set(hook.found))
    if missing:
        raise UnsupportedError(
            f"{info.path.name}: the graph of architecture {info.architecture} runs no flash attention "
            f"on the KV cache of layer {ranges(missing)}; Q, K and V cannot be captured"
        )
    return dict(sorted(hook.found.items()))


class _Hook(Generic[T]):
    """The eval callback: asked for each node whether it is wanted, and called again when a wanted node is computed."""

    def __init__(
        self,
        wanted: frozenset[int],
        copy: Callable[[int, Tensor], AttentionInputs],
        read: Callable[[AttentionInputs], T],
        branches: bool,
    ) -> None:
        self.wanted = wanted
        self.copy = copy
        self.read = read
        self.branches = branches
        self.found: dict[int, T] = {}
        self.waiting: AttentionInputs | None = None  # for its branch
        self.matrix: F32 | None = None
        self.error: BaseException | None = None
        self.interrupted = False

    def interrupt(self) -> None:
        """Ends the reading; it raises KeyboardInterrupt then."""
        self.interrupted = True
        self.error = KeyboardInterrupt()

    @called_by_c
    def __call__(self, address: int, ask: bool, _user_data: Any) -> bool:
        if self.interrupted:
            return ask  # a node that was asked for and is refused ends the graph
        try:
            node = tensor_at(address)
            op = op_name(node)
            if self.waiting and op in ("MUL_MAT", "ADD"):
                return self._behind(self.waiting, node, op, ask)
            if op != "FLASH_ATTN_EXT":
                return False
            layer = _cache_layer(node.src[1], b"k")
            if ask:
                # The first layer to use a cache owns it; layers that share it come later.
                return layer in self.wanted and layer not in self.found
            if layer is not None:
                self.finish()
                self.waiting = self.copy(layer, node)
                if not self.branches:
                    self.finish()
            return True
        except BaseException as error:  # any: ctypes would print it and go on; `_decode` raises it
            self.error = error
            return False

    def finish(self, branch: Branch | None = None) -> None:
        """Reads the inputs that wait, with what was found of their branch."""
        if self.waiting:
            inputs, self.waiting, self.matrix = self.waiting, None, None
            self.found[inputs.layer] = self.read(replace(inputs, branch=branch))

    def _behind(self, inputs: AttentionInputs, node: Tensor, op: str, ask: bool) -> bool:
        """A node behind attention whose branch is wanted."""
        if op == "MUL_MAT":
            weights = tensor_at(node.src[0])
            if ask and self.matrix is None and weights.ne[0] == inputs.q.shape[1] * inputs.v.shape[2]:
                self.matrix = read_tensor(weights)[0, 0]
            return False
        stream = tensor_at(node.src[1])
        # A bias has one row. Few rows are left in the last layer, where those without logits are dropped.
        if self.matrix is None or node.ne[0] != len(self.matrix) or list(stream.ne) != list(node.ne):
            return False
        if not ask:
            after = read_tensor(node)
            # The sum takes the place of one of its terms.
            before = read_tensor(stream if stream.data != node.data else tensor_at(node.src[0]))
            added = before if stream.data == node.data else after - before
            squares = [np.square(x).sum(axis=-1) for x in (added, after)]
            self.finish(Branch(self.matrix, float((squares[0] / np.maximum(squares[1], 1e-30)).mean())))
        return True


def _inputs(info: ModelInfo, n: int, layer: int, node: Tensor) -> AttentionInputs:
    """Copies the sources of a computed flash attention node, of the first n tokens."""
    if _cache_layer(node.src[2], b"v") != layer:
        raise UnsupportedError(f"{info.path.name}: layer {layer} does not take V from its own cache")
    q, k, v = (read_tensor(_stored(source))[0].transpose(1, 0, 2)[:n] for source in node.src[0:3])
    mask = read_tensor(tensor_at(node.src[3]))[0, 0, :n, :n]
    if not np.isfinite(np.diagonal(mask)).all():
        raise TqggufError(f"{info.path.name}: layer {layer}: tokens are not in the order of their cache cells")
    sinks = read_tensor(tensor_at(node.src[4])).ravel() if node.src[4] else None
    scale, max_bias, softcap = node.op_params[0:3]
    return AttentionInputs(layer, q, k, v, scale, mask, sinks, softcap, max_bias)


def _stored(address: Any) -> Tensor:
    """The tensor behind a conversion: llama.cpp casts an f32 cache to f16 for flash attention."""
    tensor = tensor_at(address)
    while op_name(tensor) == "CPY":
        tensor = tensor_at(tensor.src[0])
    return tensor


def _cache_layer(address: Any, side: bytes) -> int | None:
    """The layer of the KV cache tensor that K or V is a view of; None if it is not such a view."""
    tensor = _stored(address)
    match = _CACHE_NAME.fullmatch(tensor_name(tensor.view_src)) if tensor.view_src else None
    return int(match[2]) if match and match[1] == side else None


def _decode(model: Loaded, tokens: Sequence[int], hook: _Hook[T], cache: str, starts: Sequence[int]) -> None:
    """Runs tokens through a new context of the model as one batch, with the hook as its callback."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = len(tokens)
    params.n_seq_max, params.kv_unified = len(starts), True
    params.n_threads = params.n_threads_batch = model.n_threads
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.cb_eval = callback = llama_cpp.ggml_backend_sched_eval_callback(hook)
    info = model.info
    with make_context(model.pointer, info, resolve(cache, info.n_layer), params) as (context, _):
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                part = i * len(starts) // len(tokens)
                first = -(-part * len(tokens) // len(starts))
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, starts[part] + i - first, 1
                batch.seq_id[i][0], batch.logits[i] = part, i == len(tokens) - 1
            with interrupts_held(hook.interrupt):
                status = llama_cpp.llama_decode(context, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
    del callback
    if hook.error:
        raise hook.error
    if status:
        raise TqggufError(f"llama.cpp could not run {len(tokens)} tokens through {info.path.name}: status {status}")
