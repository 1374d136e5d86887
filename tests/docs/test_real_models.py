"""The tables of the real models in README and docs are those that the saved figures give."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import program
import pytest

from tqgguf.config import FIT_CACHES, PRESETS, cache_type


@pytest.fixture(scope="module")
def real() -> Any:
    return program.load("benchmarks/real_models.py")


def test_every_table_is_what_the_saved_figures_give(real: Any) -> None:
    tables = 0
    for name in real.PAGES:
        text = (program.REPOSITORY / name).read_text(encoding="utf-8")
        assert real.with_tables(text) == text, f"{name}: run benchmarks/real_models.py tables"
        tables += text.count("<!-- table ")
    assert tables >= 4


def test_figures_are_saved_with_their_command_and_machine(real: Any) -> None:
    for part in real.PARTS:
        if (real.HERE / "results" / f"{'' if part == 'calibration' else 'real_'}{part}.json").exists():
            saved = real.results(part)
            assert re.match(r"python benchmarks/(\w+/)?\w+\.py", saved["command"]) and saved["machine"]["cpu"]


def test_an_unknown_table_is_an_error(real: Any) -> None:
    with pytest.raises(KeyError, match="no table 'prices'"):
        real.with_tables("<!-- table prices -->\n<!-- end -->")


def test_a_changed_figure_is_noticed(real: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    page = "<!-- table quality -->\n\nold\n\n<!-- end -->\n"
    kld = {"mean": 0.05, "median": 0.01, "p99": 0.5, "p999": 1.25}
    rows = [
        {"type": "f16", "bits": 16, "perplexity": 20.0, "kld": kld, "same_top": 1},
        {"type": "pqt4", "bits": 4.5, "perplexity": 20.25, "kld": kld, "same_top": 0.905},
    ]
    run = {"model": "M", "text": "prose", "n_ctx": 2048, "n_scored": 1023, "rows": rows}
    monkeypatch.setattr(real, "results", lambda part: {"runs": [run]})
    new = real.with_tables(page)
    assert "| pqt4 | 4.50 | .0500 | .0100 | .500 | 1.25 | 90.5 % | 20.25 |" in new
    assert real.with_tables(new) == new


def test_what_fit_shows_is_what_was_measured(real: Any) -> None:
    saved = json.loads(real.MEASURED.read_text(encoding="utf-8"))
    assert saved == real.measured_quality(), "run benchmarks/real_models.py tables"
    # `fit` takes the first cache with which the context fits, as `Llama` has it. Those at the beginning differ from f16
    # by no more than f16 itself does with another number of tokens at once.
    shown = ["/".join(PRESETS.get(name, (name,))) for name in FIT_CACHES]
    labels = [f"{name}+128 calibrated" if cache_type(name.partition("/")[0]).ours else name for name in shown]
    for model in range(len(saved["models"])):
        klds = [saved["median_kld"][kind][model] for kind in labels]
        assert all(after >= 0.9 * before for before, after in itertools.pairwise(klds))
