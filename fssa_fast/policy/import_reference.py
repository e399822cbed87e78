"""A policy of the reference implementation as one of ours."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fssa_fast.nn import CheckpointError
from fssa_fast.policy.reference_checkpoint import ReferencePolicy, read_reference
from fssa_fast.policy.storage import Made, load_base, tokenizer_beside
from fssa_fast.steering.config import EncoderConfig, LoraConfig, SteeringConfig


def config_from_reference(source: ReferencePolicy) -> SteeringConfig:
    """FiLM on the blocks that have it, and plain LoRA."""
    encoder = EncoderConfig(
        source.encoder.embedding_width,
        source.encoder.latent_width,
        source.encoder.inner_kind,  # type: ignore[arg-type]
        source.encoder.pooling,  # type: ignore[arg-type]
        source.encoder.heads,
        source.encoder.dropout,
        source.encoder.sampled,
    )
    targets = dict.fromkeys(path.rsplit(".", 1)[-1] for path in source.lora)
    loras = (LoraConfig(tuple(targets), source.rank, source.alpha, "none"),) if targets else ()
    return SteeringConfig(encoder, tuple(sorted(source.film)) or False, loras)


def build_policy(make: Callable[..., Made], source: ReferencePolicy, model: Any, **options: Any) -> Made:
    """Attaches the checkpoint's steering to `model`; `make` is the class of the policy.

    Raises CheckpointError where projections or widths do not fit.
    """
    policy = make(model, config_from_reference(source), **options)
    try:
        with torch.no_grad():
            policy.encoder.load_state_dict(source.encoder.state_dict())
            for site in policy.layout.films:
                film = source.film[int(site.path.rsplit(".", 1)[-1])]
                for columns, weight, bias in (
                    (site.scale, film.scale, film.scale_bias),
                    (site.shift, film.shift, film.shift_bias),
                ):
                    _fill(f"FiLM of {site.path}", policy.modulator.weight[columns], weight)
                    _fill(f"FiLM of {site.path}", policy.modulator.bias[columns], bias)
            places = {site.path: (a, b) for site, a, b in policy.attachment.adapter(0)} if source.lora else {}
            if set(places) != set(source.lora):
                odd = sorted(set(places) ^ set(source.lora))[0]
                raise CheckpointError(f"LoRA: expected on the same projections as in the base model, not so at {odd}")
            for path, (a, b) in places.items():
                _fill(f"LoRA A of {path}", a, source.lora[path].a)
                _fill(f"LoRA B of {path}", b, source.lora[path].b)
        policy.users.refresh()
    except BaseException:
        policy.detach()
        raise
    return policy


def _fill(what: str, place: torch.Tensor, value: torch.Tensor) -> None:
    if place.shape != value.shape:
        raise CheckpointError(
            f"{what}: expected shape {list(place.shape)}, as the base model has it, got {list(value.shape)}"
        )
    place.copy_(value)


def policy_from_reference(
    make: Callable[..., Made], directory: str | os.PathLike[str], base: Any = None, **options: Any
) -> Made:
    """`SteerablePolicy.from_reference`; a folder `base` in the checkpoint is the base model where none is given."""
    source = read_reference(directory)
    if not isinstance(source, ReferencePolicy):
        raise CheckpointError(f"{directory}: expected a policy, got a reward model")
    named = source.config.get("llm_name", "")
    if not isinstance(named, str):
        raise CheckpointError(f"{directory}: llm_name: expected a text, got {type(named).__name__}")
    model, folder = load_base(base, "./base" if (Path(directory) / "base").is_dir() else named, directory=directory)
    if "tokenizer" not in options:
        options["tokenizer"] = tokenizer_beside(folder)
    return build_policy(make, source, model, **options)
