"""`tqgguf.Llama`: the cache type is honoured, verified and counted, and bad input is refused before anything loads."""

from __future__ import annotations

import contextlib
import pickle
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tqgguf
from tqgguf import CACHE_TYPES
from tqgguf.cache.policy import resolve
from tqgguf.demo import model as demo
from tqgguf.errors import (
    ArgumentError,
    CacheClosedError,
    CacheTypeError,
    ModelFileError,
    ModelNotFoundError,
    StateFileError,
    TqggufError,
)

pytestmark = pytest.mark.model

Model = Callable[..., Path]


def load(path: Path, **options: Any) -> Any:
    return tqgguf.Llama(path, **{"n_ctx": 512, "n_threads": 1, "verbose": False, **options})


def last_logits(model: Any) -> np.ndarray:
    from llama_cpp import llama_get_logits_ith

    return np.ctypeslib.as_array(llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),)).astype(np.float64)


def session_layers(model: Any) -> list[tuple[int, int, int, int]]:
    """(K type, K bytes per token, V type, V bytes per token) of each layer, as llama.cpp writes them in a session.

    Only for a cache of one sequence without sliding windows. Source: state_write_data of llama-kv-cache.cpp.
    """
    import ctypes

    from llama_cpp import llama_state_seq_get_data, llama_state_seq_get_size

    size = llama_state_seq_get_size(model.ctx, 0)
    buffer = (ctypes.c_uint8 * size)()
    assert llama_state_seq_get_data(model.ctx, buffer, size, 0) == size
    data = bytes(buffer)
    n_stream, n = struct.unpack_from("<II", data, 8)  # after magic and sequence
    assert (n_stream, n) == (1, model.n_tokens)
    start = 16 + 12 * n  # position, number of sequences and sequence of each cell
    assert struct.unpack_from("<II", data, start) == (0, len(model.model_info.layers))  # V is not transposed
    start += 8
    sides = []
    for _ in range(2):
        rows = []
        for _ in model.model_info.layers:
            kind, row = struct.unpack_from("<iQ", data, start)
            rows.append((kind, row))
            start += 12 + row * n
        sides.append(rows)
    assert start == size
    return [(*k, *v) for k, v in zip(*sides, strict=True)]


@pytest.mark.parametrize("name", CACHE_TYPES)
def test_every_type_is_stored_as_itself(random_model: Model, name: str) -> None:
    kind = CACHE_TYPES[name]
    model = load(random_model(head_dim=64), cache=name)
    model.eval(list(range(3, 40)))
    info = model.cache_info()
    per_side = kind.row_bytes(2 * 64)
    assert (info.type_k, info.type_v) == (name, name)
    assert info.n_ctx == 512 and info.cells_used == 37 and info.exact
    assert info.bytes_per_token == 2 * 2 * per_side
    assert info.bytes == sum(layer.bytes for layer in info.layers)
    assert info.bytes - info.tail_bytes == 512 * info.bytes_per_token
    assert info.tail_bytes == (2 * 2 * (128 + 4) * (2 * 64 * 2 + 4) if kind.ours else 0)
    assert info.f16_bytes == 512 * 2 * 2 * 2 * 64 * 2
    assert [layer.layer for layer in info.layers] == [0, 1]
    if kind.quantized:  # flash attention is on, so V is stored in rows as K is
        assert session_layers(model) == [(kind.number, per_side, kind.number, per_side)] * 2
    model.close()


