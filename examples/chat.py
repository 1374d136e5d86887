"""Chat with any GGUF model whose KV cache is compressed: python examples/chat.py model.gguf [cache type]."""

import sys

import tqgguf


def main(path: str, cache: str = "pqo3") -> None:
    model = tqgguf.Llama(path, cache=cache, n_ctx=2048, verbose=False)
    info = model.cache_info()
    print(f"{cache}: {info.bytes:,} bytes of KV cache, f16 would take {info.f16_bytes:,}", file=sys.stderr)

    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            break
        messages.append({"role": "user", "content": line})
        answer = ""
        try:
            for chunk in model.create_chat_completion(messages, temperature=0.7, max_tokens=256, stream=True):
                piece = chunk["choices"][0]["delta"].get("content") or ""
                answer += piece
                print(piece, end="", flush=True)
        except ValueError as error:  # the conversation no longer fits the context
            sys.exit(str(error))
        print()
        messages.append({"role": "assistant", "content": answer})

    used = model.cache_info()
    print(f"\n{used.cells_used} of {used.n_ctx} tokens were in the cache", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:3])
