"""Attaching to a Hugging Face model: what to attach, where, and how a forward is steered."""

from fssa_fast.steering.config import ConfigError, EncoderConfig, LoraConfig, SteeringConfig

__all__ = ["ConfigError", "EncoderConfig", "LoraConfig", "SteeringConfig"]
