"""The users of a policy: by name, each a few choices, a latent, and a row of the bank."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from typing import Protocol

import torch
from torch import Tensor

from fssa_fast.nn import ContextEncoder, Modulator
from fssa_fast.ops import context_rows_
from fssa_fast.users.bank import BASE_SLOT, PRIOR_SLOT, Bank
from fssa_fast.users.choices import Choice, embed_choices
from fssa_fast.users.embedder import TextEmbedder

BASE = "__base__"
"""The base model itself: no adapter, no modulation."""
PRIOR = "__prior__"
"""The user of whom nothing is known: the empty context."""

_RESERVED = {BASE: BASE_SLOT, PRIOR: PRIOR_SLOT}


class UnknownUser(KeyError):
    """No user has that name."""

    def __str__(self) -> str:
        return str(self.args[0])


class Steerer(Protocol):
    """What users need of a policy."""

    encoder: ContextEncoder
    modulator: Modulator
    embedder: TextEmbedder | None
    bank: Bank


@dataclass(frozen=True)
class User:
    """A user as the bank holds it. `latent` is None for a blend of other users; `version` counts changes of the row."""

    name: str
    slot: int
    version: int
    pairs: Tensor
    latent: Tensor | None
    strength: float


class Users:
    """Adds, changes, blends and removes users. Every change is whole or not at all, and safe between threads.

    A running generation keeps the row that it began with, whatever happens to its users meanwhile.
    """

    def __init__(self, policy: Steerer) -> None:
        self._policy = policy
        self._users: dict[str, User] = {}
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._users)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._users))

    def __contains__(self, name: object) -> bool:
        return name in self._users

    def __getitem__(self, name: str) -> User:
        try:
            return self._users[name]
        except KeyError:
            known = ", ".join(list(self._users)[:8]) or "nobody"
            raise UnknownUser(f"user: expected BASE, PRIOR or one of {known}; got {name!r}") from None

    # ------------------------------------------------------------ from choices

    def add(self, name: str, choices: Sequence[Choice]) -> User:
        """Adds a user from choices (none: the same as PRIOR). Raises ValueError for a name taken; BankFull."""
        return self.add_many({name: choices})[0]

    def add_many(self, users: Mapping[str, Sequence[Choice]]) -> list[User]:
        """Adds several users, encoded together: one call from their choices to their rows."""
        with self._lock:
            for name in users:
                self._check_new(name)
            pairs = [self._embed(choices) for choices in users.values()]
            with self._policy.bank.take(len(users)) as slots:
                latents = self._write(slots, pairs, [1.0] * len(users))
            for name, slot, own, latent in zip(users, slots, pairs, latents, strict=True):
                self._users[name] = User(name, slot, 1, own, latent, 1.0)
            return [self._users[name] for name in users]

    def update(self, name: str, choices: Sequence[Choice]) -> User:
        """Replaces a user's choices."""
        with self._lock:
            return self._rewrite([replace(self[name], pairs=self._embed(choices))])[0]

    def add_choices(self, name: str, choices: Sequence[Choice]) -> User:
        """Adds to a user's choices. Raises ValueError for a blend, which has none of its own."""
        with self._lock:
            user = self[name]
            if user.latent is None:
                raise ValueError(f"user: expected one known by choices, got {name!r}, a blend of other users")
            return self._rewrite([replace(user, pairs=torch.cat([user.pairs, self._embed(choices)]))])[0]

    # ------------------------------------------------------------ from other users

    def interpolate(self, name: str, weights: Mapping[str, float]) -> User:
        """Adds a user whose row is the weighted sum of others' (BASE, PRIOR and blends too) as they are now.

        Modulations are affine in the latent, so with weights that add up to 1 this is the user of the mixed latent.
        """
        with self._lock:
            self._check_new(name)
            if not weights:
                raise ValueError("weights: expected at least one user, got none")
            row = self.blend(weights)
            with self._policy.bank.take() as (slot,):
                self._policy.bank.rows[slot] = row
            self._users[name] = User(name, slot, 1, self._embed([]), None, 1.0)
            return self._users[name]

    def blend(self, weights: Mapping[str, float]) -> Tensor:
        """The weighted sum [M] of users' rows. Raises ValueError for a weight, or a sum, that is not finite."""
        rows = self._policy.bank.rows
        with self._lock:
            row = torch.zeros_like(rows[0], dtype=torch.promote_types(rows.dtype, torch.float32))
            for name, weight in weights.items():
                row += _finite("weights", weight) * rows[self.slot(name)]
        if not torch.isfinite(row.to(rows.dtype)).all():
            raise ValueError(f"weights: expected ones whose sum of rows is finite in {rows.dtype}, got {dict(weights)}")
        return row.to(rows.dtype)

    def scale(self, name: str, strength: float) -> User:
        """Sets how strongly a user steers: 0 is the base model, 1 as encoded, beyond 1 exaggerates."""
        with self._lock:
            user = self[name]
            strength = _finite("strength", strength)
            if user.latent is None:
                raise ValueError(f"user: expected one known by choices, got {name!r}, a blend; give it other weights")
            return self._rewrite([replace(user, strength=strength)])[0]

    def remove(self, name: str) -> None:
        """Forgets a user. Generations that serve it end as they began."""
        with self._lock:
            user = self[name]
            del self._users[name]
            self._policy.bank.release(user.slot)

    # ------------------------------------------------------------ for a batch

    def slot(self, name: str) -> int:
        """The slot of a user, of BASE, or of PRIOR."""
        reserved = _RESERVED.get(name)
        return self[name].slot if reserved is None else reserved

    @contextmanager
    def slots(self, names: Sequence[str]) -> Iterator[Tensor]:
        """The slots [B] of a batch's users, their rows kept as they are for the block."""
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"users: expected a list of names, one a row, got {names!r}")
        with ExitStack() as pins:
            with self._lock:
                slots: list[int] = []
                for name in names:  # pinned one by one: to fetch the next may evict those that are not
                    slots.append(self.slot(name))
                    pins.enter_context(self._policy.bank.pin(slots[-1:]))
            yield torch.tensor(slots, dtype=torch.int32, device=self._policy.bank.rows.device)

    def refresh(self) -> None:
        """Writes the prior's row and every user's again, after the encoder or the modulator has changed.

        Blends have no choices to be encoded again and keep their rows; the prior's changes for running generations too.
        """
        with self._lock:
            self._rewrite([user for user in self._users.values() if user.latent is not None])
            self._write([PRIOR_SLOT], [self._embed([])], [1.0])

    # ------------------------------------------------------------ inside

    def _check_new(self, name: str) -> None:
        if not isinstance(name, str) or not name or name.startswith("__"):
            raise ValueError(f"name: expected a text that does not begin with two underscores, got {name!r}")
        if name in self._users:
            raise ValueError(f"name: expected a new one, got {name!r}, which is taken; use update or add_choices")

    def _embed(self, choices: Sequence[Choice]) -> Tensor:
        return embed_choices(choices, self._policy.encoder.embedding_width, self._policy.embedder)

    def _rewrite(self, users: Sequence[User]) -> list[User]:
        """Gives users, with new pairs or strengths, their rows: in place, or in another slot where theirs is pinned."""
        bank = self._policy.bank
        pinned = [bank.pinned(user.slot) for user in users]
        with bank.take(sum(pinned)) as taken:
            others = iter(taken)
            slots = [next(others) if pin else user.slot for user, pin in zip(users, pinned, strict=True)]
            latents = self._write(slots, [user.pairs for user in users], [user.strength for user in users])
        changed = []
        for user, slot, latent in zip(users, slots, latents, strict=True):
            changed.append(replace(user, slot=slot, version=user.version + 1, latent=latent))
            self._users[user.name] = changed[-1]
            if slot != user.slot:
                bank.release(user.slot)
        return changed

    @torch.no_grad()
    def _write(self, slots: list[int], pairs: list[Tensor], strengths: list[float]) -> list[Tensor]:
        if not slots:
            return []
        encoder, modulator, bank = self._policy.encoder, self._policy.modulator, self._policy.bank
        weight = modulator.weight
        where = torch.tensor(slots, device=weight.device)
        before = bank.rows[where]
        latents = context_rows_(
            bank.modulations,
            where,
            *packed(pairs, weight),
            encoder.weights(),
            modulation=weight,
            modulation_bias=modulator.bias,
            inner=encoder.inner_kind,
            pooling=encoder.pooling,
            heads=encoder.heads,
        )
        bank.strengths[where] = 1.0
        bank.rows[where] *= torch.tensor(strengths, device=weight.device).to(before).unsqueeze(1)
        if not torch.isfinite(bank.rows[where]).all():
            bank.rows[where] = before
            raise ValueError(
                f"users: expected rows finite in {before.dtype}, got NaN or infinity from these choices or strengths"
            )
        return list(latents.cpu())


def packed(pairs: Sequence[Tensor], weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Users' pairs [K, 2, E], what was chosen first, as the ops take them: pairs, choices, and offsets on the CPU."""
    joined = torch.cat(list(pairs)).to(weight)
    offsets = torch.tensor([0, *(len(own) for own in pairs)]).cumsum(0)
    return joined, torch.zeros(len(joined), dtype=torch.long, device=weight.device), offsets


def _finite(name: str, value: float) -> float:
    largest = sys.float_info.max
    if isinstance(value, bool) or not isinstance(value, Real) or not -largest <= value <= largest:
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return float(value)
