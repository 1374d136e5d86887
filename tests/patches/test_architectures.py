"""A part of the architectures that `make conformance-upstream` runs all of, on small models of their kinds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import program
import pytest

import tqgguf
from tqgguf.cache.tail import READ_IN_PART, warn_unread

WITH_CACHE = (
    *("llama", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "phi3", "glm4", "falcon", "gpt2", "gpt-oss"),
    *("jamba", "falcon-h1"),
)


@pytest.fixture(scope="module")
def architectures() -> ModuleType:
    return program.load("tests/patches/upstream_architectures.py")


@pytest.mark.parametrize("name", WITH_CACHE)
def test_runs_with_every_pair_and_reads_its_tail(
    architectures: ModuleType, architecture: Callable[[str], Path], name: str
) -> None:
    row = architectures.measure(architecture(name))
    assert row["compressed"] == ("2 of 4 layers" if name == "jamba" else "all layers")
    assert 1e-3 < row["pqo4"] < row["pqo4, pqo3"] < row["pqo3"] < 0.7
    assert row["tail"] < 0.05 * row["pqo3"] and architectures.cells(row)[-1] == "yes"


def test_one_latent_has_one_type(architectures: ModuleType, architecture: Callable[[str], Path]) -> None:
    row = architectures.measure(architecture("deepseek2"))
    assert 1e-3 < row["pqo4"] < row["pqo3"] and row["tail"] < 0.05 * row["pqo3"]
    assert row["pqo4, pqo3"].startswith("K and V share one latent in this model")
    assert "all layers, one latent" in architectures.cells(row)


def test_no_cache_is_refused_with_a_reason(architectures: ModuleType, architecture: Callable[[str], Path]) -> None:
    row = architectures.cells(architectures.measure(architecture("mamba")))
    assert row[2] == "refused: architecture mamba has no KV cache"


def test_the_table_is_complete_and_its_comparison_sees_changes(architectures: ModuleType) -> None:
    table = architectures.PAGE.read_text().split(architectures.BEGIN)[1].split(architectures.END)[0]
    assert len(table.splitlines()) > 120
    assert not architectures.differences(table, table)
    for old, new in (("| yes |", "| no |"), ("all layers", "1 of 2 layers"), ("refused: ", "")):
        assert len(architectures.differences(table.replace(old, new, 1), table)) == 1
    first = next(line for line in table.splitlines()[2:] if line.endswith("| yes |"))
    figure = first.split(" | ")[3]
    assert architectures.differences(table.replace(first, first.replace(figure, "55 %", 1)), table)


def test_a_tail_that_is_not_read_everywhere_gives_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    for name in READ_IN_PART:
        with pytest.warns(UserWarning, match=f"do not read the precise tail, and {name} has them: tail=0"):
            warn_unread(128, name)
    with pytest.warns(UserWarning, match="T5's attention has a bias, and does not read the precise tail: tail=0"):
        warn_unread(128, "t5")
    warn_unread(0, "minimax-m3")
    warn_unread(0, "t5")
    warn_unread(128, "llama")
    assert not [w for w in recwarn if "tail" in str(w.message)]


def test_t5_is_refused_a_quantized_v(tmp_path: Path, architecture: Callable[[str], Path]) -> None:
    info = tqgguf.gguf.info.read_model_info(architecture("llama"))
    t5 = tqgguf.gguf.info.ModelInfo(**{**vars(info), "architecture": "t5"})
    f16, pqo3 = (tqgguf.CACHE_TYPES[name] for name in ("f16", "pqo3"))
    assert t5.obstacle(pqo3, f16) is None
    assert "no place for the bias of T5" in str(t5.obstacle(f16, pqo3))
