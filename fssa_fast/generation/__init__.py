"""Decoding many users in one batch."""

from fssa_fast.generation.engine import Engine, EngineClosed
from fssa_fast.generation.fused import CannotFuse, FusedModel, StaleFused
from fssa_fast.generation.generate import generate, stream
from fssa_fast.generation.grammars import Grammar
from fssa_fast.generation.requests import Handle, Result
from fssa_fast.generation.sampler import TokenLogprobs
from fssa_fast.generation.sampling import Sampling
from fssa_fast.generation.waiting import QueueFull

__all__ = [
    "CannotFuse",
    "Engine",
    "EngineClosed",
    "FusedModel",
    "Grammar",
    "Handle",
    "QueueFull",
    "Result",
    "Sampling",
    "StaleFused",
    "TokenLogprobs",
    "generate",
    "stream",
]
