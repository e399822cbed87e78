"""From what a request asks for, a user's name or a blend or a latent itself, to the text that the workers steer by."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fssa_fast.nn import ContextEncoder
from fssa_fast.users.open_store import open_store
from fssa_fast.users.store import StoreError, UserStore
from fssa_fast.users.stored_users import encoder_fingerprint
from fssa_fast.vllm.latents import BASE, KEY, PRIOR, Steering, decode, encode
from fssa_fast.vllm.options import STORE, Options
from fssa_fast.vllm.saved import PolicyFiles, read_policy

KEYS = {"fssa_user", "fssa_users", "fssa_strength", "fssa_latent", KEY}


@dataclass(frozen=True)
class Bound:
    """What some columns of a row may hold: numbers up to limit.

    A user's are at most |strength| (weight |z| + bias).

    weight, bias: the largest norm of a row of the modulator's weight, and the largest number of its bias.
    """

    weight: float
    bias: float
    limit: float


def row_bounds(policy: PolicyFiles, dtype: torch.dtype) -> list[Bound]:
    """Bounds under which hidden states stay finite, whatever the latent.

    Not for the client's sake: what is not finite stays in the blocks of the cache that the request leaves, and
    attention multiplies that by 0 before the next request writes it: NaN, to somebody else. FiLM's scales multiply
    through all blocks, so that their product is bounded; what is added is bounded by itself, since a norm follows.
    """
    weight, bias = policy.modulator()
    scales = torch.zeros(len(bias), dtype=torch.bool)
    for film in policy.layout.films:
        scales[film.scale] = True
    room = torch.finfo(dtype).max / 1e4 if dtype == torch.float16 else torch.finfo(dtype).max / 1e8
    bounds = [Bound(0.0, 1.0, room**0.25)]  # the strengths of plain adapters
    for columns, limit in ((scales, room ** (1 / (len(policy.layout.films) + 1)) - 1), (~scales, room**0.25)):
        if columns.any():
            bounds.append(Bound(float(weight[columns].norm(dim=1).max()), float(bias[columns].abs().max()), limit))
    return bounds


class NamedUsers:
    """The users of a store, by name, as the workers are told of them.

    Args:
        store: None where only latents are sent. prior: the latent [H] of the empty context. encoder: the
            fingerprint of the one that made it.
        bounds: what rows may hold.
    """

    def __init__(
        self,
        store: UserStore | None,
        prior: Tensor,
        *,
        encoder: str,
        bounds: Sequence[Bound],
    ) -> None:
        self._store, self._prior, self._encoder = store, prior, encoder
        self._bounds = bounds

    @classmethod
    @torch.no_grad()
    def open(cls, options: Options, model_config: Any) -> NamedUsers:
        """Opens the store of a deployment, for the model of vLLM's configuration.

        Raises what `read_policy` raises; StoreError for a store of another encoder's latents.
        """
        policy = read_policy(options.policy, model_config)
        encoder = ContextEncoder(**asdict(policy.saved.config.encoder)).eval()
        parts = {name.removeprefix("encoder."): t for name, t in policy.tensors.items() if name.startswith("encoder.")}
        encoder.load_state_dict(parts)
        empty = torch.empty(0, 2, policy.saved.config.encoder.embedding_width)
        prior = encoder.latents(empty, torch.empty(0, dtype=torch.long), torch.tensor([0, 0]))[0].bfloat16()
        store = None if options.users is None else open_store(options.users)
        fingerprint = encoder_fingerprint(encoder)
        if store is not None and store.about().get("encoder") not in (None, fingerprint):
            raise StoreError(f"{options.users}: expected latents of the policy's encoder, got another's")
        return cls(
            store,
            prior,
            encoder=fingerprint,
            bounds=row_bounds(policy, model_config.dtype),
        )

    def text(self, asked: Mapping[str, Any]) -> str | None:
        """The text for a request's extra arguments; None is the base model.

        fssa_user: a name, BASE or PRIOR. fssa_users: a blend, weights by name, as an object or its JSON.
        fssa_latent: a text of `latents.encode`. None of them is the prior. fssa_strength: multiplies it.
        Raises LookupError for an unknown user; ValueError for what cannot be a steering; StoreError.
        """
        unknown = sorted(key for key in asked if key.startswith("fssa") and key not in KEYS - {KEY})
        if unknown:
            raise ValueError(f"{unknown[0]}: unknown; expected some of {sorted(KEYS - {KEY})}")
        ways = [key for key in ("fssa_user", "fssa_users", "fssa_latent") if key in asked]
        if len(ways) > 1:
            raise ValueError(f"{ways[0]}: expected it alone, got {' and '.join(ways)}")
        way = ways[0] if ways else None
        if way == "fssa_users":
            steering = self._blend(_weights(asked[way]))
        elif way == "fssa_latent":
            steering = decode(asked[way], len(self._prior))
        else:
            name = asked.get("fssa_user", PRIOR)
            if name == BASE:
                return None
            steering = self._named(name)
        strength = steering.strength * _number("fssa_strength", asked.get("fssa_strength", 1.0))
        self._check_row(strength, steering.latent)
        return encode(Steering(strength, steering.latent))

    def _named(self, name: Any) -> Steering:
        if not isinstance(name, str) or not name:
            raise ValueError(f"user: expected a name, got {name!r}")
        if name == PRIOR:
            return Steering(1.0, self._prior)
        if self._store is None:
            raise LookupError(f"user: expected none, since no store is named by {STORE}, got {name[:80]!r}")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"user: expected a text in Unicode, got {name[:80]!r}") from None
        user = self._store.get(name)
        if user is None:
            raise LookupError(f"user: expected one that the store has, got {name[:80]!r}")
        if user.encoder != self._encoder:
            raise StoreError(f"store: expected a latent of the policy's encoder for {name!r}, got another's")
        return Steering(user.strength, user.latent)

    def _blend(self, weights: Mapping[str, float]) -> Steering:
        """The strength and latent whose row is the weighted sum of the users' rows."""
        strength, latent = 0.0, torch.zeros(len(self._prior), dtype=torch.float64)
        for name, weight in weights.items():
            share = _number("fssa_users", weight)
            if name == BASE:
                continue
            user = self._named(name)
            strength += share * user.strength
            latent += share * user.strength * user.latent.double()
        if strength:
            latent = latent / strength
        elif latent.any():
            raise ValueError(f"fssa_users: expected weights whose sum with strengths is not 0, got {dict(weights)}")
        if not math.isfinite(strength) or not torch.isfinite(latent.bfloat16()).all():
            raise ValueError("fssa_users: expected weights whose sum is finite, got NaN or infinity")
        return Steering(strength, latent.bfloat16())

    def _check_row(self, strength: float, latent: Tensor) -> None:
        norm = float(latent.double().norm())
        for bound in self._bounds:
            largest = abs(strength) * (bound.weight * norm + bound.bias)
            if not largest <= bound.limit:
                raise ValueError(f"fssa_strength: expected rows up to {bound.limit:.3g}, got up to {largest:.3g}")


def _number(name: str, value: Any) -> float:
    largest = sys.float_info.max
    if isinstance(value, bool) or not isinstance(value, int | float) or not -largest <= value <= largest:
        raise ValueError(f"{name}: expected a finite number, got {str(value)[:80]!r}")
    return float(value)


def _weights(value: Any) -> Mapping[str, float]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"fssa_users: expected JSON of weights by name, got {value[:80]!r}") from error
    if not isinstance(value, Mapping) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError(f"fssa_users: expected weights by name, at least one, got {str(value)[:80]!r}")
    if len(value) > 64:
        raise ValueError(f"fssa_users: expected at most 64 users, got {len(value)}")
    return value