@pytest.mark.parametrize(
    "pair",
    [
        ("pqo4", "pqo3"),
        ("pqo3", "f16"),
        ("f16", "pqo3"),
        ("q8_0", "pqo4"),
        ("pqo3", "q4_0"),
        ("pqt4", "pqt3"),
        ("pqt5", "pqt2"),
        ("q8_0", "pqt3"),
    ],
)
def test_k_and_v_apart(random_model: Model, pair: tuple[str, str]) -> None:
    model = load(random_model(head_dim=64), cache=pair)
    model.eval(list(range(3, 40)))
    k, v = (CACHE_TYPES[name] for name in pair)
    assert session_layers(model) == [(k.number, k.row_bytes(128), v.number, v.row_bytes(128))] * 2
    info = model.cache_info()
    assert (info.type_k, info.type_v) == pair
    assert info.bytes - info.tail_bytes == 512 * 2 * (k.row_bytes(128) + v.row_bytes(128))
    assert info.tail_bytes == (k.ours + v.ours) * 2 * (128 + 4) * (2 * 64 * 2 + 4)
    model.close()


@pytest.mark.parametrize("shape", [{"head_dim": 32}, {"head_dim": 96}, {"head_dim": 128, "n_head": 8, "n_head_kv": 1}])
def test_logits_stay_near_those_of_f16(random_model: Model, shape: dict[str, int]) -> None:
    # Random weights amplify errors. Measured here: pqo3 .25 to .29, pqo4 .125 to .14, q4_0 .14 to .18; noise gives 1.4.
    tokens = [3 + (i * 37) % 250 for i in range(200)]
    logits = {}
    for cache in ("f16", "pqo3", "pqo4", "pqt3", "pqt4", "pqt2", "pqt5"):
        model = load(random_model(**shape), cache=cache, flash_attn=True)
        model.eval(tokens[:150])
        rows = []
        for token in tokens[150:]:
            model.eval([token])
            rows.append(last_logits(model))
        logits[cache] = np.array(rows)
        model.close()
    for name, low, high in (("pqo3", 0.1, 0.35), ("pqo4", 0.05, 0.17)):
        error = np.linalg.norm(logits[name] - logits["f16"]) / np.linalg.norm(logits["f16"])
        assert low < error < high, name


def test_prefill_in_pieces_equals_one_prefill_nearly(random_model: Model) -> None:
    tokens = [3 + (i * 91) % 250 for i in range(300)]
    logits = []
    for n_batch in (512, 32):
        model = load(random_model(), cache="pqo3", n_batch=n_batch)
        model.eval(tokens)
        logits.append(last_logits(model))
        model.close()
    assert np.linalg.norm(logits[0] - logits[1]) < 0.1 * np.linalg.norm(logits[0])


def test_reset_and_saved_state(random_model: Model) -> None:
    # A state has no tail: with one, the logits after loading would be those of blocks alone.
    model = load(random_model(), cache="pqo4", tail=0, flash_attn=True)
    model.eval(list(range(3, 60)))
    state = model.save_state()
    model.eval([7])
    expected = last_logits(model)
    model.reset()
    assert model.cache_info().cells_used == 0
    model.load_state(state)
    assert model.cache_info().cells_used == 57
    model.eval([7])
    np.testing.assert_array_equal(last_logits(model), expected)
    model.close()


def test_stock_interface_is_kept(random_model: Model) -> None:
    import llama_cpp

    model = load(random_model())
    assert isinstance(model, llama_cpp.Llama)
    assert model.cache_info().type_k == "pqo3"
    assert model("a", max_tokens=3, logit_bias={model.token_eos(): -100.0})["choices"][0]["finish_reason"] == "length"
    model.close()


def test_a_pickled_model_loads_again_with_its_cache(random_model: Model) -> None:
    model = load(random_model(), cache=("pqo4", "pqo3"))
    again = pickle.loads(pickle.dumps(model))
    assert (again.cache_info().type_k, again.cache_info().type_v) == ("pqo4", "pqo3")
    again.close()
    model.close()


def test_flash_attention_is_required(random_model: Model) -> None:
    path = random_model()
    for cache in ("pqo3", "q8_0", ("f16", "q4_0"), ("pqo4", "f16")):
        with pytest.raises(ArgumentError, match="flash_attn=False"):
            load(path, cache=cache, flash_attn=False)
    load(path, cache=("q8_0", "f16"), flash_attn=False).close()


