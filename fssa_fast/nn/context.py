"""The context encoder as a module: from the choices of many users to their latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fssa_fast.arguments import INNER, POOLING, check_count, check_tensor
from fssa_fast.ops import ContextWeights, context, latent_of
from fssa_fast.ops.context import check_context, context_reference


def pack_choices(pairs: Sequence[Tensor], choices: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Packs the choices of U users, of different K, one user after the other.

    Args:
        pairs: a tensor [K, 2, E] for each user, K = 0 for one who has chosen nothing; one dtype and device.
        choices: integers [K] for each user.

    Returns: pairs [N, 2, E], choices [N] and offsets int64 [U + 1], N the sum of the K, as `ContextEncoder` takes them.
    Raises: ValueError, TypeError naming the argument; ValueError where there is no user.
    """
    if len(pairs) != len(choices) or not pairs:
        raise ValueError(
            f"pairs, choices: expected as many of one as of the other and at least one, got {len(pairs)} and "
            f"{len(choices)}"
        )
    for i, (pair, choice) in enumerate(zip(pairs, choices, strict=True)):
        check_tensor(f"pairs[{i}]", pair, (None, 2, pairs[0].shape[-1]), pairs[0])
        if choice.shape != pair.shape[:1] or choice.is_floating_point():
            raise ValueError(
                f"choices[{i}]: expected integers of shape {list(pair.shape[:1])}, got {choice.dtype} "
                f"{list(choice.shape)}"
            )
    counts = torch.tensor([0, *(len(pair) for pair in pairs)], device=pairs[0].device)
    return torch.cat(list(pairs)), torch.cat(list(choices)), counts.cumsum(0)


@dataclass(frozen=True)
class EncoderConfig:
    """The context encoder: from embeddings of width E to latents of width H.

    Its defaults are everyone's: the modules', the reward models', and those of `fssa train`.
    """

    embedding_width: int
    latent_width: int = 64
    inner: Literal["linear", "mlp"] = "mlp"
    pooling: Literal["self-attention", "mean", "sum"] = "self-attention"
    heads: int = 8
    dropout: float = 0.0
    sampled: bool = False


class ContextEncoder(nn.Module):
    """Encodes each user's choices, however many, to a latent; `fssa_fast.ops.context` has the mathematics.

    Args:
        embedding_width: E, of an option's embedding. latent_width: H.
        inner: "linear" or "mlp", applied to every choice.
        pooling: "self-attention" (summed over the choices), "mean" or "sum".
        heads: of the attention; divides H. dropout: on the attention, in training mode only.
        sampled: whether a latent is a normal distribution (Z = 2H) or a point (Z = H).

    Raises: ValueError, TypeError naming the argument.
    """

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
        super().__init__()
        check_count("embedding_width", embedding_width)
        check_count("latent_width", latent_width)
        check_count("heads", heads)
        if inner not in INNER:
            raise ValueError(f"inner: expected one of {INNER}, got {inner!r}")
        if pooling not in POOLING:
            raise ValueError(f"pooling: expected one of {POOLING}, got {pooling!r}")
        if pooling == "self-attention" and latent_width % heads:
            raise ValueError(f"heads: expected a divisor of latent_width = {latent_width}, got {heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {dropout}")
        if not isinstance(sampled, bool):
            raise TypeError(f"sampled: expected a bool, got {sampled!r}")
        self.embedding_width, self.latent_width = embedding_width, latent_width
        self.inner_kind, self.pooling, self.heads = inner, pooling, heads
        self.dropout, self.sampled = dropout, sampled
        self.inner0 = nn.Linear(2 * embedding_width, latent_width)
        self.inner1 = nn.Linear(latent_width, latent_width) if inner == "mlp" else None
        self.qkv = self.out = None
        if pooling == "self-attention":
            self.qkv = nn.Linear(latent_width, 3 * latent_width)
            self.out = nn.Linear(latent_width, latent_width)
            # As torch's MultiheadAttention begins.
            nn.init.xavier_uniform_(self.qkv.weight)
            nn.init.zeros_(self.qkv.bias)
            nn.init.zeros_(self.out.bias)
        self.outer0 = nn.Linear(latent_width, latent_width)
        self.outer1 = nn.Linear(latent_width, 2 * latent_width if sampled else latent_width)

    @property
    def config(self) -> dict[str, int | float | str | bool]:
        """The constructor's arguments, by name."""
        return {
            "embedding_width": self.embedding_width,
            "latent_width": self.latent_width,
            "inner": self.inner_kind,
            "pooling": self.pooling,
            "heads": self.heads,
            "dropout": self.dropout,
            "sampled": self.sampled,
        }

    def weights(self) -> ContextWeights:
        """The weights as the op `context` takes them."""
        inner1, qkv, out = self.inner1, self.qkv, self.out
        return ContextWeights(
            inner0=self.inner0.weight,
            inner0_bias=self.inner0.bias,
            inner1=None if inner1 is None else inner1.weight,
            inner1_bias=None if inner1 is None else inner1.bias,
            qkv=None if qkv is None else qkv.weight,
            qkv_bias=None if qkv is None else qkv.bias,
            out=None if out is None else out.weight,
            out_bias=None if out is None else out.bias,
            outer0=self.outer0.weight,
            outer0_bias=self.outer0.bias,
            outer1=self.outer1.weight,
            outer1_bias=self.outer1.bias,
        )

    def forward(self, pairs: Tensor, choices: Tensor, offsets: Tensor) -> Tensor:
        """Encodes packed choices: pairs [N, 2, E], choices [N], offsets [U + 1] to [U, Z].

        Semantics, arguments and errors: as `fssa_fast.ops.context`.
        """
        if torch.is_autocast_enabled(pairs.device.type):
            with torch.autocast(pairs.device.type, enabled=False):  # in the encoder's own dtype, dropout or not
                return self(pairs.to(self.inner0.weight.dtype), choices, offsets)
        check_tensor("pairs", pairs, (None, 2, self.embedding_width), self.inner0.weight)
        weights, kind = self.weights(), (self.inner_kind, self.pooling, self.heads)
        if self.training and self.dropout > 0 and self.pooling == "self-attention":
            # Dropout is drawn for each weight of the attention matrix, which the kernels never form: only the
            # definition can apply it.
            check_context(pairs, choices, offsets, weights, *kind)
            return context_reference(pairs, choices, offsets, weights, *kind, self.dropout)
        return context(pairs, choices, offsets, weights, inner=self.inner_kind, pooling=self.pooling, heads=self.heads)

    def latents(self, pairs: Tensor, choices: Tensor, offsets: Tensor, noise: Tensor | None = None) -> Tensor:
        """The latents of packed choices, [U, H], or [S, U, H] where noise is [S, U, H].

        `noise`, standard normal, [U, H] or [S, U, H], is for sampled latents: mean + deviation * noise; None gives
        the mean. Raises: as `forward`, and ValueError for noise where latents are not sampled.
        """
        if noise is not None:
            if not self.sampled:
                raise ValueError("noise: expected None, as these latents are not sampled, got a tensor")
            users = (offsets.shape[0] - 1, self.latent_width)
            check_tensor("noise", noise, users if noise.dim() == 2 else (None, *users), self.inner0.weight)
        return latent_of(self(pairs, choices, offsets), self.latent_width, noise)

    def distribution(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation, [U, H] each, of the latents of `forward`'s result; ValueError if they are not sampled."""
        if not self.sampled:
            raise ValueError("encoded: these latents are points (sampled=False) and have no distribution")
        mean, s = encoded.split(self.latent_width, -1)
        return mean, F.softplus(s)
