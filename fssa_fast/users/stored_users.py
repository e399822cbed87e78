"""The users of a policy, at rest in a store; the bank is a cache over it."""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fssa_fast.nn import ContextEncoder
from fssa_fast.users.choices import Choice
from fssa_fast.users.growing import GrowingContext
from fssa_fast.users.store import Change, Choices, Option, Stamp, StoredUser, StoreError, UserStore
from fssa_fast.users.users import BASE, PRIOR, Steerer, UnknownUser, User, Users, _finite, packed


class StoredUsers(Users):
    """Users that outlive the process, and may be far more than the bank has room for.

    Made by `SteerablePolicy.use_store`. Choices stay in the store: the `pairs` of a `User` are none here. A user is
    fetched when asked for, and leaves the bank, when room is needed, the longest unused first; a running generation's
    rows stay. Every change is one transaction of the store, and is there before the method returns; changes by other
    processes are seen at the next request. A row is made from the latent as it is at rest, in bfloat16, so that it is
    the same, bit for bit, however often the user is fetched.

    Args:
        keep_choices: False keeps latents alone, half a kilobyte a user; choices can then not be added later.

    Raises: StoreError where the store's latents are another encoder's (`refresh=True` encodes all users again); and
        from every method, where the database fails.
    """

    GROWING = 64  # users whose encoder state is kept, the last to be given choices

    def __init__(self, policy: Steerer, store: UserStore, *, keep_choices: bool = True, refresh: bool = False) -> None:
        super().__init__(policy)
        self._at_rest, self._keep_choices = store, keep_choices
        self._stamps: dict[str, Stamp] = {}
        self._growing: OrderedDict[str, tuple[Stamp, GrowingContext]] = OrderedDict()
        known, own = store.about().get("encoder"), _fingerprint(policy.encoder)
        if refresh:
            self.refresh()
        elif known is None:
            store.set_about({"encoder": own})
        elif known != own:
            raise StoreError(
                "store: expected latents of this policy's encoder, got another's; encode all users again "
                "with refresh=True"
            )
        this = weakref.ref(self)
        policy.bank.evict = lambda: (users := this()) is not None and users._evict()

    def __len__(self) -> int:
        return len(self._at_rest)

    def __iter__(self) -> Iterator[str]:
        return self._at_rest.names()

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._at_rest.stamp(name) is not None

    def __getitem__(self, name: str) -> User:
        with self._lock:
            stamp = self._at_rest.stamp(name)
            if stamp is None:
                self._forget(name)
                raise UnknownUser(f"user: expected BASE, PRIOR or one that the store has, got {name!r}")
            user = self._users.get(name)
            if user is None or self._stamps[name] != stamp:
                stored = self._stored(name)
                with self._policy.bank.take() as (slot,):
                    self._fill(slot, stored)
                return self._keep(stored, slot)
            self._users[name] = self._users.pop(name)  # now the last to leave
            return user

    def choices(self, name: str) -> Choices:
        """A user's choices. Raises ValueError where they were not kept; UnknownUser."""
        with self._lock:
            self._stored(name)
            choices = self._at_rest.choices(name)
        if choices is None:
            raise ValueError(f"user: expected one whose choices were kept, got {name!r}")
        for pair in choices:
            for option in pair:
                if len(option.embedding) != self._width:
                    raise StoreError(
                        f"store: expected embeddings of width {self._width}, got {len(option.embedding)} for {name!r}"
                    )
        return choices

    # ------------------------------------------------------------ changes

    def add_many(self, users: Mapping[str, Sequence[Choice]]) -> list[User]:
        """Adds several users and fetches them all: at most as many as the bank has room for; see `import_many`."""
        with self._lock:
            return self._commit(self._new(users))

    def import_many(
        self, users: Mapping[str, Sequence[Choice]], strengths: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        """Adds any number of users, encoded together, all or none, without fetching them; strengths: 1 if not named."""
        with self._lock:
            new = self._new(users)
            found = [_finite("strengths", strengths.get(change.user.name, 1.0)) for change in new]
            self._at_rest.put(
                [replace(c, user=replace(c.user, strength=one)) for c, one in zip(new, found, strict=True)]
            )

    def update(self, name: str, choices: Sequence[Choice]) -> User:
        """Replaces a user's choices."""
        with self._lock:
            stored, known = self._stored(name), self._options(choices)
            (latent,) = self._encode([_pairs(known, self._width)])
            return self._commit([self._changed(stored, self._kept(known), True, latent=_at_rest(latent))])[0]

    def add_choices(self, name: str, choices: Sequence[Choice]) -> User:
        """Adds to a user's choices: exactly, and in O(K H) for each where some have been added lately.

        Raises ValueError for a user whose choices were not kept.
        """
        with self._lock:
            stored, new = self._stored(name), self._options(choices)
            stamp, growing = self._growing.pop(name, (None, None))
            if growing is None or stamp != stored.stamp:
                growing = GrowingContext(self._policy.encoder)
                growing.append(_pairs(self.choices(name), self._width))
            growing.append(_pairs(new, self._width))
            (user,) = self._commit([self._changed(stored, new, latent=_at_rest(_finite_latents(growing.latent())))])
            self._growing[name] = self._stamps[name], growing
            while len(self._growing) > self.GROWING:
                self._growing.popitem(last=False)
            return user

    def scale(self, name: str, strength: float) -> User:
        """Sets how strongly a user steers: 0 is the base model, 1 as encoded, beyond 1 exaggerates."""
        with self._lock:
            return self._commit([self._changed(self._stored(name), strength=_finite("strength", strength))])[0]

    def interpolate(self, name: str, weights: Mapping[str, float]) -> User:
        """Adds a user whose row is the weighted sum of others' (BASE and PRIOR too) as they are now.

        At rest it is the latent and the strength that give this row, but for the latent's rounding, and no choices.
        Raises ValueError for weights that with the users' strengths add up to 0, where the row is no latent's.
        """
        with self._lock:
            self._check_free(name)
            if not weights:
                raise ValueError("weights: expected at least one user, got none")
            strength, latent = 0.0, torch.zeros(self._policy.encoder.latent_width, dtype=torch.float64)
            for other, weight in weights.items():
                share = _finite("weights", weight)
                if other == BASE:
                    continue
                if other == PRIOR:
                    (own,) = self._encode([torch.empty(0, 2, self._width)])
                else:
                    stored = self._stored(other)
                    own, share = stored.latent, share * stored.strength
                strength += share
                latent += share * own.detach().cpu().double()
            if strength:
                latent = _finite_latents(latent / strength)
            elif latent.any():
                raise ValueError(f"weights: expected ones that with strengths do not add up to 0, got {dict(weights)}")
            return self._commit([Change(StoredUser(name, 1, strength, _at_rest(latent)), None, True)])[0]

    def remove(self, name: str) -> None:
        """Forgets a user, here and in the store. Generations that serve it end as they began."""
        with self._lock:
            if not self._at_rest.remove(name):
                raise UnknownUser(f"user: expected one that the store has, got {name!r}")
            self._forget(name)

    def refresh(self) -> None:
        """Encodes every user of the store again, after the encoder has changed; those without choices are kept.

        In steps, each a transaction: broken off, it is begun again by the next call.
        """
        with self._lock:
            names = self._at_rest.names()
            while batch := list(itertools.islice(names, 256)):
                self._encode_again(batch)
            for name in list(self._users):
                self._forget(name)
            super().refresh()  # the prior's row
            self._at_rest.set_about({"encoder": _fingerprint(self._policy.encoder)})

    # ------------------------------------------------------------ inside

    @property
    def _width(self) -> int:
        return self._policy.encoder.embedding_width

    def _stored(self, name: str) -> StoredUser:
        stored = self._at_rest.get(name)
        if stored is None:
            raise UnknownUser(f"user: expected one that the store has, got {name!r}")
        if len(stored.latent) != self._policy.encoder.latent_width:
            raise StoreError(
                f"store: expected latents of width {self._policy.encoder.latent_width}, got {len(stored.latent)} "
                f"for {name!r}"
            )
        return stored

    def _check_free(self, name: str) -> None:
        self._check_new(name)
        if name in self:
            raise ValueError(f"name: expected a new one, got {name!r}, which is taken; use update or add_choices")

    def _new(self, users: Mapping[str, Sequence[Choice]]) -> list[Change]:
        for name in users:
            self._check_free(name)
        known = [self._options(choices) for choices in users.values()]
        latents = self._encode([_pairs(own, self._width) for own in known])
        return [
            Change(StoredUser(name, 1, 1.0, _at_rest(latent)), self._kept(own), True)
            for name, latent, own in zip(users, latents, known, strict=True)
        ]

    @staticmethod
    def _changed(stored: StoredUser, choices: Choices | None = (), replaces: bool = False, **changes: Any) -> Change:
        return Change(replace(stored, version=stored.version + 1, **changes), choices, replaces)

    def _kept(self, choices: Choices) -> Choices | None:
        return choices if self._keep_choices else None

    def _options(self, choices: Sequence[Choice]) -> Choices:
        pairs = self._embed(choices)

        def option(text: str | Tensor, prompt: str, embedding: Tensor) -> Option:
            return Option(embedding, text, prompt) if isinstance(text, str) else Option(embedding)

        return [
            (option(choice.chosen, choice.prompt, pair[0]), option(choice.rejected, choice.prompt, pair[1]))
            for choice, pair in zip(choices, pairs, strict=True)
        ]

    @torch.no_grad()
    def _encode(self, pairs: Sequence[Tensor]) -> Tensor:
        """Latents [U, H] of users' pairs; ValueError where they are not finite."""
        if not pairs:
            return torch.empty(0)
        encoder, weight = self._policy.encoder, self._policy.encoder.inner0.weight
        return _finite_latents(encoder.latents(*packed(pairs, weight)))

    def _encode_again(self, names: Sequence[str]) -> None:
        users, pairs = [], []
        for name in names:
            user, choices = self._at_rest.get(name), self._at_rest.choices(name)
            if user is not None and choices is not None:
                users.append(user)
                pairs.append(_pairs(choices, self._width))
        latents = self._encode(pairs)
        self._at_rest.put([self._changed(u, latent=_at_rest(z)) for u, z in zip(users, latents, strict=True)])

    def _commit(self, changes: Sequence[Change]) -> list[User]:
        """Writes users to the store, and their rows to the bank; neither where either fails."""
        with self._policy.bank.take(len(changes)) as slots:
            for slot, change in zip(slots, changes, strict=True):
                self._fill(slot, change.user)
            stamps = self._at_rest.put(changes)
        return [
            self._keep(replace(change.user, stamp=stamp), slot)
            for slot, change, stamp in zip(slots, changes, stamps, strict=True)
        ]

    @torch.no_grad()
    def _fill(self, slot: int, user: StoredUser) -> None:
        """Writes one row, by itself: the bits of a row do not depend on who is fetched with it."""
        bank, modulator = self._policy.bank, self._policy.modulator
        row = F.linear(user.latent.to(modulator.weight)[None], modulator.weight, modulator.bias)[0]
        bank.modulations[slot] = (user.strength * row).to(bank.rows.dtype)
        bank.strengths[slot] = torch.tensor(user.strength, dtype=torch.float64).to(bank.rows)  # infinite, not an error
        if not torch.isfinite(bank.rows[slot]).all():
            raise ValueError(f"users: expected rows finite in {bank.rows.dtype}, got NaN or infinity for {user.name!r}")

    def _keep(self, stored: StoredUser, slot: int) -> User:
        """Makes a filled slot a user's."""
        self._forget(stored.name)
        pairs = torch.empty(0, 2, self._width)
        user = User(stored.name, slot, stored.version, pairs, stored.latent.float(), stored.strength)
        self._users[stored.name], self._stamps[stored.name] = user, stored.stamp
        return user

    def _forget(self, name: str) -> None:
        """Lets a user's slot go."""
        user = self._users.pop(name, None)
        if user is not None:
            del self._stamps[name]
            self._policy.bank.release(user.slot)

    def _evict(self) -> bool:
        """Lets the longest unused user's slot go whose row nobody reads; False where there is none."""
        with self._lock:
            for name, user in self._users.items():
                if not self._policy.bank.pinned(user.slot):
                    self._forget(name)
                    return True
            return False


def _at_rest(latent: Tensor) -> Tensor:
    return latent.detach().cpu().bfloat16()


def _finite_latents(latents: Tensor) -> Tensor:
    if not torch.isfinite(latents.bfloat16()).all():
        raise ValueError("users: expected finite latents, got NaN or infinity from these choices")
    return latents


def _pairs(choices: Choices, width: int) -> Tensor:
    """Embeddings [K, 2, E], chosen first."""
    sides = [option.embedding for pair in choices for option in pair]
    return torch.stack(sides).view(-1, 2, width) if sides else torch.empty(0, 2, width)


def _fingerprint(encoder: ContextEncoder) -> str:
    """Tells one encoder's weights from another's."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
