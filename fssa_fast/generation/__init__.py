"""Decoding many users in one batch."""

from fssa_fast.generation.generate import generate, stream

__all__ = ["generate", "stream"]
