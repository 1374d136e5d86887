"""Small random models of many architectures: their words are noise, their shapes are real.

A model is its keys and its tensors, as llama.cpp's `load_arch_hparams` and `load_arch_tensors` ask for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf_file import TOKENS, Tensor, shape_keys, write_gguf

N_EMBD: Final = 128
N_FF: Final = 192
N_HEAD: Final = 4
N_HEAD_KV: Final = 2
HEAD_DIM: Final = 32
N_LAYER: Final = 4
N_CTX: Final = 8192
N_EXPERT: Final = 4
WINDOW: Final = 96

Shapes = dict[str, tuple[int, ...]]
"""Tensors by name, sizes in NumPy's order: (rows, columns)."""


@dataclass(frozen=True)
class Architecture:
    """Keys without the architecture's prefix, and the tensors of a layer, named without "blk.N."."""

    keys: dict[str, Any]
    layer: Callable[[int], Shapes]
    top: Shapes
    tied: bool = False
    """Whether the output is the embedding."""


def _attention(q: int = N_HEAD * HEAD_DIM, kv: int = N_HEAD_KV * HEAD_DIM) -> Shapes:
    return {
        "attn_q.weight": (q, N_EMBD),
        "attn_k.weight": (kv, N_EMBD),
        "attn_v.weight": (kv, N_EMBD),
        "attn_output.weight": (N_EMBD, q),
    }


def _ffn(up: int = N_FF) -> Shapes:
    return {"ffn_up.weight": (up, N_EMBD), "ffn_down.weight": (N_EMBD, N_FF)}


def _norms(*names: str, size: int = N_EMBD) -> Shapes:
    return {f"{name}.weight": (size,) for name in names}


def _gated() -> Shapes:
    return _attention() | _ffn() | {"ffn_gate.weight": (N_FF, N_EMBD)} | _norms("attn_norm", "ffn_norm")


def _fused(bias: bool) -> Shapes:
    width = N_EMBD + 2 * N_HEAD_KV * HEAD_DIM
    shapes: Shapes = {"attn_qkv.weight": (width, N_EMBD), "attn_output.weight": (N_EMBD, N_EMBD)}
    if bias:
        shapes |= {"attn_qkv.bias": (width,), "attn_output.bias": (N_EMBD,)}
    return shapes


def _experts(bias: bool = False) -> Shapes:
    shapes: Shapes = {
        "ffn_gate_inp.weight": (N_EXPERT, N_EMBD),
        "ffn_gate_exps.weight": (N_EXPERT, N_FF, N_EMBD),
        "ffn_up_exps.weight": (N_EXPERT, N_FF, N_EMBD),
        "ffn_down_exps.weight": (N_EXPERT, N_EMBD, N_FF),
    }
    if bias:
        shapes |= {name.replace("weight", "bias"): shape[:-1] for name, shape in shapes.items()}
    return shapes


def _mamba() -> Shapes:
    inner, state, rank = 2 * N_EMBD, 16, 8
    return {
        "ssm_in.weight": (2 * inner, N_EMBD),
        "ssm_conv1d.weight": (inner, 4),
        "ssm_conv1d.bias": (inner,),
        "ssm_x.weight": (rank + 2 * state, inner),
        "ssm_dt.weight": (inner, rank),
        "ssm_dt.bias": (inner,),
        "ssm_a": (inner, state),
        "ssm_d": (inner,),
        "ssm_out.weight": (N_EMBD, inner),
    }


