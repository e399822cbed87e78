"""A saved policy beside the configuration of the model that vLLM serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fssa_fast.policy.storage import SavedPolicy, described_weights, planned_tensors, read_adapter, read_description
from fssa_fast.steering.sites import Layout, blocks_of, hidden_width, plan_sites


@dataclass(frozen=True, eq=False)
class PolicyFiles:
    """What is read of a policy: its description, its layout on the model, and its tensors by name.

    planned: the Hugging Face model, without weights, whose modules say where the policy steers.
    """

    saved: SavedPolicy
    layout: Layout
    tensors: Mapping[str, Tensor]
    planned: Any

    def modulator(self) -> tuple[Tensor, Tensor]:
        """The map from latents to rows, float32: weight [M, H], bias [M]."""
        return self.tensors["modulator.weight"].float(), self.tensors["modulator.bias"].float()


def read_policy(directory: str, model_config: Any) -> PolicyFiles:
    """Reads a policy for the model of vLLM's configuration.

    Raises CheckpointError, ConfigError for a damaged policy; ValueError for one of a base of another kind or size.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(directory)
    saved = read_description(folder)
    with torch.device("meta"):
        planned = AutoModelForCausalLM.from_config(model_config.hf_text_config)
    have = {
        "architecture": type(planned).__name__,
        "hidden_size": hidden_width(planned),
        "blocks": len(blocks_of(planned)[1]),
        "vocabulary": int(planned.config.get_text_config().vocab_size),
    }
    for name, value in have.items():
        if value != getattr(saved.base, name):
            raise ValueError(f"policy: expected a base with {name} {value!r}, got {getattr(saved.base, name)!r}")
    layout = plan_sites(planned, saved.config)
    tensors = read_adapter(described_weights(folder, saved), planned_tensors(saved.config, layout))
    return PolicyFiles(saved, layout, tensors, planned)
