"""Saved conversations: the file, and the state of llama.cpp in it."""
