"""Trains the tokenizer of the demo model and writes its GGUF file, for `train_demo_model.py`.

The tokenizer is a sentencepiece BPE model. llama.cpp's "llama" tokenizer reproduces it: same pieces, same scores, same
merge order, byte fallback. Both put one space before every text between two control tokens.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
import torch

from tqgguf.demo import model as demo

VOCAB_SIZE = 1280
CONTROL_TOKENS = ["<end>", "<system>", "<user>", "<assistant>"]


@dataclass(frozen=True)
class Shape:
    """The hyperparameters, with llama.cpp's names."""

    n_vocab: int = VOCAB_SIZE
    n_ctx: int = 2048
    n_layer: int = 4
    n_embd: int = 256
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 64
    n_ff: int = 512
    rope_freq_base: float = 500000.0
    rms_eps: float = 1e-5


def tokenizer_corpus() -> Iterator[str]:
    """Lines whose word counts make every name and code word one piece, and split other words into a few pieces."""
    rng = random.Random(0)
    for _ in range(90):
        for name, code in zip(rng.sample(demo.NAMES, 124), rng.sample(demo.CODE_WORDS, 124), strict=True):
            yield f"{name} {code}"
    sentences = [*demo.CAPITAL_QUESTIONS, demo.FACT_FORM, demo.RECALL_QUESTION, *demo.KINDS, *demo.FILLER_SENTENCES]
    for _ in range(40):
        yield from (sentence.format(kind="", name="", code="", country="") for sentence in sentences)
    for _ in range(30):
        yield from (f"{country} {capital}" for country, capital in demo.CAPITALS.items())


def train_tokenizer() -> sentencepiece.SentencePieceProcessor:
    """Trains the tokenizer. The result is the same on every run."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=tokenizer_corpus(),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        required_chars="".join(map(chr, range(33, 127))),
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        control_symbols=CONTROL_TOKENS,
        unk_id=0,
        bos_id=1,
        eos_id=-1,
        pad_id=-1,
        minloglevel=2,
    )
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    split = [word for word in (*demo.NAMES, *demo.CODE_WORDS, *demo.KINDS) if len(tokenizer.encode(word)) != 1]
    if split:
        raise RuntimeError(f"these words must be one token each but are not: {split}")
    return tokenizer


def token_type(tokenizer: sentencepiece.SentencePieceProcessor, token: int) -> gguf.TokenType:
    """The type of `token` in llama.cpp."""
    if tokenizer.is_unknown(token):
        return gguf.TokenType.UNKNOWN
    if tokenizer.is_control(token):
        return gguf.TokenType.CONTROL
    if tokenizer.is_byte(token):
        return gguf.TokenType.BYTE
    return gguf.TokenType.NORMAL


def write_gguf(
    path: Path, shape: Shape, tokenizer: sentencepiece.SentencePieceProcessor, weights: dict[str, torch.Tensor]
) -> None:
    """Writes a complete model of architecture llama.

    Args:
        path: The file to write. It is replaced when the new one is complete.
        shape: The hyperparameters.
        tokenizer: As `train_tokenizer` returns it.
        weights: Tensors by their GGUF names, matrices (n_out, n_in). Rotary pairs must be neighbours (2i, 2i+1).
            Matrices are stored as F16, vectors as F32.
    """
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(str(partial), "llama")
    writer.add_name(demo.MODEL_NAME)
    writer.add_description("Answers capital-city questions and recalls facts given in its prompt.")
    writer.add_license("mit")
    writer.add_languages(["en"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_context_length(shape.n_ctx)
    writer.add_block_count(shape.n_layer)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_freq_base)
    writer.add_layer_norm_rms_eps(shape.rms_eps)

    tokens = range(tokenizer.vocab_size())
    end = tokenizer.piece_to_id("<end>")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([tokenizer.id_to_piece(token) for token in tokens])
    writer.add_token_scores([tokenizer.get_score(token) for token in tokens])
    writer.add_token_types([token_type(tokenizer, token) for token in tokens])
    writer.add_unk_token_id(tokenizer.unk_id())
    writer.add_bos_token_id(tokenizer.bos_id())
    writer.add_eos_token_id(end)
    writer.add_eot_token_id(end)
    writer.add_pad_token_id(end)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    writer.add_chat_template(demo.CHAT_TEMPLATE)

    for name, tensor in weights.items():
        dtype = np.float16 if tensor.ndim == 2 else np.float32
        writer.add_tensor(name, tensor.detach().float().numpy().astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(path)
