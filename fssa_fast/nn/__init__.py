"""Modules: the context encoder, the modulator, and the reward models."""

from fssa_fast.files import CheckpointError
from fssa_fast.nn.context import ContextEncoder, EncoderConfig, pack_choices
from fssa_fast.nn.modulator import Modulator
from fssa_fast.nn.reward import BTL, DPL, NPBTL, RewardModel

__all__ = [
    "BTL",
    "CheckpointError",
    "ContextEncoder",
    "DPL",
    "EncoderConfig",
    "Modulator",
    "NPBTL",
    "RewardModel",
    "pack_choices",
]
