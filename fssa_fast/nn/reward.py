"""Reward models: BTL and DPL, which give every user the same rewards, and NP-BTL, which gives each user their own."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fssa_fast.arguments import check_count, check_tensor
from fssa_fast.files import (
    CheckpointError,
    check_fields,
    read_config,
    read_pair,
    read_tensors,
    weights_path,
    write_pair,
)
from fssa_fast.nn.context import ContextEncoder, EncoderConfig
from fssa_fast.nn.standardize import Standardize

VERSION = 2
CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"


def btl_log_probs(rewards: Tensor) -> Tensor:
    """Of rewards [..., 2] of two options: the log-probability [..., 2] that each is preferred, by Bradley and Terry."""
    margin = rewards[..., 0] - rewards[..., 1]
    return F.logsigmoid(torch.stack([margin, -margin], -1))


def dpl_log_probs(rewards: Tensor) -> Tensor:
    """Of normal rewards [..., 2, 2], mean and deviation of each option: the log-probability [..., 2] of each.

    `t = (m_0 - m_1) / sqrt(s_0^2 + s_1^2)`, and the probability of option 0 is `sigmoid(t sqrt(2 pi))`.
    """
    mean, deviation = rewards.unbind(-1)
    t = (mean[..., 0] - mean[..., 1]) / deviation.square().sum(-1).sqrt()
    return F.logsigmoid(torch.stack([t, -t], -1) * math.sqrt(2 * math.pi))


class RewardModel(nn.Module):
    """What the reward models share: the encoder of target options, the decoder, saving and loading.

    target: Linear(E, H), ReLU, Linear(H, H); decoder: Linear(., H), BatchNorm, ReLU, Linear(H, outputs), no biases.
    features: how options are put on one scale, targets' and contexts', where they are features; see `standardize`.
    """

    kind: ClassVar[str]
    fields: ClassVar[dict[str, type]] = {"embedding_width": int, "latent_width": int}
    features: Standardize | None

    def __init__(self, embedding_width: int, latent_width: int, *, joined_width: int, outputs: int) -> None:
        super().__init__()
        check_count("embedding_width", embedding_width)
        check_count("latent_width", latent_width)
        self.embedding_width, self.latent_width = embedding_width, latent_width
        self.target0 = nn.Linear(embedding_width, latent_width)
        self.target1 = nn.Linear(latent_width, latent_width)
        self.decoder0 = nn.Linear(joined_width, latent_width, bias=False)
        self.norm = nn.BatchNorm1d(latent_width)
        self.decoder1 = nn.Linear(latent_width, outputs, bias=False)
        self.features = None

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, by name."""
        return {"embedding_width": self.embedding_width, "latent_width": self.latent_width}

    def standardize(self, options: Tensor) -> None:
        """From now on features are put on the scale of `options` [n, E]: those that the training users chose among.

        Columns on scales of their own (a price, a year) would else be heard by their size. The statistics are saved
        with the model.
        """
        self.features = Standardize.fitted(options).to(self.target0.weight)

    def scaled(self, options: Tensor) -> Tensor:
        """Options [..., E] on the scale that the model was trained on."""
        return options if self.features is None else self.features(options)

    def outside(self, options: Tensor) -> str | None:
        """Which features of options [..., E] are beyond those seen in training, by words; None where none is."""
        return None if self.features is None or not options.numel() else self.features.outside(options)

    def encode_targets(self, targets: Tensor) -> Tensor:
        """Options [U, P, 2, E] to [U, P, 2, H]."""
        check_tensor("targets", targets, (None, None, 2, self.embedding_width), self.target0.weight)
        return self.target1(self.target0(self.scaled(targets)).relu())

    def decode(self, hidden: Tensor) -> Tensor:
        """The decoder after its first Linear: [..., H] to [..., outputs]."""
        return self.decoder1(self.norm(hidden.flatten(0, -2)).relu().view(hidden.shape))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes config.json and the tensors, model-<hash>.safetensors, into `directory`, in one step."""
        config = {"version": VERSION, "model": self.kind, **self.config, "standardized": self.features is not None}
        write_pair(Path(directory) / CONFIG_NAME, config, WEIGHTS_NAME, self.state_dict())

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> Self:
        """Reads what `save_pretrained` wrote, in evaluation mode; `RewardModel` takes any kind, a subclass its own.

        Sizes and shapes are checked before they are used. Raises CheckpointError naming the file and what is wrong.
        """
        return read_pair(Path(directory) / CONFIG_NAME, lambda: cls._read(Path(directory) / CONFIG_NAME))

    @classmethod
    def _read(cls, path: Path) -> Self:
        config = read_config(path, 1, VERSION)
        check_fields(str(path), config, {"model": str})
        own = {kind.kind: kind for kind in (BTL, DPL, NPBTL) if issubclass(kind, cls)}
        kinds = cast(dict[str, type[Self]], own)
        name = config.pop("model")
        if name not in kinds:
            raise CheckpointError(f"{path}: 'model': expected one of {sorted(kinds)}, got {name[:80]!r}")
        kind, weights = kinds[name], weights_path(path, WEIGHTS_NAME, config.pop("weights", WEIGHTS_NAME))
        standardized = config.pop("standardized", False)  # older files have none
        check_fields(str(path), {**config, "standardized": standardized}, {**kind.fields, "standardized": bool})
        for unknown in sorted(set(config) - set(kind.fields)):
            raise CheckpointError(f"{path}: {unknown[:80]!r} is not a field of {name}")
        try:
            with torch.device("meta"):
                model = kind(**config)
                model.features = Standardize(model.embedding_width) if standardized else None
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        model.load_state_dict(read_tensors(weights, model.state_dict()), assign=True)
        return model.eval()

    def load_weights(self, directory: str | os.PathLike[str]) -> None:
        """Takes the tensors of a model of this kind and these sizes, saved in `directory`; as `from_pretrained`."""
        self.load_state_dict(type(self).from_pretrained(directory).state_dict())


class BTL(RewardModel):
    """The model of Bradley, Terry and Luce: one reward an option, no context."""

    kind = "btl"

    def __init__(self, embedding_width: int, latent_width: int) -> None:
        super().__init__(embedding_width, latent_width, joined_width=latent_width, outputs=1)

    def forward(self, targets: Tensor) -> Tensor:
        """Rewards [U, P, 2] of options [U, P, 2, E]."""
        return self.decode(self.decoder0(self.encode_targets(targets))).squeeze(-1)

    def log_probs(self, rewards: Tensor) -> Tensor:
        """Log-probability [U, P, 2] that option 0, and option 1, is preferred."""
        return btl_log_probs(rewards)


class DPL(RewardModel):
    """Distributional preference learning: mean and deviation of an option's reward, no context."""

    kind = "dpl"

    def __init__(self, embedding_width: int, latent_width: int) -> None:
        super().__init__(embedding_width, latent_width, joined_width=latent_width, outputs=2)

    def forward(self, targets: Tensor) -> Tensor:
        """Mean and deviation, [U, P, 2, 2], of the rewards of options [U, P, 2, E]."""
        mean, s = self.decode(self.decoder0(self.encode_targets(targets))).unbind(-1)
        return torch.stack([mean, F.softplus(s)], -1)

    def log_probs(self, rewards: Tensor) -> Tensor:
        """Log-probability [U, P, 2] that option 0, and option 1, is preferred."""
        return dpl_log_probs(rewards)


