"""Where a model is steered, and which columns of a user's row each place reads.

A site is a block (FiLM) or a projection (LoRA). The row of a user is the sites' columns, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fssa_fast.steering.config import ConfigError, LoraConfig, SteeringConfig


@dataclass(frozen=True)
class FilmSite:
    """FiLM on the output of one block: `scale` and `shift` columns, D each."""

    path: str
    scale: slice
    shift: slice


@dataclass(frozen=True)
class LoraSite:
    """One adapter on one projection. gamma: R columns, or the strength's one of a plain adapter; beta: R or none."""

    path: str
    adapter: int
    inputs: int
    outputs: int
    rank: int
    scaling: float
    gamma: slice
    beta: slice | None


@dataclass(frozen=True)
class Layout:
    """All sites of a model. A row has `modulated` columns, affine in the latent, then one strength a plain adapter.

    A row of zeros is the base model: FiLM is the identity, every adapter is off. The strengths of users are 1.
    """

    films: tuple[FilmSite, ...]
    loras: tuple[LoraSite, ...]
    modulated: int
    width: int

    def initial_bias(self) -> Tensor:
        """The modulated columns [modulated] that leave adapters as they are: 1 in gamma's, 0 in the others."""
        bias = torch.zeros(self.modulated)
        for site in self.loras:
            if site.gamma.start < self.modulated:
                bias[site.gamma] = 1.0
        return bias

    def adapter_columns(self) -> Tensor:
        """1 in the modulated columns [modulated] that adapters read, 0 in FiLM's."""
        columns = torch.ones(self.modulated)
        for site in self.films:
            columns[site.scale] = columns[site.shift] = 0.0
        return columns


def blocks_of(model: Any) -> tuple[str, nn.ModuleList]:
    """The decoder blocks of a Hugging Face causal LM, with their path.

    Raises ValueError where no list of modules is as long as the configuration says the model is deep.
    """
    depth = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return path, module
    raise ValueError(f"model: expected a list of {depth} blocks in {type(model).__name__}, found none")


def hidden_width(model: Any) -> int:
    """The model width D."""
    return model.config.get_text_config().hidden_size


def projection_widths(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear projection, or None for any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)  # quantised linears
    return (inputs, outputs) if isinstance(inputs, int) and isinstance(outputs, int) else None


def _projections(blocks: nn.ModuleList, path: str, lora: LoraConfig) -> Iterator[tuple[str, int, int]]:
    found: dict[str, int] = dict.fromkeys(lora.targets, 0)
    names = set()
    for name, module in blocks.named_modules():
        widths = projection_widths(module)
        if widths is None:
            continue
        names.add(name.split(".", 1)[-1])
        for target in lora.targets:
            if name == target or name.endswith("." + target):
                found[target] += 1
                yield f"{path}.{name}", *widths
                break
    for target, count in found.items():
        if not count:
            raise ConfigError(f"targets: {target!r} names no projection of this model; it has {sorted(names)}")


def plan_sites(model: nn.Module, config: SteeringConfig) -> Layout:
    """Lays out a user's row for this model. Raises ConfigError for blocks or targets that the model lacks."""
    path, blocks = blocks_of(model)
    depth, width, start = len(blocks), hidden_width(model), 0

    def take(count: int) -> slice:
        nonlocal start
        start += count
        return slice(start - count, start)

    indices = config.film if isinstance(config.film, tuple) else tuple(range(depth)) if config.film else ()
    for index in indices:
        if not 0 <= index < depth:
            raise ConfigError(f"film: expected indices of blocks in [0, {depth}), got {index}")
    films = tuple(FilmSite(f"{path}.{i}", take(width), take(width)) for i in indices)
    found = [(number, lora, *p) for number, lora in enumerate(config.loras) for p in _projections(blocks, path, lora)]
    columns = {
        (number, name): (take(lora.rank), take(lora.rank) if lora.modulation == "scale_shift" else None)
        for number, lora, name, _, _ in found
        if lora.modulation != "none"
    }
    modulated = start
    strengths = {number: take(1) for number, lora in enumerate(config.loras) if lora.modulation == "none"}
    loras = tuple(
        LoraSite(
            name, number, inputs, outputs, lora.rank, lora.alpha / lora.rank,
            *columns.get((number, name), (strengths.get(number), None)),
        )
        for number, lora, name, inputs, outputs in found
    )  # fmt: skip
    return Layout(films, loras, modulated, start)


def default_targets(model: nn.Module) -> tuple[str, ...]:
    """The projections LoRA is usually put on: queries and values, or the one that holds them."""
    _, blocks = blocks_of(model)
    names = {name.rsplit(".", 1)[-1] for name, module in blocks.named_modules() if projection_widths(module)}
    for targets in (("q_proj", "v_proj"), ("qkv_proj",), ("c_attn",), ("query_key_value",)):
        if names.issuperset(targets):
            return targets
    raise ConfigError(f"targets: no usual projection in this model; name some of {sorted(names)}")