def test_type_numbers_are_refused(random_model: Model) -> None:
    for name in ("type_k", "type_v"):
        with pytest.raises(ArgumentError, match=f"{name} is set by cache"):
            load(random_model(), **{name: 8})


def test_an_unknown_type_lists_the_valid_ones(random_model: Model) -> None:
    with pytest.raises(ArgumentError, match=r"q8_0.*pqo3"):
        load(random_model(), cache="pqo5")


@pytest.mark.parametrize("cache", ["pqo3", "pqo4", "pqt3", "q8_0", "q4_0", "iq4_nl", ("f16", "pqo3"), ("q5_1", "f16")])
def test_a_head_size_without_whole_blocks(random_model: Model, cache: Any) -> None:
    path = random_model(head_dim=80)
    with pytest.raises(CacheTypeError, match=r"layer 0: head_dim of [KV] is 80, not divisible by 32"):
        load(path, cache=cache)
    load(path, cache="f16").close()


def test_files_that_are_no_models(tmp_path: Path, random_model: Model) -> None:
    with pytest.raises(ModelNotFoundError, match="missing"):
        load(tmp_path / "missing.gguf")
    with pytest.raises(ModelNotFoundError, match="not a file"):
        load(tmp_path)
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\3\4" + bytes(1000))
    with pytest.raises(ModelFileError, match="not a GGUF file"):
        load(other)
    whole = random_model().read_bytes()
    cut = tmp_path / "cut.gguf"
    for n in (0, 3, 10, 100, 5000, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:n])
        with pytest.raises(ModelFileError, match=r"truncated|not a GGUF|cannot read"):
            load(cut)


def test_what_llama_cpp_says_is_passed_on(tmp_path: Path, random_model: Model) -> None:
    # A header that is right in itself, of an architecture llama.cpp has never heard of.
    data = random_model().read_bytes()
    path = tmp_path / "strange.gguf"
    path.write_bytes(data.replace(b"llama", b"lhama"))
    with pytest.raises(TqggufError, match="lhama"):
        load(path)


@pytest.mark.skipif(shutil.which("localedef") is None, reason="localedef is not installed")
def test_a_locale_with_a_decimal_comma_changes_nothing(python: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "locales"
    folder.mkdir()
    made = subprocess.run(["localedef", "-i", "de_DE", "-f", "UTF-8", folder / "de_DE.UTF-8"], capture_output=True)
    if not (folder / "de_DE.UTF-8").exists():
        pytest.skip(f"localedef made no locale: {made.stderr.decode()}")
    code = """
import locale, sys
import tqgguf
from tqgguf.demo import model as demo
locale.setlocale(locale.LC_ALL, sys.argv[1])
print(locale.localeconv()["decimal_point"], file=sys.stderr)
model = tqgguf.Llama(demo.MODEL_PATH, cache=("pqo4", "q8_0"), n_ctx=2048, n_threads=1, verbose=False)
print(model.cache_info(), model("The capital of France is", max_tokens=3)["choices"][0]["text"])
print(tqgguf.fit(demo.MODEL_PATH, memory=2**30).rows)
"""
    plain, comma = (python("-c", code, name, env={"LOCPATH": str(folder)}) for name in ("C", "de_DE.UTF-8"))
    assert (plain.stderr, comma.stderr) == (".\n", ",\n")
    assert plain.stdout == comma.stdout and "type_k='pqo4'" in comma.stdout


def test_more_than_the_machine_has_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from tqgguf import _machine
    from tqgguf.model import options as model

    assert 2**28 < _machine.machine_memory() < 2**50
    cells = resolve("pqo3", 4).bytes(tqgguf.read_model_info(demo.MODEL_PATH), 512, 0)
    monkeypatch.setattr(model, "machine_memory", lambda: cells - 1)
    said = f"cache of 512 tokens of demo.gguf takes {cells:,} bytes, this process may use {cells - 1:,}: take a shorter"
    with pytest.raises(tqgguf.OutOfMemoryError, match=said):
        load(demo.MODEL_PATH, cache="pqo3")
    monkeypatch.setattr(model, "machine_memory", lambda: cells)
    load(demo.MODEL_PATH, cache="pqo3").close()


def test_too_large_a_context_is_a_memory_error(python: Callable[..., Any], random_model: Model) -> None:
    code = (
        "import resource, sys, tqgguf\n"
        "resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, -1))\n"
        "try: tqgguf.Llama(sys.argv[1], n_ctx=2**24, n_threads=1, verbose=False)\n"
        "except tqgguf.OutOfMemoryError as error: print('good', error)\n"
    )
    done = python("-c", code, str(random_model()))
    assert done.stdout.startswith("good"), done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cach": "q8_0"}, "no option 'cach'; did you mean 'cache'"),
        ({"n_context": 512}, "no option 'n_context'"),
        ({"n_ctx": 2**32 + 300}, "n_ctx is 4294967596, must be an integer between 0 and 2147483647"),
        ({"n_ctx": 1.5}, "n_ctx is 1.5"),
        ({"n_batch": 0}, "n_batch is 0"),
        ({"n_ubatch": -1}, "n_ubatch is -1"),
        ({"n_threads": 100_000}, "n_threads is 100000, must be an integer between 1 and 512"),
        ({"seed": -5}, "seed is -5"),
        ({"lora_path": "nowhere.gguf"}, "lora_path nowhere.gguf"),
    ],
)
def test_options_that_llama_cpp_would_swallow_or_wrap(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ArgumentError, ModelNotFoundError), match=message):
        load(demo.MODEL_PATH, **options)


