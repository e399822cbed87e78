"""Decoding many users in one batch."""

from fssa_fast.generation.engine import Engine, EngineClosed, Handle, QueueFull, Result
from fssa_fast.generation.fused import CannotFuse, FusedModel
from fssa_fast.generation.generate import generate, stream

__all__ = [
    "CannotFuse",
    "Engine",
    "EngineClosed",
    "FusedModel",
    "Handle",
    "QueueFull",
    "Result",
    "generate",
    "stream",
]
