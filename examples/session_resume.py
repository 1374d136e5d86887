"""Continues a saved conversation: python examples/session_resume.py MODEL MESSAGE [FILE].

Every run adds a message and its answer to the session in FILE. The file holds the messages and the compressed cache, so
earlier messages are not read again.
"""

import sys
from pathlib import Path

import tqgguf


def main(model_path: str, message: str, file: str = "talk.session") -> None:
    model = tqgguf.Llama(model_path, cache="pqo3", n_ctx=2048, verbose=False)
    session, messages = Path(file), []
    if session.exists():
        messages = model.load_session(session).extra["messages"]
        print(f"{len(messages) // 2} answers taken up, {model.n_tokens} tokens", file=sys.stderr)

    messages.append({"role": "user", "content": message})
    reply = model.create_chat_completion(messages, temperature=0)
    messages.append({"role": "assistant", "content": reply["choices"][0]["message"]["content"]})
    print(messages[-1]["content"].strip())

    model.save_session(session, {"messages": messages})
    print(f"{model.n_tokens_read} of {model.n_tokens} tokens were read in this run", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
