"""Measuring another program: what it stores is read from its log, and a type that is not what its name says is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import program
import pytest

SIZES = "llama_kv_cache: size = {0} MiB ( 2048 cells, 30 layers, 1/1 seqs), K ({1}): {2} MiB, V ({1}): {2} MiB"


@pytest.fixture(scope="module")
def peer() -> Any:
    return program.load("benchmarks/real_models.py").peer


def test_bits_are_those_of_all_caches_together(peer: Any) -> None:
    window = SIZES.format(6, "q4_0", "3.00")
    log = f"{SIZES.format(12, 'q4_0', '6.00')}\n{window}"
    assert peer.stored_bits(log, 32 * 2**20) == 18 * 2**20 * 8 / (32 * 2**20)
    with pytest.raises(peer.PeerError, match="no sizes of K and V"):
        peer.stored_bits("llama_context: n_ctx = 2048", 1)


@pytest.mark.parametrize(
    ("kind", "bits", "wrong"),
    [
        ("q8_0", 8.5, False),
        ("q5_1", 6.0, False),
        ("iq4_nl", 4.5, False),
        ("turbo3", 3.125, False),
        ("turbo3", 6.25, True),
        ("turbo4", 8.5, True),
        ("q4_0", 3.5, True),
        ("mystery", 2.0, False),
    ],
)
def test_a_type_that_takes_other_bits_is_told(peer: Any, kind: str, bits: float, wrong: bool) -> None:
    said = peer.doubt(kind, bits)
    assert (said is not None) == wrong
    assert said is None or (kind in said and f"{bits:.2f} bits" in said)


def fake(path: Path, size: str) -> Path:
    """A llama-perplexity that prints what such a program prints."""
    statistics = (
        "Mean PPL(Q)                   :  21.500000 ±   1.0\nMean    KLD:   0.270100 ±   0.01\n"
        "Median  KLD:   0.143000\n99.9%   KLD:   3.500000\nSame top p: 75.200 ± 1.3 %"
    )
    path.write_text(
        f"#!{sys.executable}\nimport sys\n"
        f"kind = sys.argv[sys.argv.index('-ctk') + 1]\n"
        f"if kind == 'none': sys.exit('unknown type none')\n"
        f"print({SIZES!r}.format(0, kind, '22.50' if kind == 'f16' else {size!r}), file=sys.stderr)\n"
        f"print({statistics!r} if '--kl-divergence' in sys.argv else '')\n"
    )
    path.chmod(0o755)
    return path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """real_models.py on a model and text that are only names."""
    real = program.load("benchmarks/real_models.py")
    monkeypatch.setattr(real.real_sources, "model_path", lambda key: tmp_path / key)
    monkeypatch.setattr(real.real_sources, "text", lambda name: name)
    monkeypatch.setattr(real.real_sources, "folder", lambda: tmp_path)

    def call(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["real_models.py", *options])
        real.main()

    return call


def test_figures_of_a_program(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--peer", str(fake(tmp_path / "perplexity", "9.00")), "--types", "turbo3")
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "model": "SmolLM2-135M-Instruct Q4_1",
        "text": "prose",
        "type": "turbo3",
        "bits": 6.4,
        "perplexity": 21.5,
        "kld": 0.2701,
        "median": 0.143,
        "p999": 3.5,
        "same_top": 0.752,
    }
    assert "WARNING: turbo3 takes 6.40 bits per value, not the 3 of its name" in err


def test_a_program_that_fails_or_is_not_there(run: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="failed with a none cache: unknown type none"):
        run("--peer", str(fake(tmp_path / "perplexity", "9.00")), "--types", "none")
    with pytest.raises(SystemExit, match=r"cannot start .*: No such file"):
        run("--peer", str(tmp_path / "missing"))


def test_an_unknown_part_is_refused() -> None:
    command = [sys.executable, str(program.REPOSITORY / "benchmarks/real_models.py"), "pictures"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "unknown part pictures" in done.stderr
