"""Diagnostics: each module computes something and returns a dataclass; nothing here prints."""
