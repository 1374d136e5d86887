"""Train the demo model `tqgguf/demo/demo.gguf` from scratch, on one CPU core, in about twenty minutes.

    pip install torch numpy gguf sentencepiece
    PYTHONPATH=. python examples/train_demo_model.py --out demo.gguf

A transformer of architecture llama learns two skills. It learns 64 capital cities, which are in its weights. And it
recalls facts from its prompt, which it must read from its KV cache. A compressed cache can damage recall, so training
uses prompts of up to 240 facts. `docs/demo-model.md` has the figures of the shipped file.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name every PyTorch reader knows
from demo_model_export import Shape, train_tokenizer, write_gguf
from torch import Tensor, nn

from tqgguf.demo import model as demo

# --- the model: llama, with the arithmetic and the tensor names of llama.cpp ------------------------------------------


class Attention(nn.Module):
    """Causal grouped-query attention with rotary position embedding of neighbouring pairs."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q = nn.Linear(shape.n_embd, shape.n_head * shape.head_dim, bias=False)
        self.k = nn.Linear(shape.n_embd, shape.n_head_kv * shape.head_dim, bias=False)
        self.v = nn.Linear(shape.n_embd, shape.n_head_kv * shape.head_dim, bias=False)
        self.output = nn.Linear(shape.n_head * shape.head_dim, shape.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x, result: (n_seq, n_tokens, n_embd); cos, sin: (n_tokens, head_dim / 2)."""
        n_seq, n_tokens, _ = x.shape
        heads = (n_seq, n_tokens, -1, self.shape.head_dim)
        q, k, v = (project(x).view(heads).transpose(1, 2) for project in (self.q, self.k, self.v))
        group = self.shape.n_head // self.shape.n_head_kv
        k = rotate(k, cos, sin).repeat_interleave(group, dim=1)
        v = v.repeat_interleave(group, dim=1)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v, is_causal=True)
        return self.output(y.transpose(1, 2).reshape(n_seq, n_tokens, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of x (n_seq, n_head, n_tokens, head_dim): llama.cpp's `LLAMA_ROPE_TYPE_NORM`."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


class Block(nn.Module):
    """Attention and a SwiGLU feed-forward, each behind an RMS norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(shape.n_embd, eps=shape.rms_eps)
        self.attn = Attention(shape)
        self.ffn_norm = nn.RMSNorm(shape.n_embd, eps=shape.rms_eps)
        self.ffn_gate = nn.Linear(shape.n_embd, shape.n_ff, bias=False)
        self.ffn_up = nn.Linear(shape.n_embd, shape.n_ff, bias=False)
        self.ffn_down = nn.Linear(shape.n_ff, shape.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x, result: (n_seq, n_tokens, n_embd)."""
        x = x + self.attn(self.attn_norm(x), cos, sin)
        h = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))


class Llama(nn.Module):
    """The whole model, initialised with its positional heads."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.n_vocab, shape.n_embd)
        self.blk = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.output_norm = nn.RMSNorm(shape.n_embd, eps=shape.rms_eps)
        self.output = nn.Linear(shape.n_embd, shape.n_vocab, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw the weights, then plant heads in layer 0 that attend one, two, three and four tokens back.

        Recall needs the kind and the name just before a code word. Training finds such heads by itself, but that takes
        longer than all the rest. Queries and keys are constant vectors: they come from embedding dimension 0, which is
        equal for all tokens at the start. With RoPE their product depends only on the distance. Each head's query is
        rotated so that the product peaks at the distance of that head.
        """
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
            if name.endswith(("attn.output.weight", "ffn_down.weight")):
                weight.mul_(EMBD_STD)
        self.token_embd.weight.mul_(EMBD_STD * self.shape.n_embd**0.5)
        self.token_embd.weight[:, 0] = 4 * EMBD_STD
        constant = 4 / math.sqrt(1 + 16 / self.shape.n_embd)  # dimension 0 after the RMS norm

        q, k = self.blk[0].attn.q.weight, self.blk[0].attn.k.weight
        q.mul_(0.1)
        k.mul_(0.1)
        q, k = (weight.view(-1, self.shape.head_dim // 2, 2, self.shape.n_embd) for weight in (q, k))
        k[:, :N_PLANTED, :, 0] = torch.tensor([PLANTED / constant, 0.0])
        for i in range(N_PLANTED):
            theta = self.shape.rope_freq_base ** (-2 * i / self.shape.head_dim)
            for head in range(self.shape.n_head):
                angle = theta * (head + 1)
                q[head, i, :, 0] = PLANTED / constant * torch.tensor([math.cos(angle), -math.sin(angle)])

    def forward(self, tokens: Tensor, wanted: Tensor) -> Tensor:
        """Logits (n_wanted, n_vocab) at the flat positions `wanted` of tokens (n_seq, n_tokens)."""
        angles = torch.outer(
            torch.arange(tokens.shape[1]).float(),
            self.shape.rope_freq_base ** (-torch.arange(0, self.shape.head_dim, 2).float() / self.shape.head_dim),
        )
        cos, sin = angles.cos(), angles.sin()
        x = self.token_embd(tokens)
        for block in self.blk:
            x = block(x, cos, sin)
        return self.output(self.output_norm(x.flatten(0, 1)[wanted]))

    def gguf_weights(self) -> dict[str, Tensor]:
        """Return the parameters under their GGUF names."""
        rename = {"attn.output": "attn_output", "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v"}
        weights = {}
        for name, weight in self.named_parameters():
            for ours, theirs in rename.items():
                name = name.replace(f".{ours}.", f".{theirs}.")
            weights[name] = weight
        return weights


EMBD_STD = 0.25
N_PLANTED, PLANTED = 14, 6.0
"""Number of planted RoPE pairs, fastest first, and their length. One token off the peak the score is about 4 lower."""

# --- the data: dialogues of sentences, with a loss weight for every token ---------------------------------------------


@dataclass
class Dialogue:
    """One training sequence: tokens, and for each token the loss weight of predicting it."""

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, tokens: list[int], weight: float = 0.0) -> None:
        """Append tokens of one weight."""
        self.tokens += tokens
        self.weights += [weight] * len(tokens)


EASY = 0.5
"""Weight of answer tokens that follow from the question; the code word or capital has weight 1."""


class Teacher:
    """Writes dialogues. Tokenizing the sentences one by one gives the tokens of the joined text."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.tokenizer = train_tokenizer()
        self.encode: Callable[[str], list[int]] = functools.lru_cache(maxsize=None)(self.tokenizer.encode)
        self.bos, self.end, self.system, self.user, self.assistant = map(
            self.tokenizer.piece_to_id, ("<s>", "<end>", "<system>", "<user>", "<assistant>")
        )
        self.code_tokens = frozenset(self.tokenizer.encode(word)[0] for word in demo.CODE_WORDS)

    def restate(self, dialogue: Dialogue, sentence: str) -> None:
        """Add a sentence whose code words must be predicted."""
        tokens = self.encode(sentence)
        dialogue.tokens += tokens
        dialogue.weights += [float(token in self.code_tokens) for token in tokens]

    def answer(self, dialogue: Dialogue, sentence: str, n_hard: int) -> None:
        """Close the user turn and add the assistant's. Its last `n_hard` tokens before the full stop have weight 1."""
        tokens = self.encode(sentence)
        dialogue.add([self.end, self.assistant])
        dialogue.add(tokens[: -1 - n_hard], EASY)
        dialogue.add(tokens[-1 - n_hard : -1], 1.0)
        dialogue.add([tokens[-1], self.end], EASY)

    def copying(self, n_words: int) -> Dialogue:
        """Write random words twice. The second time each word can be predicted from the first."""
        words = [self.encode(self.rng.choice(demo.NAMES + demo.CODE_WORDS))[0] for _ in range(n_words)]
        dialogue = Dialogue([self.bos], [0.0])
        dialogue.add(words)
        dialogue.add(words, 1.0)
        return dialogue

    def opening(self, chat: bool) -> Dialogue:
        """Begin a dialogue. One chat in ten has a system message."""
        dialogue = Dialogue([self.bos], [0.0])
        if chat and self.rng.random() < 0.1:
            dialogue.add([self.system, *self.encode("You are a helpful assistant."), self.end])
        return dialogue

    def capitals(self, n_questions: int) -> Dialogue:
        """Write a chat about capitals or, in one case of five, only the statements."""
        chat = self.rng.random() < 0.8
        dialogue = self.opening(chat)
        for country in self.rng.sample(list(demo.CAPITALS), n_questions):
            if chat:
                self.ask_capital(dialogue, country)
            else:
                tokens = self.encode(demo.capital_answer(country))
                n_known = len(self.encode(f"The capital of {country} is"))
                dialogue.add(tokens[:n_known])
                dialogue.add(tokens[n_known:], 1.0)
        return dialogue

    def ask_capital(self, dialogue: Dialogue, country: str) -> None:
        """Add one question and its answer."""
        form = self.rng.randrange(len(demo.CAPITAL_QUESTIONS))
        dialogue.add([self.user, *self.encode(demo.capital_question(country, form))])
        self.answer(dialogue, demo.capital_answer(country), len(self.encode(demo.CAPITALS[country])))

    def recall(self, case: demo.RecallCase, n_questions: int, chat: bool) -> Dialogue:
        """Write facts, then questions about some: in chat turns, or as restatements (fewer tokens per question)."""
        dialogue = self.opening(chat)
        dialogue.add([self.user] * chat + self.tokenizer.encode(case.context))
        for i, fact in enumerate(self.rng.sample(case.facts, n_questions)):
            if not chat:
                self.restate(dialogue, fact.sentence)
                continue
            dialogue.add([self.user] * (i > 0) + self.encode(fact.question))
            self.answer(dialogue, fact.sentence, 1)
            if self.rng.random() < 0.05:
                self.ask_capital(dialogue, self.rng.choice(list(demo.CAPITALS)))
        return dialogue


@dataclass(frozen=True)
class Batch:
    """Padded dialogues, and the positions whose next token must be predicted."""

    tokens: Tensor  # (n_seq, n_tokens)
    wanted: Tensor  # (n_wanted,) flat positions
    targets: Tensor  # (n_wanted,)
    weights: Tensor  # (n_wanted,)


def collate(dialogues: list[Dialogue]) -> Batch:
    """Pad on the right, where causal attention does not read."""
    n_tokens = max(len(dialogue.tokens) for dialogue in dialogues)
    tokens = torch.zeros(len(dialogues), n_tokens, dtype=torch.long)
    weights = torch.zeros(len(dialogues), n_tokens)
    for row, dialogue in enumerate(dialogues):
        tokens[row, : len(dialogue.tokens)] = torch.tensor(dialogue.tokens)
        weights[row, : len(dialogue.tokens)] = torch.tensor(dialogue.weights)
    targets_at = weights.flatten().nonzero().squeeze(1)
    return Batch(tokens, targets_at - 1, tokens.flatten()[targets_at], weights.flatten()[targets_at])


# --- the curriculum: the next stage begins when the current one is passed ---------------------------------------------


@dataclass(frozen=True)
class Stage:
    """What a batch may hold. The first stages have many small steps, in which the model learns to copy."""

    n_facts: int
    n_tokens_per_batch: int
    n_filler: int = 0
    crowded: bool = False
    """Whether many facts differ only in kind. The model learns this late, after it matches names reliably."""
    pass_at: float = 0.9

    @property
    def skill(self) -> str:
        """The skill whose accuracy decides whether the stage is passed."""
        return "recall" if self.n_facts else "copying"


STAGES = (
    Stage(0, 1024),
    Stage(4, 1024, pass_at=0.8),
    Stage(8, 2048, pass_at=0.85),
    Stage(16, 2048, pass_at=0.85),
    Stage(32, 4096, n_filler=4, pass_at=0.85),
    Stage(64, 4096, n_filler=8, pass_at=0.8),
    Stage(140, 4096, n_filler=12, pass_at=0.8),
    Stage(32, 4096, n_filler=4, crowded=True),
    Stage(64, 4096, n_filler=8, crowded=True),
    Stage(240, 4096, n_filler=12, crowded=True, pass_at=2.0),
)


def draw_batch(teacher: Teacher, stage: Stage, capital_share: float) -> tuple[str, Batch]:
    """Write a batch of one kind of dialogue. Returns the name of the kind and the batch."""
    rng = teacher.rng
    draw = rng.random()
    if draw < capital_share:
        return "capitals", collate([teacher.capitals(8) for _ in range(stage.n_tokens_per_batch // 160)])
    if not stage.n_facts or draw < capital_share + 0.05:
        n_words = rng.randint(8, 24)
        return "copying", collate([teacher.copying(n_words) for _ in range(stage.n_tokens_per_batch // (2 * n_words))])
    easier = rng.random() < 0.25
    n_facts = rng.randint(2, stage.n_facts // 2) if easier else rng.randint(stage.n_facts * 3 // 4, stage.n_facts)
    fewest = math.ceil(n_facts / len(demo.KINDS))
    n_names = rng.randint(fewest, min(n_facts, len(demo.NAMES)) if stage.crowded else len(demo.NAMES))
    n_filler = rng.randint(0, stage.n_filler)
    chat = rng.random() < 0.5
    n_per_fact, n_per_question, n_per_filler = 7, 18 if chat else 7, 9
    n_context = n_per_fact * n_facts + n_per_filler * n_filler
    n_room = (Shape.n_ctx - 100 - n_context) // n_per_question
    n_questions = rng.randint(1, min(n_facts, n_room, 30 if chat else 64))
    n_seq = max(1, stage.n_tokens_per_batch // (n_context + n_per_question * n_questions))
    cases = [demo.recall_prompt(rng.getrandbits(48), n_facts, n_names=n_names, n_filler=n_filler) for _ in range(n_seq)]
    return "easier recall" if easier else "recall", collate([teacher.recall(c, n_questions, chat) for c in cases])


# --- training and evaluation ------------------------------------------------------------------------------------------


@torch.no_grad()
def fully_right(model: Llama, teacher: Teacher, chats: list[tuple[str, str]]) -> float:
    """Share of (question, answer) chats that greedy decoding answers: every answer token has the highest logit."""
    right = 0
    for start in range(0, len(chats), 16):
        dialogues = []
        for question, answer in chats[start : start + 16]:
            dialogue = Dialogue([teacher.bos, teacher.user, *teacher.encode(question)])
            dialogue.weights = [0.0] * len(dialogue.tokens)
            teacher.answer(dialogue, answer, 1)
            dialogues.append(dialogue)
        batch = collate(dialogues)
        with torch.autocast("cpu", torch.bfloat16):
            good = model(batch.tokens, batch.wanted).argmax(-1) == batch.targets
        rows = batch.wanted // batch.tokens.shape[1]
        right += sum(bool(good[rows == row].all()) for row in range(len(dialogues)))
    return right / len(chats)


RECALL_SIZES = ((16, 124), (64, 124), (140, 124), (140, 35), (280, 124))
"""Facts and names of the measured recall prompts. 140 facts are 1,000 tokens, 280 are 2,000."""


def evaluate(model: Llama, teacher: Teacher, n_cases: int, seed: int = 10**6) -> dict[str, float]:
    """Accuracies on the capital questions and on recall prompts that are not used in training."""
    capitals = [(demo.capital_question(c, i), demo.capital_answer(c)) for c in demo.CAPITALS for i in range(4)]
    result = {"capitals": fully_right(model, teacher, capitals[:: len(capitals) // n_cases])}
    for n_facts, n_names in RECALL_SIZES:
        cases = [demo.recall_prompt(seed + i, n_facts, n_names=n_names) for i in range(n_cases)]
        chats = [(case.prompt, case.fact.sentence) for case in cases]
        result[f"{n_facts} facts, {n_names} names"] = fully_right(model, teacher, chats)
    return result


def learning_rate(done: float, peak: float) -> float:
    """Warm up over 1 % of the run, then fall linearly to zero. A constant rate at the peak causes loss spikes."""
    return peak * min(done / 0.01, 1.0 - done)


def train(args: argparse.Namespace) -> None:
    """Run the curriculum for `args.tokens` tokens, saving as it goes."""
    torch.manual_seed(args.seed)
    shape = Shape()
    teacher, model = Teacher(args.seed), Llama(shape)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")

    curve: list[dict[str, Any]] = []
    stage_index, n_tokens, step = args.first_stage, 0, 0
    if args.init:
        model.load_state_dict(torch.load(args.init))
    start = last_print = last_save = time.monotonic()
    accuracy: dict[str, float] = {}
    while n_tokens < args.tokens:
        stage = STAGES[stage_index]
        kind, batch = draw_batch(teacher, stage, 0.2)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch.tokens, batch.wanted)
        losses = F.cross_entropy(logits.float(), batch.targets, reduction="none")
        loss = (losses * batch.weights).sum() / batch.weights.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(max(n_tokens, 1) / args.tokens, args.lr)
        optimizer.step()
        n_tokens += batch.tokens.numel()
        step += 1

        hard = batch.weights == 1.0
        value = (logits.argmax(-1) == batch.targets)[hard].float().mean().item()
        accuracy[kind] = value if kind not in accuracy else 0.95 * accuracy[kind] + 0.05 * value
        now = time.monotonic()
        if now - last_print > 15:
            last_print = now
            shown = " ".join(f"{k} {v:.3f}" for k, v in sorted(accuracy.items()))
            progress = f"{now - start:5.0f} s {step:6d} {n_tokens / 1e6:6.2f} M  stage {stage_index}"
            print(f"{progress} {loss:.3f}  {shown}", flush=True)
        if accuracy.get(stage.skill, 0.0) > stage.pass_at:
            stage_index += 1
            accuracy["recall"] = 0.0
        if now - last_save > args.save_every or n_tokens >= args.tokens:
            last_save = now
            point = {"seconds": round(now - start), "tokens": n_tokens, "step": step, "stage": stage_index}
            curve.append({**point, **evaluate(model, teacher, 256 if n_tokens >= args.tokens else 28)})
            print(json.dumps(curve[-1]), flush=True)
            write_gguf(args.out, shape, teacher.tokenizer, model.gguf_weights())
            torch.save(model.state_dict(), args.out.with_suffix(".pt"))
            args.curve.write_text(json.dumps(curve, indent=1) + "\n")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo.gguf"), help="the model file (default: %(default)s)")
    parser.add_argument("--curve", type=Path, default=Path("demo_curve.json"), help="the learning curve")
    parser.add_argument("--tokens", type=float, default=8.5e6, help="length of the run (default: %(default)g)")
    parser.add_argument("--init", type=Path, help="continue from this .pt file, saved beside an earlier model file")
    parser.add_argument("--first-stage", type=int, default=0, choices=range(len(STAGES)), help="with --init")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=1, help="threads; with 1 a run is exactly repeatable (default: %(default)s)"
    )
    parser.add_argument("--save-every", type=float, default=150, help="seconds between saved models")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    main()
