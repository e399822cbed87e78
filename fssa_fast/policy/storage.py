"""A saved policy: steering.json, and the tensors it names, steering-<hash>.safetensors, in one directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fssa_fast.files import CheckpointError, read_json, read_pair, read_tensors, weights_path, write_pair, written
from fssa_fast.hub import find_folder, has_tokenizer, is_hub_id, load_model, load_tokenizer, recall, remember
from fssa_fast.nn import ContextEncoder, Modulator
from fssa_fast.steering.attach import Attachment
from fssa_fast.steering.config import FORMAT_VERSION, ConfigError, SteeringConfig, from_json, to_json
from fssa_fast.steering.sites import Layout, blocks_of, hidden_width, plan_sites
from fssa_fast.users import Users
from fssa_fast.users.embedder import EmbedderConfig, TextEmbedder, same_fingerprint, weight_fingerprint

CONFIG_NAME, WEIGHTS_NAME = "steering.json", "steering.safetensors"


class Storable(Protocol):
    """What is saved of a policy, and filled when one is loaded."""

    model: Any
    steering: SteeringConfig
    layout: Layout
    encoder: ContextEncoder
    modulator: Modulator
    embedder: TextEmbedder | None
    chat: bool | None
    attachment: Attachment
    users: Users

    def detach(self) -> Any:
        """Takes the steering off the base model."""


Made = TypeVar("Made", bound=Storable)


@dataclass(frozen=True)
class BaseDescription:
    """Which base model a policy steers.

    name_or_path: the hub's name, then with its revision, or the path from the folder in which the policy is saved.
    """

    name_or_path: str
    architecture: str
    hidden_size: int
    blocks: int
    vocabulary: int
    fingerprint: tuple[float, ...]
    revision: str | None = None


@dataclass(frozen=True)
class SavedPolicy:
    """What steering.json holds; weights: the name of the tensors' file beside it."""

    format_version: int
    config: SteeringConfig
    base: BaseDescription
    embedder: EmbedderConfig | None
    library_version: str
    chat: bool | None = None
    weights: str = WEIGHTS_NAME


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


def adapter_tensors(policy: Storable) -> dict[str, Tensor]:
    """All that is saved, by name: encoder.*, modulator.*, and adapters by their place in the base model."""
    found = {f"encoder.{name}": tensor for name, tensor in policy.encoder.state_dict().items()}
    found |= {f"modulator.{name}": tensor for name, tensor in policy.modulator.state_dict().items()}
    for path, child in policy.attachment.children():
        found |= {f"model.{path}.fssa.{name}": tensor for name, tensor in child.state_dict().items()}
    return found


def save_policy(policy: Storable, directory: str | os.PathLike[str], dtype: torch.dtype | None) -> None:
    """`SteerablePolicy.save_pretrained`."""
    from fssa_fast import __version__

    folder = Path(directory)
    base = describe_base(policy.model)
    name, revision = remember(base.name_or_path, folder)
    embedder = None if policy.embedder is None else policy.embedder.config
    if embedder is not None:
        named = remember(embedder.name_or_path, folder)
        embedder = replace(embedder, name_or_path=named[0], revision=named[1])
    saved = SavedPolicy(
        FORMAT_VERSION, policy.steering, replace(base, name_or_path=name, revision=revision), embedder, __version__,
        policy.chat,
    )
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in adapter_tensors(policy).items()}
    write_pair(folder / CONFIG_NAME, to_json(saved), WEIGHTS_NAME, tensors)


def read_description(directory: str | os.PathLike[str]) -> SavedPolicy:
    """What steering.json says. Raises CheckpointError for a missing, damaged or newer file, ConfigError for a key."""
    path = Path(directory) / CONFIG_NAME
    data = read_json(path)
    version = data.get("format_version") if isinstance(data, dict) else None
    if version not in (1, FORMAT_VERSION):
        raise CheckpointError(f"{path}: expected format_version 1 or {FORMAT_VERSION}, got {version!r}")
    return from_json(SavedPolicy, data, str(path))


def described_weights(directory: str | os.PathLike[str], saved: SavedPolicy) -> Path:
    """The file of the tensors that go with a description read from `directory`."""
    return weights_path(Path(directory) / CONFIG_NAME, WEIGHTS_NAME, saved.weights)


def planned_tensors(config: SteeringConfig, layout: Layout) -> dict[str, Tensor]:
    """`adapter_tensors` of a policy not yet made, on meta: names and shapes that take no memory, whatever is asked for.

    Raises ConfigError for an encoder that cannot be.
    """
    try:
        with torch.device("meta"):
            parts = {
                "encoder": ContextEncoder(**asdict(config.encoder)),
                "modulator": Modulator(config.encoder.latent_width, layout.modulated),
            }
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"encoder: {error}") from error
    found = {f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}
    places: dict[str, int] = {}
    for site in layout.loras:
        number = places[site.path] = places.get(site.path, -1) + 1
        found[f"model.{site.path}.fssa.a.{number}"] = torch.empty(site.rank, site.inputs, device="meta")
        found[f"model.{site.path}.fssa.b.{number}"] = torch.empty(site.rank, site.outputs, device="meta")
    return found


