"""Reads a long document once and answers questions: python examples/long_document.py MODEL DOCUMENT QUESTION ...

The first run reads the document and saves the cache beside it. Later questions and later runs read only the question,
because `Llama` reuses the prefix that a prompt shares with the cache.
"""

import sys
from pathlib import Path

import tqgguf

ANSWER = 200
TEMPLATE = 50  # the model's chat template adds at most so many tokens


def main(model_path: str, document: str, *questions: str) -> None:
    model = tqgguf.Llama(model_path, cache="pqo3", n_ctx=0, verbose=False)  # 0: the trained context
    text = Path(document).read_text(encoding="utf-8").strip()
    n_text, *n_questions = (len(model.tokenize(part.encode())) for part in (text, *questions))
    room = model.n_ctx() - max(n_questions) - ANSWER - TEMPLATE
    if n_text > room:
        sys.exit(
            f"{document} has {n_text:,} tokens; beside the questions and {ANSWER} tokens of answer, the context of "
            f"{model.n_ctx():,} holds {room:,}: take a shorter document, or a model with a longer context"
        )
    session = Path(document).with_suffix(".session")
    if session.exists():
        print(f"{model.load_session(session).n_tokens} tokens taken up from {session.name}", file=sys.stderr)

    for question in questions:
        before = model.n_tokens_read
        reply = model.create_chat_completion(
            [{"role": "user", "content": f"{text} {question}"}], temperature=0, max_tokens=ANSWER
        )
        print(f"{question}\n  {reply['choices'][0]['message']['content'].strip()}")
        print(f"  {model.n_tokens_read - before} of {model.n_tokens} tokens were read", file=sys.stderr)
        if not session.exists():
            model.save_session(session)
            print(f"saved to {session.name}: {session.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
