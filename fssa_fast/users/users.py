"""The users of a policy: by name, each a few choices, a latent, and a row of the bank."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from fssa_fast.nn import ContextEncoder, Modulator
from fssa_fast.ops import context_rows_
from fssa_fast.users.bank import BASE_SLOT, Bank
from fssa_fast.users.choices import Choice, embed_choices
from fssa_fast.users.embedder import TextEmbedder
from fssa_fast.users.limits import check_choices, check_name, finite

BASE = "__base__"
"""The base model itself: no adapter, no modulation."""
PRIOR = "__prior__"
"""The user of whom nothing is known: the empty context."""


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

    A running generation keeps the row that it began with, PRIOR's too, whatever happens to its users meanwhile. Texts
    are embedded before anything is locked, so that nobody waits for another's. Names, texts and choices of a call have
    limits: see `fssa_fast.users.limits`; what is beyond them raises ValueError.
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
            raise UnknownUser(f"user: expected BASE, PRIOR or one that has been added, got {name!r}") from None

    # ------------------------------------------------------------ from choices

    def add(self, name: str, choices: Sequence[Choice]) -> User:
        """Adds a user from choices (none: the same as PRIOR). Raises ValueError for a name taken; BankFull."""
        return self.add_many({name: choices})[0]

    def add_many(self, users: Mapping[str, Sequence[Choice]]) -> list[User]:
        """Adds several users, encoded together: one call from their choices to their rows."""
        for name in users:
            self._check_new(name)
        pairs = [self._embed(choices) for choices in users.values()]
        with self._lock:
            for name in users:  # one may have been taken meanwhile
                self._check_new(name)
            rows, latents = self._rows(pairs, [1.0] * len(users))
            with self._policy.bank.take(len(users)) as slots:
                self._policy.bank.rows[slots] = rows
            for name, slot, own, latent in zip(users, slots, pairs, latents, strict=True):
                self._users[name] = User(name, slot, 1, own, latent, 1.0)
            return [self._users[name] for name in users]

    def update(self, name: str, choices: Sequence[Choice]) -> User:
        """Replaces a user's choices."""
        self[name]  # one that is not there is found out before anything is embedded
        pairs = self._embed(choices)
        with self._lock:
            return self._rewrite([replace(self[name], pairs=pairs)])[0]

    def add_choices(self, name: str, choices: Sequence[Choice]) -> User:
        """Adds to a user's choices. Raises ValueError for a blend, which has none of its own."""
        self._check_grows(self[name])
        pairs = self._embed(choices)
        with self._lock:
            user = self._check_grows(self[name])
            return self._rewrite([replace(user, pairs=torch.cat([user.pairs, pairs]))])[0]

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
            self._users[name] = User(name, slot, 1, self._no_pairs(), None, 1.0)
            return self._users[name]

    def blend(self, weights: Mapping[str, float]) -> Tensor:
        """The weighted sum [M] of users' rows. Raises ValueError for a weight, or a sum, that is not finite."""
        rows = self._policy.bank.rows
        row = torch.zeros_like(rows[0], dtype=torch.promote_types(rows.dtype, torch.float32))
        for name, weight in weights.items():
            with self._at(name) as slot:
                row += finite("weights", weight) * rows[slot]
        if not torch.isfinite(row.to(rows.dtype)).all():
            raise ValueError(f"weights: expected ones whose sum of rows is finite in {rows.dtype}, got {dict(weights)}")
        return row.to(rows.dtype)

    def scale(self, name: str, strength: float) -> User:
        """Sets how strongly a user steers: 0 is the base model, 1 as encoded, beyond 1 exaggerates."""
        with self._lock:
            user = self[name]
            strength = finite("strength", strength)
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
        """The slot of a user, of BASE, or of PRIOR; it may be another one after the next change."""
        with self._at(name) as slot:
            return slot

    @contextmanager
    def slots(self, names: Sequence[str]) -> Iterator[Tensor]:
        """The slots [B] of a batch's users, their rows kept as they are for the block."""
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"users: expected a list of names, one a row, got {names!r}")
        with ExitStack() as pins:
            found: dict[str, int] = {}
            for name in names:  # pinned one by one: to fetch the next may evict those that are not
                if name not in found:
                    with self._at(name) as slot:
                        pins.enter_context(self._policy.bank.pin([slot]))
                    found[name] = slot
            where = [found[name] for name in names]
            yield torch.tensor(where, dtype=torch.int32, device=self._policy.bank.rows.device)

    # ------------------------------------------------------------ after the weights have changed

    def refresh(self) -> None:
        """Writes the prior's row and every user's again, after the encoder or the modulator has changed.

        Whole or not at all, and never under a running generation: a row that somebody reads is left, and written in
        another slot. Raises BankFull where there is none for it; ValueError for rows that are not finite. Blends have
        no choices to be encoded again and keep their rows.
        """
        with self._lock:
            self._write_again()

    @torch.no_grad()
    def strengthen(self, strength: float) -> None:
        """Multiplies the modulator by `strength`, and writes the rows again: weights and rows, or neither."""
        factor, modulator = finite("strength", strength), self._policy.modulator
        with self._lock:
            before = modulator.weight.clone(), modulator.bias.clone()
            try:
                modulator.weight.mul_(factor)
                modulator.bias.mul_(factor)
                self._write_again()
            except BaseException:
                modulator.weight.copy_(before[0])
                modulator.bias.copy_(before[1])
                raise

    # ------------------------------------------------------------ inside

    def _check_new(self, name: str) -> None:
        check_name(name)
        if name in self._users:
            raise ValueError(f"name: expected a new one, got {name!r}, which is taken; use update or add_choices")

    @contextmanager
    def _at(self, name: str) -> Iterator[int]:
        """The slot of a user, of BASE, or of PRIOR, which stays that user's for the block."""
        with self._lock:
            yield self._reserved(name) if name in (BASE, PRIOR) else self[name].slot

    def _reserved(self, name: str) -> int:
        return BASE_SLOT if name == BASE else self._policy.bank.prior

    @staticmethod
    def _check_grows(user: User) -> User:
        if user.latent is None:
            raise ValueError(f"user: expected one known by choices, got {user.name!r}, a blend of other users")
        return user

    def _no_pairs(self) -> Tensor:
        return torch.empty(0, 2, self._policy.encoder.embedding_width)

    def _embed(self, choices: Sequence[Choice]) -> Tensor:
        if isinstance(choices, Sequence) and all(isinstance(choice, Choice) for choice in choices):
            check_choices(choices)  # what is no sequence of choices is refused below
        return embed_choices(choices, self._policy.encoder.embedding_width, self._policy.embedder)

    def _write_again(self) -> None:
        """All rows, of the weights as they are now."""
        self._rewrite([user for user in self._users.values() if user.latent is not None], and_prior=True)

    def _rewrite(self, users: Sequence[User], and_prior: bool = False) -> list[User]:
        """Gives users, with new pairs or strengths, their rows: in place, or in another slot where theirs is pinned.

        The prior's row is the last where it is asked for. Nothing is written before all rows and slots are there.
        """
        bank = self._policy.bank
        pairs, strengths = [user.pairs for user in users], [user.strength for user in users]
        slots = [user.slot for user in users]
        if and_prior:
            pairs, strengths, slots = [*pairs, self._no_pairs()], [*strengths, 1.0], [*slots, bank.prior]
        rows, latents = self._rows(pairs, strengths)
        pinned = [bank.pinned(slot) for slot in slots]
        with bank.take(sum(pinned)) as taken:
            others = iter(taken)
            new = [next(others) if pin else slot for slot, pin in zip(slots, pinned, strict=True)]
            bank.rows[new] = rows
        changed = []
        for user, slot, latent in zip(users, new, latents, strict=False):
            changed.append(replace(user, slot=slot, version=user.version + 1, latent=latent))
            self._users[user.name] = changed[-1]
        if and_prior:
            bank.prior = new[-1]
        for slot, pin in zip(slots, pinned, strict=True):
            if pin:
                bank.release(slot)
        return changed

    @torch.no_grad()
    def _rows(self, pairs: Sequence[Tensor], strengths: Sequence[float]) -> tuple[Tensor, list[Tensor]]:
        """Rows [U, M] beside the bank, and latents on the CPU, of users' pairs. ValueError for rows not finite."""
        encoder, modulator, bank = self._policy.encoder, self._policy.modulator, self._policy.bank
        weight = modulator.weight
        rows = bank.rows.new_ones(len(pairs), bank.rows.shape[1])
        if not pairs:
            return rows, []
        latents = context_rows_(
            rows[:, : bank.modulated],
            torch.arange(len(pairs), device=weight.device),
            *packed(pairs, weight),
            encoder.weights(),
            modulation=weight,
            modulation_bias=modulator.bias,
            inner=encoder.inner_kind,
            pooling=encoder.pooling,
            heads=encoder.heads,
        )
        rows *= torch.tensor(strengths, device=weight.device).to(rows).unsqueeze(1)
        if not torch.isfinite(rows).all():
            raise ValueError(
                f"users: expected rows finite in {rows.dtype}, got NaN or infinity from these choices or strengths"
            )
        return rows, list(latents.cpu())


def packed(pairs: Sequence[Tensor], weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Users' pairs [K, 2, E], what was chosen first, as the ops take them: pairs, choices, and offsets on the CPU."""
    joined = torch.cat(list(pairs)).to(weight)
    offsets = torch.tensor([0, *(len(own) for own in pairs)]).cumsum(0)
    return joined, torch.zeros(len(joined), dtype=torch.long, device=weight.device), offsets