class NPBTL(RewardModel):
    """BTL given each user's latent: a neural process over rewards.

    Args: embedding_width and latent_width as E and H; the others as for `ContextEncoder`, which is its `encoder`.
    """

    kind = "np-btl"
    fields = {
        **RewardModel.fields,
        "inner": str,
        "pooling": str,
        "heads": int,
        "dropout": float,
        "sampled": bool,
    }

    def __init__(
        self,
        embedding_width: int,
        latent_width: int,
        *,
        inner: str = EncoderConfig.inner,
        pooling: str = EncoderConfig.pooling,
        heads: int = EncoderConfig.heads,
        dropout: float = EncoderConfig.dropout,
        sampled: bool = EncoderConfig.sampled,
    ) -> None:
        super().__init__(embedding_width, latent_width, joined_width=2 * latent_width, outputs=1)
        self.encoder = ContextEncoder(
            embedding_width, latent_width, inner=inner, pooling=pooling, heads=heads, dropout=dropout, sampled=sampled
        )

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, by name."""
        return self.encoder.config

    def encode(self, pairs: Tensor, choices: Tensor, offsets: Tensor) -> Tensor:
        """Users' packed choices to [U, Z], as `ContextEncoder`, of options as they come."""
        return self.encoder(self.scaled(pairs), choices, offsets)

    def rewards(self, targets: Tensor, latents: Tensor) -> Tensor:
        """Rewards of options [U, P, 2, E] under latents [U, H] or, for S samples, [S, U, H].

        Returns: [U, P, 2], or [S, U, P, 2].
        Raises: ValueError, TypeError naming the argument.
        """
        encoded = self.encode_targets(targets)
        users = (targets.shape[0], self.latent_width)
        check_tensor("latents", latents, users if latents.dim() == 2 else (None, *users), encoded)
        # decoder0 of [target ; latent], a latent's part once a user instead of once an option.
        target_weight, latent_weight = self.decoder0.weight.split(self.latent_width, 1)
        hidden = F.linear(encoded, target_weight) + F.linear(latents, latent_weight)[..., None, None, :]
        return self.decode(hidden).squeeze(-1)

    def forward(
        self, targets: Tensor, pairs: Tensor, choices: Tensor, offsets: Tensor, noise: Tensor | None = None
    ) -> Tensor:
        """Rewards of options [U, P, 2, E] given each user's choices.

        Args:
            targets: the options to judge, [U, P, 2, E].
            pairs, choices, offsets: the contexts of the U users, packed (`pack_choices`).
            noise: for sampled latents, standard normal [U, H] or [S, U, H]; None takes the mean.

        Returns: [U, P, 2], or [S, U, P, 2] where noise is [S, U, H].
        Raises: ValueError, TypeError naming the argument.
        """
        return self.rewards(targets, self.encoder.latents(self.scaled(pairs), choices, offsets, noise))

    def log_probs(self, rewards: Tensor) -> Tensor:
        """Log-probability, shaped like rewards, that option 0, and option 1, is preferred."""
        return btl_log_probs(rewards)