def test_a_path_that_is_none() -> None:
    for path in (None, 3, b"model.gguf"):
        with pytest.raises(ArgumentError, match="model_path must be a path"):
            tqgguf.Llama(path)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        ("root ::= broken (", "must be GBNF"),
        ('x ::= "a"', "have a rule 'root'"),
        ("root ::= x", "name no rule that is not there"),
        ('root ::= root root | "a"', "begins with itself"),
        ("root ::= " + "(" * 2001 + '"a"' + ")" * 2001, "2,001 brackets within each other, at most 2,000"),
        ('root ::= "' + "a" * 2**18 + '"', "262,155 bytes, at most 262,144"),
    ],
)
def test_a_grammar_that_would_end_the_process(grammar: str, said: str) -> None:
    from llama_cpp import LlamaGrammar

    model = load(demo.MODEL_PATH)
    with pytest.raises(ArgumentError, match=said):
        model.create_completion("x", max_tokens=2, grammar=LlamaGrammar.from_string(grammar))
    brackets = 'root ::= "' + "(" * 300 + '" | [' + "(" * 300 + '] "yes" # ' + "(" * 300
    reply = model.create_completion("x", max_tokens=2, temperature=0, grammar=LlamaGrammar.from_string(brackets))
    assert reply["choices"][0]["text"].startswith("(")
    model.close()


