"""What a KV cache is asked to be: types by layer, the precise tail, and what it took. No native code."""
