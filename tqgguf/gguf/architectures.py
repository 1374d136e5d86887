"""What llama.cpp knows of an architecture's KV cache without reading it from the file, by `general.architecture`."""

from __future__ import annotations

from typing import Final

__all__ = [
    "HYBRID",
    "INTERVAL",
    "NOT_MODELLED",
    "NO_CACHE",
    "OWN_ATTENTION",
    "RECURRENT",
    "SWA_FROM_PATTERN",
    "SWA_IGNORED",
    "SWA_PERIOD",
    "SWA_WINDOW",
]

SWA_PERIOD: Final = {
    "afmoe": (4, False),
    "cohere2": (4, False),
    "cohere2moe": (4, True),
    "exaone-moe": (4, False),
    "gemma2": (2, False),
    "gemma3": (6, False),
    "gemma3n": (5, False),
    "gpt-oss": (2, False),
    "laguna": (4, True),
    "llama4": (4, False),
    "mellum": (4, False),
    "muse-glimmer": (4, False),
    "olmo2": (4, False),
    "plamo3": (8, False),
    "smallthinker": (4, True),
}
"""Architectures with sliding windows: the period that llama.cpp knows, and whether it begins with full attention."""

SWA_FROM_PATTERN: Final = {"gemma4", "granite_swa", "maple", "mimo2", "spark2_5", "step35"}
"""Architectures with sliding windows whose pattern is in the file."""

SWA_WINDOW: Final = {"gemma2": 4096, "llama4": 8192}
"""Tokens of the window, where the file need not say it."""

SWA_IGNORED: Final = {"llama", "phi3", "phimoe", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "starcoder2"}
"""Architectures that ignore a window in the file."""

NO_CACHE: Final = {
    *("bert", "jina-bert-v2", "jina-bert-v3", "nomic-bert", "nomic-bert-moe", "neo-bert", "eurobert", "modern-bert"),
    *("gemma-embedding", "wavtokenizer-dec", "dream", "llada", "llada-moe", "rnd1"),
}
"""Architectures that compute all tokens at once."""

RECURRENT: Final = {"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"}
"""Architectures with a state of fixed size and no KV cache."""

INTERVAL: Final = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "minimax-01": 8}
"""Hybrid architectures: every so many layers one has a KV cache, unless the file says otherwise."""

HYBRID: Final = {
    *("jamba", "falcon-h1", "plamo2", "granitehybrid", "lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe"),
    *("kimi-linear", *INTERVAL),
}
"""Architectures of which some layers have a KV cache and the others a recurrent state."""

NOT_MODELLED: Final = {
    "bailingmoe3": "hybrid linear attention",
    "deepseek32": "a sparse-attention index beside the cache",
    "deepseek4": "a compressed cache of several parts",
    "dflash": "a draft model's shared cache",
    "dots3note": "a sparse-attention index beside the cache",
    "exaone4": "windows that depend on the model's size",
    "gemma4-assistant": "a cache shared with another model",
    "glm-dsa": "a sparse-attention index beside the cache",
    "glm5-next": "hybrid linear attention",
    "hy_v4": "a sparse-attention index beside the cache",
    "kimi-k3": "hybrid linear attention",
    "minimax-m3": "a sparse-attention index beside the cache",
    "nanbeige": "layers that are repeated",
    "qwen4exp": "a sparse-attention index beside the cache",
    "t5": "an encoder with a cross-attention cache",
    "t5encoder": "an encoder without a cache",
}
"""Architectures whose cache has parts that `ModelInfo` does not describe, and what they are."""

OWN_ATTENTION: Final = {
    *("deepseek32", "deepseek4", "dflash", "dots3note", "glm-dsa", "glm5-next", "hy_v4", "minimax-m3", "qwen4exp"),
}
"""Architectures whose graph reads keys, or an index of them, otherwise than by `build_attn_mha` of llama.cpp."""
