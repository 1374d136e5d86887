"""Asks `tqgguf serve model.gguf` with OpenAI's client: python examples/openai_client.py [URL of the server]."""

import json
import sys
import urllib.request

import openai


def main(url: str = "http://127.0.0.1:8000") -> None:
    url = url.rstrip("/").removesuffix("/v1")  # accepts the URL with or without the /v1 that `tqgguf serve` prints
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the capital of Italy?"}],
        temperature=0,
        stream=True,
    )
    for chunk in answer:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()

    with urllib.request.urlopen(f"{url}/props") as response:
        cache = json.load(response)["kv_cache"]
    sizes = f"{cache['bytes']:,} bytes for {cache['n_tokens']:,} tokens, f16 {cache['f16_bytes']:,}"
    print(f"{cache['type_k']}: {sizes}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:2])
