"""Decoding many users in one batch."""

from fssa_fast.generation.engine import Engine, EngineClosed, QueueFull
from fssa_fast.generation.fused import CannotFuse, FusedModel, StaleFused
from fssa_fast.generation.generate import generate, stream
from fssa_fast.generation.requests import Handle, Result

__all__ = [
    "CannotFuse",
    "Engine",
    "EngineClosed",
    "FusedModel",
    "Handle",
    "QueueFull",
    "Result",
    "StaleFused",
    "generate",
    "stream",
]
