"""The program that fits tables of levels (benchmarks/quality/train_codebooks.c) comes to the library's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tqgguf import reference

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "benchmarks" / "quality" / "train_codebooks.c"


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, built by the command that its comment gives."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("there is no C compiler")
    path = tmp_path_factory.mktemp("trainer") / "train_codebooks"
    command = re.search(r"^ \*     cc (.*?) -o ", PROGRAM.read_text(), re.S | re.M)
    assert command
    words = command[1].replace("\\\n *", " ").replace("-march=native", "").split()
    done = subprocess.run([compiler, *words, "-Wall", "-Wextra", "-o", path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return path


@pytest.mark.long
@pytest.mark.parametrize(("type", "n_blocks", "nmse"), [("pqt2", 2048, 0.0700), ("pqo3", 4096, 0.0230)])
def test_levels_from_scratch_are_nearly_as_good_as_the_table(
    trainer: Path, type: str, n_blocks: int, nmse: float
) -> None:
    done = subprocess.run([trainer, type, "spread", str(n_blocks), "2"], capture_output=True, text=True, check=True)
    table, trained = (float(number) for number in re.findall(r"^NMSE of .*: (0\.\d+)$", done.stdout, re.M))
    assert table == pytest.approx(nmse, rel=0.02) and trained < 1.02 * table
    levels = np.array(re.search(r"^levels (.*)$", done.stdout, re.M)[1].split(), dtype=float)  # type: ignore[index]
    unit = 64 if type in reference.TRELLIS_TYPES else 1
    np.testing.assert_allclose(levels, unit * reference.codebook(type).levels, atol=0.1 * unit)


def test_arguments_that_it_does_not_know(trainer: Path) -> None:
    for arguments in ([], ["pqt9"], ["pqt2", "elsewhere"]):
        done = subprocess.run([trainer, *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and "pqo3, pqo4, pqt2, pqt3, pqt4, pqt5" in done.stderr
