"""A saved policy: steering.json and steering.safetensors in one directory."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fssa_fast.nn.files import CheckpointError, read_tensors, read_text, write_pair
from fssa_fast.steering.config import FORMAT_VERSION, SteeringConfig, from_json, to_json
from fssa_fast.steering.embedder import EmbedderConfig, TextEmbedder, same_fingerprint, weight_fingerprint
from fssa_fast.steering.sites import blocks_of, hidden_width

if TYPE_CHECKING:
    from fssa_fast.steering.policy import SteerablePolicy

CONFIG_NAME, WEIGHTS_NAME = "steering.json", "steering.safetensors"


@dataclass(frozen=True)
class BaseDescription:
    """Which base model a policy steers."""

    name_or_path: str
    architecture: str
    hidden_size: int
    blocks: int
    vocabulary: int
    fingerprint: tuple[float, ...]


@dataclass(frozen=True)
class SavedPolicy:
    """What steering.json holds."""

    format_version: int
    config: SteeringConfig
    base: BaseDescription
    embedder: EmbedderConfig | None
    library_version: str


def describe_base(model: Any) -> BaseDescription:
    """The description that loading compares."""
    config = model.config.get_text_config()
    return BaseDescription(
        str(model.config.name_or_path),
        type(model).__name__,
        hidden_width(model),
        len(blocks_of(model)[1]),
        int(config.vocab_size),
        weight_fingerprint(model),
    )


def check_base(model: Any, wanted: BaseDescription) -> None:
    """Raises ValueError unless `model` is the base a policy was made for; its name, path and dtype may differ."""
    have = describe_base(model)
    for name in ("architecture", "hidden_size", "blocks", "vocabulary"):
        if getattr(have, name) != getattr(wanted, name):
            raise ValueError(
                f"base: expected {name} {getattr(wanted, name)!r}, as the policy was made for "
                f"({wanted.name_or_path or 'an unnamed model'}), got {getattr(have, name)!r}"
            )
    if not same_fingerprint(have.fingerprint, wanted.fingerprint):
        raise ValueError(
            f"base: expected the weights of {wanted.name_or_path or 'the model the policy was made for'!r}, got others "
            "of the same shapes"
        )


def adapter_tensors(policy: SteerablePolicy) -> dict[str, Tensor]:
    """All that is saved, by name: encoder.*, modulator.*, and adapters by their place in the base model."""
    found = {f"encoder.{name}": tensor for name, tensor in policy.encoder.state_dict().items()}
    found |= {f"modulator.{name}": tensor for name, tensor in policy.modulator.state_dict().items()}
    for path, child in policy.attachment.children():
        found |= {f"model.{path}.fssa.{name}": tensor for name, tensor in child.state_dict().items()}
    return found


def save_policy(policy: SteerablePolicy, directory: str | os.PathLike[str], dtype: torch.dtype | None) -> None:
    """`SteerablePolicy.save_pretrained`."""
    from fssa_fast import __version__

    saved = SavedPolicy(
        FORMAT_VERSION,
        policy.steering,
        describe_base(policy.model),
        None if policy.embedder is None else policy.embedder.config,
        __version__,
    )
    folder = Path(directory)
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in adapter_tensors(policy).items()}
    write_pair(folder / CONFIG_NAME, to_json(saved), folder / WEIGHTS_NAME, tensors)


def read_description(directory: str | os.PathLike[str]) -> SavedPolicy:
    """What steering.json says. Raises CheckpointError for a missing, damaged or newer file, ConfigError for a bad key."""
    path = Path(directory) / CONFIG_NAME
    try:
        data = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: expected format_version {FORMAT_VERSION}, got {version!r}")
    return from_json(SavedPolicy, data, str(path))


def load_adapter(policy: SteerablePolicy, path: Path) -> None:
    """Fills a policy from a safetensors file that has exactly its tensors, then writes its users' rows again."""
    wanted = adapter_tensors(policy)
    for name, tensor in read_tensors(path, {name: t.to("meta") for name, t in wanted.items()}).items():
        wanted[name].copy_(tensor)
    policy.users.refresh()


def load_base(base: Any, named: str) -> Any:
    """The base model: itself, or loaded from a path, or from the name that a policy holds."""
    if isinstance(base, nn.Module):
        return base
    path = base or named
    if not path:
        raise ValueError("base: expected a model or its path, since the policy names none; got None")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


def load_tokenizer(model: Any) -> Any:
    """The tokenizer beside a model, or None where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.config.name_or_path) if model.config.name_or_path else None
    except (OSError, ValueError):
        return None


def load_policy(
    directory: str | os.PathLike[str],
    base: Any,
    *,
    tokenizer: Any,
    embedder: TextEmbedder | str | None,
    capacity: int,
) -> SteerablePolicy:
    """`SteerablePolicy.from_pretrained`."""
    from fssa_fast.steering.policy import SteerablePolicy

    saved = read_description(directory)
    model = load_base(base, saved.base.name_or_path)
    check_base(model, saved.base)
    if saved.embedder is not None:
        if isinstance(embedder, TextEmbedder):
            embedder.check(saved.embedder)
        else:
            embedder = TextEmbedder.from_config(saved.embedder, embedder)
    elif embedder is not None:
        raise ValueError("embedder: expected None, since the policy was saved without one; got one")
    policy = SteerablePolicy(
        model,
        saved.config,
        tokenizer=load_tokenizer(model) if tokenizer is None else tokenizer,
        embedder=embedder,
        capacity=capacity,
    )
    try:
        load_adapter(policy, Path(directory) / WEIGHTS_NAME)
    except BaseException:
        policy.detach()
        raise
    return policy
