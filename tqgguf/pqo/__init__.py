"""The formats without llama.cpp: encode and decode arrays, and a cache of them."""