def _mamba2() -> Shapes:
    inner, state, heads, groups = 2 * N_EMBD, 16, 8, 1
    conv = inner + 2 * groups * state
    return {
        "ssm_in.weight": (inner + conv + heads, N_EMBD),
        "ssm_conv1d.weight": (conv, 4),
        "ssm_conv1d.bias": (conv,),
        "ssm_dt.bias": (heads,),
        "ssm_a": (heads, 1),
        "ssm_d": (heads, 1),
        "ssm_norm.weight": (groups, inner // groups),
        "ssm_out.weight": (N_EMBD, inner),
    }


def _latent(layer: int) -> Shapes:
    rope, nope, rank, q_rank, v = 32, 32, 96, 64, 32
    return (
        {
            "attn_q_a.weight": (q_rank, N_EMBD),
            "attn_q_b.weight": (N_HEAD * (nope + rope), q_rank),
            "attn_kv_a_mqa.weight": (rank + rope, N_EMBD),
            "attn_k_b.weight": (N_HEAD, rank, nope),
            "attn_v_b.weight": (N_HEAD, v, rank),
            "attn_output.weight": (N_EMBD, N_HEAD * v),
        }
        | _norms("attn_norm", "ffn_norm")
        | _norms("attn_q_a_norm", size=q_rank)
        | _norms("attn_kv_a_norm", size=rank)
        | (_ffn() | {"ffn_gate.weight": (N_FF, N_EMBD)} if layer == 0 else _experts() | _shared())
    )


def _shared() -> Shapes:
    shapes: Shapes = {f"ffn_{name}_shexp.weight": (N_FF, N_EMBD) for name in ("gate", "up")}
    return shapes | {"ffn_down_shexp.weight": (N_EMBD, N_FF)}


_HEAD_NORMS = _norms("attn_q_norm", "attn_k_norm", size=HEAD_DIM)
_POST_NORMS = _norms("post_attention_norm", "post_ffw_norm")
_LAYER_NORM_EPS = {"attention.layer_norm_epsilon": 1e-5}
_SSM = {"ssm.conv_kernel": 4, "ssm.inner_size": 2 * N_EMBD, "ssm.state_size": 16, "ssm.time_step_rank": 8}
_MOE = {"expert_count": N_EXPERT, "expert_used_count": 2, "expert_feed_forward_length": N_FF}
_OUTPUT_BIAS: Shapes = {"output_norm.bias": (N_EMBD,)}
_ATTENTION_AT = (1, 3)  # jamba: layers with attention; the others are recurrent

ARCHITECTURES: Final = {
    "llama": Architecture({}, lambda _: _gated(), {}),
    "qwen2": Architecture(
        {},
        lambda _: _gated() | {"attn_q.bias": (128,), "attn_k.bias": (64,), "attn_v.bias": (64,)},
        {},
    ),
    "qwen3": Architecture({}, lambda _: _gated() | _HEAD_NORMS, {}),
    "gemma2": Architecture(
        {"attention.sliding_window": WINDOW, "attn_logit_softcapping": 50.0},
        lambda _: _gated() | _POST_NORMS,
        {},
        tied=True,
    ),
    "gemma3": Architecture({"attention.sliding_window": WINDOW}, lambda _: _gated() | _POST_NORMS | _HEAD_NORMS, {}),
    "olmo2": Architecture(
        {"attention.sliding_window": WINDOW},
        lambda _: (
            {name: shape for name, shape in _gated().items() if "_norm" not in name}
            | _POST_NORMS
            | _norms("attn_q_norm")
            | _norms("attn_k_norm", size=N_HEAD_KV * HEAD_DIM)
        ),
        {},
    ),
    "phi3": Architecture(
        {"attention.sliding_window": WINDOW},
        lambda _: _fused(bias=False) | _ffn(2 * N_FF) | _norms("attn_norm", "ffn_norm"),
        {},
    ),
    "glm4": Architecture(
        {}, lambda _: _attention() | _ffn(2 * N_FF) | _norms("attn_norm", "ffn_norm") | _POST_NORMS, {}
    ),
    "falcon": Architecture(
        _LAYER_NORM_EPS,
        lambda _: _fused(bias=False) | _ffn() | _norms("attn_norm") | {"attn_norm.bias": (N_EMBD,)},
        _OUTPUT_BIAS,
    ),
    "gpt2": Architecture(
        _LAYER_NORM_EPS,
        lambda _: (
            _fused(bias=True)
            | _ffn()
            | {"ffn_up.bias": (N_FF,), "ffn_down.bias": (N_EMBD,)}
            | _norms("attn_norm", "ffn_norm")
            | {"attn_norm.bias": (N_EMBD,), "ffn_norm.bias": (N_EMBD,)}
        ),
        _OUTPUT_BIAS | {"position_embd.weight": (N_CTX, N_EMBD)},
    ),
    "gpt-oss": Architecture(
        _MOE | {"attention.sliding_window": WINDOW},
        lambda _: (
            _attention()
            | _experts(bias=True)
            | _norms("attn_norm", "post_attention_norm")
            | {"attn_sinks.weight": (N_HEAD,), "attn_output.bias": (N_EMBD,)}
        ),
        {},
    ),
    "deepseek2": Architecture(
        _MOE
        | {
            "attention.head_count_kv": 1,
            "attention.key_length": 128,
            "attention.value_length": 96,
            "attention.key_length_mla": 64,
            "attention.value_length_mla": 32,
            "attention.q_lora_rank": 64,
            "attention.kv_lora_rank": 96,
            "leading_dense_block_count": 1,
            "expert_shared_count": 1,
        },
        _latent,
        {},
    ),
    "mamba": Architecture(_SSM, lambda _: _mamba() | _norms("attn_norm"), {}),
    "jamba": Architecture(
        _SSM | {"attention.head_count_kv": [N_HEAD_KV if i in _ATTENTION_AT else 0 for i in range(N_LAYER)]},
        lambda i: (
            (
                _attention()
                if i in _ATTENTION_AT
                else _mamba() | _norms("ssm_dt_norm", size=8) | _norms("ssm_b_norm", "ssm_c_norm", size=16)
            )
            | _ffn()
            | {"ffn_gate.weight": (N_FF, N_EMBD)}
            | _norms("attn_norm", "ffn_norm")
        ),
        {},
    ),
    "falcon-h1": Architecture(
        _SSM | {"ssm.group_count": 1},
        # llama.cpp asks for this norm without ".weight"
        lambda _: {name.replace("ffn_norm.weight", "ffn_norm"): s for name, s in (_gated() | _mamba2()).items()},
        {},
    ),
}


def write_architecture(path: Path, name: str) -> Path:
    """Writes a random f32 model of one of `ARCHITECTURES`, with a vocabulary of bytes."""
    arch = ARCHITECTURES[name]
    shape = {"n_embd": N_EMBD, "n_layer": N_LAYER, "n_ff": N_FF, "n_head": N_HEAD, "n_head_kv": N_HEAD_KV}
    keys = shape_keys(n_ctx=N_CTX, head_dim=HEAD_DIM, **shape) | arch.keys
    rng = np.random.default_rng(0)

    def tensors() -> Iterator[Tensor]:
        for tensor, size in _shapes(arch):
            noise = rng.standard_normal(size) / np.sqrt(size[-1])
            fixed = 1.0 if "norm" in tensor else -1.0 if tensor.endswith("ssm_a") else None  # a state must decay
            yield tensor, noise if fixed is None else np.full(size, fixed)

    return write_gguf(path, name, keys, tensors())


def _shapes(arch: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    top: Shapes = {"token_embd.weight": (len(TOKENS), N_EMBD)}
    if not arch.tied:
        top |= {"output.weight": (len(TOKENS), N_EMBD)}
    yield from (top | _norms("output_norm") | arch.top).items()
    for i in range(N_LAYER):
        for name, shape in arch.layer(i).items():
            yield f"blk.{i}.{name}", shape
