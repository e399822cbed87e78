"""The users of a policy, at rest in a store; the bank is a cache over it."""

from __future__ import annotations

import hashlib
import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fssa_fast.nn import ContextEncoder
from fssa_fast.users.choices import Choice
from fssa_fast.users.growing import GrowingContext
from fssa_fast.users.limits import check_name, finite
from fssa_fast.users.store import Change, Choices, Option, Stamp, StoreConflict, StoredUser, StoreError, UserStore
from fssa_fast.users.users import BASE, PRIOR, Steerer, UnknownUser, User, Users, packed


class StoredUsers(Users):
    """Users that outlive the process, and may be far more than the bank has room for.

    Made by `SteerablePolicy.use_store`. Choices stay in the store: the `pairs` of a `User` are none here. A user is
    fetched when asked for, and leaves the bank, when room is needed, the longest unused first; a running generation's
    rows stay. Every change is one transaction of the store, and is there before the method returns; changes by other
    processes are seen at the next request. A row is made from the latent as it is at rest, in bfloat16, so that it is
    the same, bit for bit, however often the user is fetched.

    A latent at rest carries the encoder that made it, and one of another encoder is never served: while a refresh is
    under way, here or in another process, such a user is encoded from the choices when asked for.

    Nobody who asks for a user waits for a change under way: no lock of this object is held while the database is
    written, nor while texts are embedded.

    Args:
        keep_choices: False keeps latents alone, half a kilobyte a user; choices can then not be added later.
        refresh: encode all users again where the store is another encoder's.
        shared: the store is one of several policies with encoders of their own, which embed texts alike. It may be any
            encoder's: a latent that another one has made is made anew from the choices whenever a user is fetched.

    A refresh of this policy's encoder that was broken off goes on when the store is opened.

    Raises: StoreError where the store is another encoder's, or a refresh towards another one's has not ended; and from
        every method, where the database fails, or the encoder's weights have changed without `refresh`.
    """

    GROWING = 64  # users whose encoder state is kept, the last to be given choices

    def __init__(
        self,
        policy: Steerer,
        store: UserStore,
        *,
        keep_choices: bool = True,
        refresh: bool = False,
        shared: bool = False,
    ) -> None:
        super().__init__(policy)
        self._at_rest, self._keep_choices = store, keep_choices
        self._stamps: dict[str, Stamp] = {}
        self._growing: OrderedDict[str, tuple[Stamp, GrowingContext]] = OrderedDict()
        # Changes of one user, one after the other; one lock for many users, so that there is nothing to clear away.
        self._changes = [threading.RLock() for _ in range(64)]
        self._again = 0  # how often all rows have been written again
        self._fingerprint, self._weights = encoder_fingerprint(policy.encoder), _versions(policy.encoder)
        about = store.about()
        known, towards = about.get("encoder"), about.get("refreshing")
        if refresh or towards == self._fingerprint:
            self.refresh()
        elif shared and known is not None:
            pass
        elif towards is not None:
            raise StoreError(
                "store: expected one that is not being encoded again, got one that is, for another policy's encoder; "
                "opened with that policy it goes on; refresh=True encodes all users again for this one"
            )
        elif known is None:
            store.set_about({"encoder": self._fingerprint})
        elif known != self._fingerprint:
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
        with self._fetched(name) as user:
            return user

    def choices(self, name: str) -> Choices:
        """A user's choices. Raises ValueError where they were not kept; UnknownUser."""
        self._stored(name)
        choices = self._at_rest.choices(name)
        if choices is None:
            raise _not_kept(name)
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
        return self._commit(self._new(users))

    def import_many(
        self, users: Mapping[str, Sequence[Choice]], strengths: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        """Adds any number of users, encoded together, all or none, without fetching them; strengths: 1 if not named."""
        found = {name: finite("strengths", strengths.get(name, 1.0)) for name in users}
        self._at_rest.put([replace(c, user=replace(c.user, strength=found[c.user.name])) for c in self._new(users)])

    def update(self, name: str, choices: Sequence[Choice]) -> User:
        """Replaces a user's choices."""
        self._stored(name)  # one that is not there is found out before anything is embedded
        known = self._options(choices)
        (latent,), encoder = self._encode([_pairs(known, self._width)])
        with self._changing(name):
            stored, kept = self._stored(name), self._kept(known)
            return self._commit([self._changed(stored, kept, True, latent=_at_rest(latent), encoder=encoder)])[0]

    def add_choices(self, name: str, choices: Sequence[Choice]) -> User:
        """Adds to a user's choices: exactly, and in O(K H) for each where some have been added lately.

        Raises ValueError for a user whose choices were not kept.
        """
        if self._stored(name).choices is None:
            raise _not_kept(name)
        new = self._options(choices)
        with self._changing(name):
            stored, encoder = self._stored(name), self._encoder()
            with self._lock:
                stamp, growing = self._growing.pop(name, (None, None))
            if growing is None or stamp != stored.stamp:
                growing = GrowingContext(self._policy.encoder)
                growing.append(_pairs(self.choices(name), self._width))
            growing.append(_pairs(new, self._width))
            latent = _at_rest(_finite_latents(growing.latent()))
            again = self._again
            (user,) = self._commit([self._changed(stored, new, latent=latent, encoder=encoder)])
            with self._lock:
                if again == self._again and name in self._stamps:
                    self._growing[name] = self._stamps[name], growing
                while len(self._growing) > self.GROWING:
                    self._growing.popitem(last=False)
            return user

    def remove_choices(self, name: str, which: Callable[[Option, Option], bool]) -> int:
        """Removes those of a user's choices, (chosen, rejected), that are asked for, and returns how many.

        Raises ValueError for a user whose choices were not kept; StoreConflict where they were changed meanwhile.
        """
        with self._changing(name):
            stored, known = self._stored(name), self.choices(name)
            kept = [pair for pair in known if not which(*pair)]
            if len(kept) < len(known):
                (latent,), encoder = self._encode([_pairs(kept, self._width)])
                self._commit([self._changed(stored, kept, True, latent=_at_rest(latent), encoder=encoder)])
            return len(known) - len(kept)

    def scale(self, name: str, strength: float) -> User:
        """Sets how strongly a user steers: 0 is the base model, 1 as encoded, beyond 1 exaggerates."""
        strength = finite("strength", strength)
        with self._changing(name):
            return self._commit([self._changed(self._current(name), strength=strength)])[0]

    def interpolate(self, name: str, weights: Mapping[str, float]) -> User:
        """Adds a user whose row is the weighted sum of others' (BASE and PRIOR too) as they are now.

        At rest it is the latent and the strength that give this row, but for the latent's rounding, and no choices.
        Raises ValueError for weights that with the users' strengths add up to 0, where the row is no latent's.
        """
        self._check_free(name)
        if not weights:
            raise ValueError("weights: expected at least one user, got none")
        strength, latent = 0.0, torch.zeros(self._policy.encoder.latent_width, dtype=torch.float64)
        (prior,), encoder = self._encode([self._no_pairs()])
        for other, weight in weights.items():
            share = finite("weights", weight)
            if other == BASE:
                continue
            if other == PRIOR:
                own = prior
            else:
                stored = self._current(other)
                own, share = stored.latent, share * stored.strength
            strength += share
            latent += share * own.detach().cpu().double()
        if strength:
            latent = _finite_latents(latent / strength)
        elif latent.any():
            raise ValueError(f"weights: expected ones that with strengths do not add up to 0, got {dict(weights)}")
        return self._commit([Change(StoredUser(name, 1, strength, _at_rest(latent), encoder), None, True)])[0]

    def remove(self, name: str) -> None:
        """Forgets a user, here and in the store. Generations that serve it end as they began.

        Raises StoreError where the user is gone, but a reader of the database kept older copies of it: it says so.
        """
        with self._changing(name):
            try:
                known = self._at_rest.remove(name)
            finally:
                with self._lock:
                    self._forget(name)
                    self._growing.pop(name, None)
            if not known:
                raise _unknown(name)

    def refresh(self) -> None:
        """Writes all rows again, after the encoder or the modulator has changed, and the store where it is behind.

        Rows whole or not at all, as `Users.refresh`. The store in steps, each a transaction: it says from the first on
        towards which encoder, and, broken off, goes on at the next call, or when it is opened. Users without choices
        cannot be encoded again: asked for, they raise StoreError until they are updated or removed.
        """
        fingerprint, weights = encoder_fingerprint(self._policy.encoder), _versions(self._policy.encoder)
        with self._lock:
            self._write_again()
            self._fingerprint, self._weights = fingerprint, weights
        about = self._at_rest.about()
        if about.get("encoder") != fingerprint or "refreshing" in about:
            self._encode_store_again(fingerprint)

    # ------------------------------------------------------------ inside

    @property
    def _width(self) -> int:
        return self._policy.encoder.embedding_width

    def _encoder(self) -> str:
        """The fingerprint of the policy's encoder, which nobody has changed since it was taken."""
        encoder = self._policy.encoder
        if (weights := _versions(encoder)) != self._weights:
            if encoder_fingerprint(encoder) != self._fingerprint:
                raise StoreError(
                    "store: expected the encoder's weights as they were when it was opened, got others; "
                    "policy.users.refresh() encodes all users again"
                )
            self._weights = weights
        return self._fingerprint

    @contextmanager
    def _changing(self, name: str) -> Iterator[None]:
        """Nobody else in this process changes this user in the block; readers do not wait for it."""
        with self._changes[hash(name) % len(self._changes)]:
            yield

    @contextmanager
    def _at(self, name: str) -> Iterator[int]:
        if name in (BASE, PRIOR):
            with self._lock:
                yield self._reserved(name)
        else:
            with self._fetched(name) as user:
                yield user.slot

    @contextmanager
    def _fetched(self, name: str) -> Iterator[User]:
        """A user as it is in the store, in the bank, and not evicted in the block."""
        encoder, stamp = self._encoder(), self._at_rest.stamp(name)
        if stamp is None:
            with self._lock:
                self._forget(name)
            raise _unknown(name)
        with self._lock:
            user = self._users.get(name)
            if user is not None and self._stamps[name] == stamp and encoder == self._fingerprint:
                self._users[name] = self._users.pop(name)  # now the last to leave
                yield user
                return
        while True:
            stored = self._current(name)
            with self._lock:
                if stored.encoder == self._fingerprint:  # no refresh meanwhile
                    with self._policy.bank.take() as (slot,):
                        self._fill(slot, stored)
                    yield self._keep(stored, slot)
                    return

    def _stored(self, name: str) -> StoredUser:
        stored = self._at_rest.get(name)
        if stored is None:
            raise _unknown(name)
        return stored

    def _current(self, name: str) -> StoredUser:
        """A user with a latent of this policy's encoder: the one at rest, or one made now from the choices."""
        encoder = self._encoder()
        while True:
            stored = self._stored(name)
            if stored.encoder == encoder:
                if len(stored.latent) != self._policy.encoder.latent_width:
                    raise StoreError(
                        f"store: expected latents of width {self._policy.encoder.latent_width}, "
                        f"got {len(stored.latent)} for {name!r}"
                    )
                return stored
            if stored.choices is None:
                raise StoreError(
                    f"store: expected a latent of this policy's encoder, got another's for {name!r}, whose choices are "
                    "not kept; update or remove the user"
                )
            pairs = _pairs(self.choices(name), self._width)
            if self._at_rest.stamp(name) == stored.stamp:  # the choices of this version
                (latent,), encoder = self._encode([pairs])
                return replace(stored, latent=_at_rest(latent), encoder=encoder)

    def _check_free(self, name: str) -> None:
        check_name(name)
        if name in self:
            raise ValueError(f"name: expected a new one, got {name!r}, which is taken; use update or add_choices")

    def _new(self, users: Mapping[str, Sequence[Choice]]) -> list[Change]:
        for name in users:
            self._check_free(name)
        known = [self._options(choices) for choices in users.values()]
        latents, encoder = self._encode([_pairs(own, self._width) for own in known])
        return [
            Change(StoredUser(name, 1, 1.0, _at_rest(latent), encoder), self._kept(own), True)
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
    def _encode(self, pairs: Sequence[Tensor]) -> tuple[Tensor, str]:
        """Latents [U, H] of users' pairs, and the encoder that made them; ValueError where they are not finite."""
        fingerprint = self._encoder()
        if not pairs:
            return torch.empty(0), fingerprint
        encoder, weight = self._policy.encoder, self._policy.encoder.inner0.weight
        return _finite_latents(encoder.latents(*packed(pairs, weight))), fingerprint

    def _write_again(self) -> None:
        self._rewrite([], and_prior=True)
        for name in list(self._users):  # made again when they are asked for
            self._forget(name)
        self._growing.clear()
        self._again += 1

    def _encode_store_again(self, encoder: str) -> None:
        self._at_rest.set_about({"refreshing": encoder})
        names = self._at_rest.names(not_by=encoder)
        while batch := list(itertools.islice(names, 256)):
            if self._at_rest.about().get("refreshing") != encoder:
                raise StoreError("store: expected to encode all users again alone, got another policy that does so too")
            try:
                self._encode_again(batch)
            except StoreConflict:  # somebody has changed one of them, and it carries that one's encoder
                for name in batch:
                    with suppress(StoreConflict):
                        self._encode_again([name])
        self._at_rest.set_about({"encoder": encoder, "refreshing": None})

    def _encode_again(self, names: Sequence[str]) -> None:
        users, pairs = [], []
        for name in names:
            user, choices = self._at_rest.get(name), self._at_rest.choices(name)
            if user is not None and choices is not None and user.encoder != self._fingerprint:
                users.append(user)
                pairs.append(_pairs(choices, self._width))
        latents, encoder = self._encode(pairs)
        self._at_rest.put(
            [
                self._changed(user, latent=_at_rest(latent), encoder=encoder)
                for user, latent in zip(users, latents, strict=True)
            ]
        )

    def _commit(self, changes: Sequence[Change]) -> list[User]:
        """Writes users to the store, and their rows to the bank; neither where either fails."""
        bank = self._policy.bank
        with bank.take(len(changes)) as slots:
            again = self._again
            for slot, change in zip(slots, changes, strict=True):
                with self._lock:
                    self._fill(slot, change.user)
            stamps = self._at_rest.put(changes)  # may wait for another process: nothing is locked here
        with self._lock:
            if again == self._again:
                return [
                    self._keep(replace(change.user, stamp=stamp), slot)
                    for slot, change, stamp in zip(slots, changes, stamps, strict=True)
                ]
        for slot in slots:  # made of weights that are no longer the policy's
            bank.release(slot)
        return [self[change.user.name] for change in changes]

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
        user = User(stored.name, slot, stored.version, self._no_pairs(), stored.latent.float(), stored.strength)
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


def _unknown(name: str) -> UnknownUser:
    return UnknownUser(f"user: expected BASE, PRIOR or one that the store has, got {name!r}")


def _not_kept(name: str) -> ValueError:
    return ValueError(f"user: expected one whose choices were kept, got {name!r}")


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


def encoder_fingerprint(encoder: ContextEncoder) -> str:
    """Tells one encoder's weights from another's."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _versions(encoder: ContextEncoder) -> list[tuple[int, int]]:
    """Changes whenever the weights may have."""
    return [(tensor.data_ptr(), tensor._version) for tensor in encoder.parameters()]