def test_libraries_are_not_looked_at_for_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes 4 ms, several times as long as the demo model takes for a token."""
    from llama_cpp import LlamaGrammar

    model = load(demo.MODEL_PATH)
    looked: list[None] = []
    monkeypatch.setattr("tqgguf._native.bindings.verify_libraries", lambda: looked.append(None))
    grammar = LlamaGrammar.from_string('root ::= "a" "b" "c"')
    assert model.create_completion("x", max_tokens=4, grammar=grammar)["choices"][0]["text"] == "abc"
    model.create_chat_completion([{"role": "user", "content": "What is the capital of Spain?"}], max_tokens=8)
    assert looked == []
    model.close()


@pytest.mark.parametrize("token", [-1, 1280, 2**31 - 1])
def test_a_token_beyond_the_vocabulary(token: int) -> None:
    model = load(demo.MODEL_PATH)
    with pytest.raises(ArgumentError, match=f"{token} is no token of this model, whose tokens are 0 to 1,279"):
        model.detokenize([5, token])
    assert model.detokenize(model.tokenize(b" Paris", add_bos=False)).strip() == b"Paris"
    model.close()


def test_an_answer_does_not_go_on_in_the_cache_of_another() -> None:
    options = {"temperature": 0, "max_tokens": 8}
    with contextlib.closing(load(demo.MODEL_PATH)) as model:
        alone = model("The capital of Peru is", **options)["choices"][0]["text"]
        first = model("The capital of France is", stream=True, **options)
        next(first)
        assert model("The capital of Peru is", **options)["choices"][0]["text"] == alone
        with pytest.raises(ArgumentError, match="another one of the same model has begun"):
            list(first)
        assert model("The capital of Peru is", **options)["choices"][0]["text"] == alone


def test_a_closed_model_says_so() -> None:
    """llama-cpp-python goes on with what has been freed, which ends the process."""
    model = load(demo.MODEL_PATH)
    state = model.save_state()
    stream = model.create_completion("The capital", max_tokens=9, temperature=0, stream=True)
    next(stream)
    model.close()
    model.close()
    uses: list[Callable[[], Any]] = [model.cache_info, model.reset, model.n_ctx, model.n_embd, model.token_eos]
    uses += [model.save_state, lambda: model.load_state(state), lambda: model.tokenize(b"a"), lambda: model("a")]
    uses += [lambda: next(stream), lambda: model.detokenize([5]), lambda: model.eval([5])]
    for use in uses:
        with pytest.raises(CacheClosedError, match="was closed"):
            use()


def test_states_of_other_contexts() -> None:
    """The stock class counts the tokens of a state that was refused, and answers without them."""
    text, other = "The capital of France is", "Ada has a red bird. " * 20

    def answer(model: Any, prompt: str) -> str:
        return str(model.create_completion(prompt, max_tokens=8, temperature=0)["choices"][0]["text"])

    model, short, pqo4 = (
        load(demo.MODEL_PATH, n_ctx=n, cache=c) for n, c in ((512, "pqo3"), (256, "pqo3"), (512, "pqo4"))
    )
    expected = answer(model, text), answer(model, other)
    for source, prompt in ((pqo4, other), (pqo4, text)):
        source.reset()
        source.eval(source.tokenize(prompt.encode()))
        with pytest.raises(StateFileError, match=r"another cache type of K.*the model is as it was"):
            model.load_state(source.save_state())
        assert (answer(model, text), answer(model, other)) == expected
    short.eval(short.tokenize(text.encode()))
    model.load_state(short.save_state())
    assert model.n_tokens == short.n_tokens
    assert (answer(model, text), answer(model, other)) == expected
    model.eval([5] * 300)
    with pytest.raises(StateFileError, match=r"holds [0-9]{3} tokens, the context has room for 256"):
        short.load_state(model.save_state())
    assert answer(short, text) == expected[0]


def test_a_grammar_whose_tokens_are_forbidden() -> None:
    """llama.cpp would take another token, and end the process."""
    from llama_cpp import LlamaGrammar

    model = load(demo.MODEL_PATH)
    grammar = LlamaGrammar.from_string('root ::= "yes"')
    reply = model.create_completion("x", max_tokens=9, grammar=grammar)
    assert reply["choices"][0]["text"] == "yes"
    with pytest.raises(ArgumentError, match="the grammar allows no token here"):
        model.create_completion("x", max_tokens=9, grammar=grammar, logit_bias={model.token_eos(): -np.inf})
    assert model.create_completion("x", max_tokens=9, grammar=grammar)["choices"][0]["text"] == "yes"


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "string", "minLength": 2 * 10**9}, "repeats a part 2,000,000,000 times, at most 10,000"),
        ({"type": "string", "pattern": "^a{4000000000}$"}, "repeats a part 4,000,000,000 times"),
        ({"$ref": "#/nowhere"}, "nowhere not in"),
        ({"$ref": "https://localhost/schema.json"}, "not allowed"),
    ],
)
def test_a_schema_that_is_not_read(schema: Any, said: str) -> None:
    """llama-cpp-python writes repetitions out, and takes any JSON in the place of a schema that it cannot read."""
    model = load(demo.MODEL_PATH)
    messages = [{"role": "user", "content": "Hello"}]
    with pytest.raises(ArgumentError, match=said):
        model.create_chat_completion(messages, response_format={"type": "json_object", "schema": schema})
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    with pytest.raises(ArgumentError, match=said):
        model.create_chat_completion(
            messages, tools=[tool], tool_choice={"type": "function", "function": {"name": "f"}}
        )
    form = {"type": "json_object", "schema": {"type": "string", "maxLength": 500}}
    reply = model.create_chat_completion(messages, response_format=form, max_tokens=3)
    assert reply["choices"][0]["message"]["content"].startswith('"')


@pytest.mark.parametrize("cut_by", ["tekken", "gpt-4o", "llama-bpe"])
def test_a_long_word(tmp_path: Path, cut_by: str) -> None:
    """llama.cpp cuts texts with std::regex for the first two, which overran the stack at 26,000 characters."""
    import gguf

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the others follow from 256 on, as in GPT-2
    others = iter(range(256, 512))
    words = [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "llama")
    for key in ("block_count", "attention.head_count", "attention.head_count_kv"):
        writer.add_uint32(f"llama.{key}", 1)
    for key in ("context_length", "embedding_length", "feed_forward_length", "rope.dimension_count"):
        writer.add_uint32(f"llama.{key}", 64)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut_by)
    writer.add_token_list([*words, "<s>", "</s>"])
    writer.add_token_types([1] * 256 + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = load(tmp_path / "model.gguf", vocab_only=True)
    for text in (b"a" * 40_000, b" " * 40_000, b"word " * 5_000, "\u4e2d".encode() * 15_000):
        assert model.detokenize(model.tokenize(text, add_bos=False)) == text
    with pytest.raises(ArgumentError, match="a word, or white space, of 1,048,577 bytes, at most 1,048,576"):
        model.tokenize(b"a" * (2**20 + 1))


def test_a_chat_template_that_is_none(tmp_path: Path) -> None:
    """llama-cpp-python compiles templates when a model is loaded: one that cannot be is an error of ours."""
    data = demo.MODEL_PATH.read_bytes()
    assert data.count(b"{% endfor %}") == 1
    path = tmp_path / "model.gguf"
    path.write_bytes(data.replace(b"{% endfor %}", b"{% endfxr %}"))
    with pytest.raises(ModelFileError, match=r"a chat template that Jinja cannot read: .* unknown tag 'endfxr'"):
        tqgguf.Llama(path, n_ctx=256, verbose=False)


ABORT = """
import ctypes, sys, threading
import tqgguf
from tqgguf.demo import model as demo
from tqgguf._native import library_path
ggml = ctypes.CDLL(str(library_path("ggml-base")))
def load(**options):
    tqgguf.Llama(demo.MODEL_PATH, n_ctx=256, n_threads=1, verbose=False, **options).close()
load()
ggml.ggml_set_abort_callback.restype = ctypes.c_void_p
assert ggml.ggml_set_abort_callback(None) is None  # it is as it was
def end():
    ggml.ggml_abort(b"llama.cpp", 7, b"GGML_ASSERT(%s) failed", b"n > 0")
def progress(*_):
    if sys.argv[1] == "here":
        end()
    thread = threading.Thread(target=end)
    thread.start()
    thread.join()
load(progress=progress)
"""


@pytest.mark.parametrize("thread", ["here", "another"])
def test_llama_cpp_does_not_end_the_process_without_a_word(python: Callable[..., Any], thread: str) -> None:
    done = python("-c", ABORT, thread)
    assert done.returncode == -signal.SIGABRT
    assert done.stderr == "\ntqgguf: error: llama.cpp ended this process: llama.cpp:7: GGML_ASSERT(n > 0) failed\n"
