"""`fit` and what it plans, against what llama.cpp really allocates: its own log, read while it does."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tqgguf
from tqgguf import CACHE_TYPES
from tqgguf._native import import_llama_cpp
from tqgguf._native.settings import tail_set
from tqgguf.cache.policy import resolve
from tqgguf.config import FIT_CACHES, PRESETS
from tqgguf.demo import model as demo
from tqgguf.diagnostics.fit import FIRST_LOOK, _longest, fit
from tqgguf.diagnostics.plan import ContextPlan, Setup, planned_model
from tqgguf.errors import ArgumentError, CacheTypeError, ModelFileError, OutOfMemoryError, TqggufError
from tqgguf.model.context import captured_log

pytestmark = pytest.mark.model

Model = Callable[..., Path]
MIB = 2**20

# What the generator makes; "mamba" has no KV cache, "jamba" and "falcon-h1" are hybrid, "deepseek2" is MLA, "gpt-oss"
# has sinks, experts and windows; gemma2, gemma3 and olmo2 have windows in other layers.
NAMES = (
    *("llama", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "phi3", "glm4"),
    *("falcon", "gpt2", "gpt-oss", "deepseek2", "mamba", "jamba", "falcon-h1"),
)

llama_cpp: Any = import_llama_cpp()


class Allocated:
    """The buffers that llama.cpp named while it allocated them, in MiB with two digits each."""

    def __init__(self, log: list[tuple[int, str]]) -> None:
        self.sizes: dict[str, list[float]] = {"model": [], "KV": [], "RS": [], "compute": [], "output": []}
        for _, text in log:
            if m := re.search(r"(model|KV|RS|compute|output) buffer size = +([\d.]+) MiB", text):
                self.sizes[m[1]].append(float(m[2]))

    def mib(self, kind: str) -> float:
        return sum(self.sizes[kind])

    @property
    def bytes(self) -> float:
        return MIB * sum(map(self.mib, self.sizes))

    def check(self, weights: int, plan: ContextPlan) -> None:
        # A buffer's text is rounded to 0.01 MiB, and its tensors begin at multiples of 32 to 128 bytes.
        kv = self.mib("KV") - plan.cache / MIB
        assert abs(kv) <= 0.0055 * len(self.sizes["KV"]) + 0.003
        assert abs(self.mib("compute") + self.mib("output") - plan.compute / MIB) < 0.011
        assert abs(self.mib("RS") - plan.state / MIB) < 0.011
        assert self.mib("model") == pytest.approx(weights / MIB, rel=0.01, abs=0.02)
        assert self.bytes == pytest.approx(weights + plan.bytes, rel=0.03)


def allocate(path: Path, cache: str, n_ctx: int, setup: Setup) -> Allocated:
    """Loads a model and makes a context for several sequences, which `Llama` cannot."""
    params = llama_cpp.llama_context_default_params()
    kind = CACHE_TYPES[cache]
    params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, 512, 512
    params.n_seq_max, params.kv_unified, params.swa_full = setup.n_seq, setup.unified, setup.swa_full
    params.type_k = params.type_v = kind.number
    params.flash_attn_type = int(kind.quantized)
    params.n_threads = params.n_threads_batch = 1
    with captured_log(quiet=True) as log, tail_set(setup.tail):
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        context = llama_cpp.llama_init_from_model(model, params)
        assert context, log[-3:]
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
    return Allocated(log)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "setup",
    [
        Setup(tail=128),
        Setup(tail=128, swa_full=False),
        Setup(n_seq=3, swa_full=False),
        Setup(tail=64, n_seq=3, unified=True, swa_full=False),
    ],
    ids=["one", "windows", "apart", "together"],
)
def test_a_plan_is_what_llama_cpp_allocates(architecture: Model, name: str, setup: Setup) -> None:
    path = architecture(name)
    with planned_model(path) as model:
        for cache in ("f16", "pqo3", "q8_0") if model.info.layers else ("f16",):
            plan = model.context(resolve(cache, model.info.n_layer), 2000, setup)
            allocate(path, cache, 2000, setup).check(model.weights, plan)


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_is_what_llama_is_given(architecture: Model, name: str) -> None:
    path = architecture(name)
    cache = "f16" if name == "mamba" else "pqo4"
    with planned_model(path) as model:
        plan = model.context(resolve(cache, model.info.n_layer), 1024, Setup(tail=128))
        weights = model.weights
    with captured_log(quiet=True) as log:
        llama = tqgguf.Llama(path, cache=cache, n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False)
        assert llama.cache_info().bytes == plan.cache
        llama.close()
    Allocated(log).check(weights, plan)


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek2", "jamba"])
@pytest.mark.parametrize("cache", ["f16", "q8_0", "pqt3"])
def test_the_longest_context_loads_and_the_next_would_not_fit(architecture: Model, name: str, cache: str) -> None:
    path = architecture(name)
    with planned_model(path) as model:
        policy = resolve(cache, model.info.n_layer)
        budget = model.weights + model.context(policy, 3000, Setup(tail=128)).bytes
        (row,) = fit(path, budget, caches=[cache]).rows
        assert row.plan and 2816 <= row.n_ctx < 8192 and row.n_ctx % 256 == 0
        assert row.memory == model.weights + row.plan.bytes <= budget
        assert model.weights + model.context(policy, row.n_ctx + 256, Setup(tail=128)).bytes > budget
    with captured_log(quiet=True) as log:
        llama = tqgguf.Llama(path, cache=cache, n_ctx=row.n_ctx, n_threads=1, n_threads_batch=1, verbose=False)
        llama.close()
    assert Allocated(log).bytes == pytest.approx(row.memory, rel=0.03)


def test_what_was_measured_of_each_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def klds(caches: list[Any], **options: Any) -> list[Any]:
        return [row.kld for row in fit(demo.MODEL_PATH, 2**30, caches=caches, **options).rows]

    found = fit(demo.MODEL_PATH, 2**30)
    assert (found.measured.text, found.measured.n_ctx, len(found.measured.models)) == ("prose", 2048, 2)
    plain = klds(["f16", "pqt3", ("pqt4", "pqt3"), {"default": "pqt3", "layers": {"0": "pqt4"}}])
    assert plain[0] == (0.0, 0.0) and plain[3] is None and all(kld and len(kld) == 2 for kld in plain[1:3])
    assert klds([("pqt5", "pqt2"), ("pqt2", "pqo3")]) == [None, None]  # no table has them
    (bare,), (stock,) = klds(["pqt3"], tail=0), klds(["q4_0"])
    monkeypatch.setenv("TQGGUF_CALIBRATION", "auto")
    (calibrated,) = klds(["pqt3"])
    for i in range(2):
        assert calibrated[i] < plain[1][i] < bare[i] and calibrated[i] < stock[i]


def test_a_calibrated_policy_can_be_planned(tmp_path: Path) -> None:
    calibration = tqgguf.calibrate(demo.MODEL_PATH, n_tokens=64)
    calibration.applied(resolve("pqt3", 4), tqgguf.read_model_info(demo.MODEL_PATH)).write(tmp_path / "policy.gguf")
    mine, plain = fit(demo.MODEL_PATH, 2**30, caches=[str(tmp_path / "policy.gguf"), "pqt3"]).rows
    assert mine.n_ctx == plain.n_ctx == 2048 and mine.plan and plain.plan and mine.plan.cache == plain.plan.cache


def test_the_first_in_order_that_is_long_enough_is_recommended() -> None:
    plenty = fit(demo.MODEL_PATH, 2**30)
    assert plenty.recommended == plenty.rows[0] and plenty.rows[0].cache == "f16"
    assert [row.cache for row in plenty.rows] == ["/".join(PRESETS.get(name, (name,))) for name in FIT_CACHES]
    assert all(row.n_ctx == plenty.n_ctx == 2048 for row in plenty.rows)
    # Without flash attention f16 needs large compute buffers; where pqt4 just fits, f16 gets less than half.
    enough = next(row.memory for row in plenty.rows if row.cache == "pqt4")
    some = fit(demo.MODEL_PATH, enough)
    assert some.recommended and some.recommended.cache == "pqt4" and some.recommended.n_ctx == 2048
    assert 0 < some.rows[0].n_ctx < 1024
    assert fit(demo.MODEL_PATH, enough - 1).recommended != some.recommended
    few = fit(demo.MODEL_PATH, enough, n_seq=8)
    assert few.recommended == max(few.rows, key=lambda row: row.n_ctx) and few.recommended.n_ctx < few.n_ctx == 8 * 2048
    assert few.reason.endswith("the longest context")
    none = fit(demo.MODEL_PATH, int(6.2 * MIB))
    assert none.recommended is None and all(row.n_ctx == 0 for row in none.rows)


@pytest.mark.parametrize("budget", [0, 10**5, 3 * 10**7, 10**9, 8 * 10**9])
@pytest.mark.parametrize(
    "cost",
    [
        lambda n: 10**5 + 1472 * n,
        lambda n: max(3 * 10**8, 1024 * n) + 448 * n,  # logits, then masks
        lambda n: round(1472 * n / 10**4) * 10**4,  # as llama.cpp prints it
        lambda n: 100 * n + n * n // 1000,  # nothing grows so, but it ends
    ],
)
def test_the_search_finds_the_longest_and_looks_at_nothing_far_beyond(cost: Callable[[int], int], budget: int) -> None:
    looked: list[int] = []

    def over(n: int) -> int:
        looked.append(n)
        return cost(n) - budget

    n = _longest(2 * 10**9, over)
    assert n % 256 == 0 and cost(n + 256) > budget and (n == 0 or cost(n) <= budget)
    assert max(looked) <= max(FIRST_LOOK, 4 * n) and len(looked) <= 16
    for most in (1, 300, 2048, n // 2 or 1):
        assert _longest(most, over) == (most if cost(most) <= budget else n)


def test_a_shorter_context_needs_less() -> None:
    short = fit(demo.MODEL_PATH, 11 * MIB, n_ctx=256)
    assert short.recommended and short.recommended.cache == "f16" and short.recommended.n_ctx == 256


def test_a_context_longer_than_the_model_was_trained_for_is_had_if_asked_for() -> None:
    row = fit(demo.MODEL_PATH, 2**30, n_ctx=5000, caches=["pqo3"]).recommended
    assert row and row.n_ctx == 5000 and row.plan
    llama = tqgguf.Llama(demo.MODEL_PATH, cache="pqo3", n_ctx=5000, n_threads=1, verbose=False)
    assert llama.cache_info().bytes == row.plan.cache
    llama.close()


def test_cells_that_this_machine_cannot_list(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"memory": 2**40, "caches": ["pqo3"], "n_ctx": 300_000}
    monkeypatch.setattr("tqgguf.diagnostics.plan.machine_memory", lambda: 300_000 * 52)
    assert fit(demo.MODEL_PATH, **options).rows[0].n_ctx == 300_000
    monkeypatch.setattr("tqgguf.diagnostics.plan.machine_memory", lambda: 300_000 * 52 - 1)
    with pytest.raises(OutOfMemoryError, match=r"300,000 tokens of demo\.gguf: .* lists its cells, 52 bytes"):
        fit(demo.MODEL_PATH, **options)


def test_layers_go_to_video_memory_until_it_is_full(architecture: Model) -> None:
    path = architecture("llama")
    (without,) = fit(path, 2**30, caches=["f16"]).rows
    assert without.plan and without.vram == 0
    before = 0
    for mib in (100, 105, 200):
        (row,) = fit(path, 2**30, vram=mib * MIB, caches=["f16"]).rows
        assert row.plan and row.n_gpu_layers >= before and row.vram <= mib * MIB
        assert row.memory == without.memory - (row.vram - row.plan.compute if row.vram else 0)
        before = row.n_gpu_layers
    assert before == 5  # four layers and the output
    tied = architecture("gemma2")
    (inside,), (beside,) = (fit(tied, 2**30, vram=vram, caches=["f16"]).rows for vram in (0, 2**30))
    assert inside.plan and beside.n_gpu_layers == 5
    # All but the embedding has moved, and the embedding is there twice.
    assert beside.memory == inside.plan.compute + 260 * 128 * 4
    assert beside.vram == inside.memory


def test_a_model_that_cannot_have_a_type(random_model: Model, architecture: Model) -> None:
    rows = fit(random_model(head_dim=80), 2**30).rows
    assert rows[0].n_ctx and "head_dim of K is 80" in str(rows[-1].obstacle) and rows[-1].plan is None
    rows = fit(architecture("deepseek2"), 2**30, caches=[("pqo4", "pqo3"), "pqo3"]).rows
    assert "MLA" in str(rows[0].obstacle) and rows[1].n_ctx
    with planned_model(architecture("mamba")) as model, pytest.raises(CacheTypeError, match="no KV cache"):
        model.context(resolve("pqo3", model.info.n_layer), 512, Setup())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"memory": 0}, "memory is 0"),
        ({"memory": 1000}, "alone take 6,038,528 bytes, more than the 1,000"),
        ({"memory": 2**40, "n_seq": 0}, "n_seq is 0"),
        ({"memory": 2**40, "n_seq": 257}, "n_seq is 257"),
        ({"memory": 2**40, "n_ctx": 2, "n_seq": 4}, "n_ctx is 2, must be an integer between 4"),
        ({"memory": 2**40, "caches": "pqo3"}, "caches is 'pqo3', must be a list"),
        ({"memory": 2**40, "tail": -1}, "tail is -1"),
        ({"memory": 2**40, "vram": -1}, "vram is -1"),
        ({"memory": 2**40, "caches": ["q9"]}, "unknown cache type 'q9'"),
    ],
)
def test_bad_input(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        fit(demo.MODEL_PATH, **options)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(demo.MODEL_PATH.read_bytes()[:5000])
    with pytest.raises(ModelFileError, match="truncated"):
        fit(path, 2**30)
    data = bytearray(demo.MODEL_PATH.read_bytes())
    at = data.index(b"blk.0.attn_norm.weight")
    data[at : at + 5] = b"klb.0"
    path.write_bytes(data)
    with pytest.raises(TqggufError, match=r"could not load.*attn_norm"):
        fit(path, 2**30)