def read_adapter(path: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a safetensors file that has exactly those, all finite; raises CheckpointError otherwise."""
    tensors = read_tensors(path, wanted)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name!r}: expected finite numbers, got NaN or infinity")
    return tensors


def fill_policy(policy: Storable, tensors: Mapping[str, Tensor]) -> None:
    """Gives a policy its tensors, and its users the rows that follow."""
    for name, place in adapter_tensors(policy).items():
        place.copy_(tensors[name])
    policy.users.refresh()


def load_adapter(policy: Storable, directory: str | os.PathLike[str]) -> None:
    """Fills a policy from a saved one that has exactly its tensors."""
    wanted = planned_tensors(policy.steering, policy.layout)
    fill_policy(policy, read_pair(
        Path(directory) / CONFIG_NAME,
        lambda: read_adapter(described_weights(directory, read_description(directory)), wanted),
    ))  # fmt: skip


def load_base(
    base: Any,
    named: str,
    *,
    directory: str | os.PathLike[str] = ".",
    revision: str | None = None,
    device_map: Any = None,
    dtype: torch.dtype | str | None = None,
) -> tuple[Any, Path | None]:
    """The base model, and the folder it came from: `base` itself, or loaded from its folder, or from the hub by name.

    None takes what a file in `directory` names: a folder, or what was downloaded from the hub before, at `revision`.
    device_map, dtype: as of transformers' `from_pretrained`, for a model that is loaded.
    """
    placed = {name: value for name, value in (("device_map", device_map), ("dtype", dtype)) if value is not None}
    if isinstance(base, nn.Module):
        if placed:
            raise ValueError(f"{', '.join(placed)}: expected None, since base is a model already; got {placed}")
        try:
            return base, find_folder("base", str(getattr(base.config, "name_or_path", "")), ask_hub=False)
        except ValueError:
            return base, None
    if not (base or named):
        raise ValueError("base: expected a model or its path, since the policy names none; got None")
    from transformers import AutoModelForCausalLM

    name = os.fspath(base) if base else recall(named, directory)
    same = revision if name == named else None
    folder = find_folder("base", name, ask_hub=bool(base), revision=same)
    return load_model(AutoModelForCausalLM, folder, **placed), folder


def tokenizer_beside(folder: Path | None) -> Any:
    """The tokenizer in a model's folder, or None where there is none."""
    return load_tokenizer(folder) if folder is not None and has_tokenizer(folder) else None


def saved_policy(argument: str, name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of a policy: the one named, or what the hub has under that name; as `find_folder`."""
    asked = is_hub_id(os.fspath(name)) and not Path(name).is_dir()
    return find_folder(argument, name, ask_hub=True, revision=revision) if asked else Path(name)


def load_embedder(
    saved: SavedPolicy, embedder: TextEmbedder | str | None, directory: str | os.PathLike[str]
) -> TextEmbedder | None:
    """The embedder of a policy saved in `directory`: the one given, by itself or by name, or the one it names."""
    if saved.embedder is None:
        if embedder is not None:
            raise ValueError("embedder: expected None, since the policy was saved without one; got one")
        return None
    if isinstance(embedder, TextEmbedder):
        embedder.check(saved.embedder)
        return embedder
    return TextEmbedder.from_config(saved.embedder, embedder, directory=directory)


def load_policy(
    make: Callable[..., Made],
    directory: str | os.PathLike[str],
    base: Any,
    *,
    tokenizer: Any,
    embedder: TextEmbedder | str | None,
    capacity: int,
    revision: str | None = None,
    device_map: Any = None,
    dtype: torch.dtype | str | None = None,
) -> Made:
    """`SteerablePolicy.from_pretrained`; `make` is the class."""
    directory = saved_policy("directory", directory, revision)
    path = directory / CONFIG_NAME
    before, saved = written(path), read_description(directory)
    model, folder = load_base(
        base, saved.base.name_or_path, directory=directory, revision=saved.base.revision, device_map=device_map,
        dtype=dtype,
    )  # fmt: skip
    while True:
        check_base(model, saved.base)
        # Before anything is allocated, so that sizes are those of a file that exists.
        wanted = planned_tensors(saved.config, plan_sites(model, saved.config))
        try:
            tensors = read_adapter(described_weights(directory, saved), wanted)
            break
        except CheckpointError:
            if written(path) == before:
                raise  # else another policy was saved while the base was loaded
            before, saved = written(path), read_description(directory)
    found = load_embedder(saved, embedder, directory)
    if found is not None and found is not embedder:
        found.to(next(model.parameters()).device)
    policy = make(
        model,
        saved.config,
        tokenizer=tokenizer_beside(folder) if tokenizer is None else tokenizer,
        embedder=found,
        chat=saved.chat,
        capacity=capacity,
    )
    try:
        fill_policy(policy, tensors)
    except BaseException:
        policy.detach()
        raise
    return policy
