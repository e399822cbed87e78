"""What makes users of choices, without the base model: enough to fill a store."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from fssa_fast.files import CheckpointError, read_pair, read_tensors
from fssa_fast.nn import ContextEncoder, Modulator
from fssa_fast.policy.storage import CONFIG_NAME, SavedPolicy, described_weights, load_embedder, read_description
from fssa_fast.users.bank import Bank
from fssa_fast.users.embedder import TextEmbedder


@dataclass
class UserEncoding:
    """The parts of a policy that `StoredUsers` needs."""

    encoder: ContextEncoder
    modulator: Modulator
    embedder: TextEmbedder | None
    bank: Bank


def load_encoding(
    directory: str | os.PathLike[str], *, embedder: str | None = None, capacity: int = 64
) -> UserEncoding:
    """Reads encoder, modulator and embedder of a saved policy: its users get the latents that the policy gives them.

    Raises as `SteerablePolicy.from_pretrained`, which checks the rest of the file.
    """
    saved, encoder, modulator = read_pair(Path(directory) / CONFIG_NAME, lambda: _read(directory))
    plain = sum(lora.modulation == "none" for lora in saved.config.loras)
    width = modulator.out_features
    bank = Bank(width + plain, width, capacity, torch.get_default_dtype(), torch.device("cpu"))
    return UserEncoding(encoder, modulator, load_embedder(saved, embedder, directory), bank)


def _read(directory: str | os.PathLike[str]) -> tuple[SavedPolicy, ContextEncoder, Modulator]:
    saved = read_description(directory)
    path = described_weights(directory, saved)
    try:
        with safe_open(path, framework="pt") as file:
            width = file.get_slice("modulator.weight").get_shape()[0]
    except Exception as error:
        raise CheckpointError(f"{path}: not a whole file of a policy's tensors: {error}") from error
    with torch.device("meta"):
        parts = nn.ModuleDict({
            "encoder": ContextEncoder(**asdict(saved.config.encoder)),
            "modulator": Modulator(saved.config.encoder.latent_width, width),
        })  # fmt: skip
    tensors = read_tensors(path, parts.state_dict(), others=True)
    made = {name: tensor.to(torch.get_default_dtype()) for name, tensor in tensors.items()}
    parts.load_state_dict(made, assign=True)
    encoder, modulator = parts["encoder"], parts["modulator"]
    assert isinstance(encoder, ContextEncoder) and isinstance(modulator, Modulator)
    return saved, encoder.eval(), modulator.eval()
