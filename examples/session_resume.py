"""Ask about a long document again and again, and read it once: python examples/session_resume.py MODEL DOCUMENT.TXT.

The first run reads the document and saves the cache beside it; later ones take it up and read only the question.
"""

import sys
import time
from pathlib import Path

import tqgguf


def main(model_path: str, document: str, question: str = "What is it about?") -> None:
    model = tqgguf.Llama(model_path, cache="pqo3", n_ctx=0, verbose=False)  # 0: all it was trained for
    text = Path(document).read_text(encoding="utf-8")
    session = Path(document).with_suffix(".session")

    start = time.perf_counter()
    if session.exists():
        n_tokens = model.load_session(session).n_tokens
        how = "taken up"
    else:
        model.eval(model.tokenize(text.encode()))
        n_tokens = model.save_session(session).n_tokens
        how = "read and saved"
    size = session.stat().st_size
    print(f"{n_tokens} tokens {how} in {time.perf_counter() - start:.2f} s: {size:,} bytes", file=sys.stderr)

    # What the prompt has in common with the cache is not read again.
    answer = model.create_completion(f"{text}\n{question}", max_tokens=64, temperature=0)
    print(answer["choices"][0]["text"].strip())


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:4])
