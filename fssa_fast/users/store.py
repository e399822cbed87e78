"""Users at rest: an interface that any database can implement.

A user at rest is a name, a version, a strength, a latent in bfloat16 with the encoder that made it, and the choices,
each two options. Options are kept once however many users chose between them, and go with the last user that refers to
them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Stamp = tuple[int, int]


class StoreError(RuntimeError):
    """The database cannot be read or written: damaged, full, locked, foreign, or of a newer version of the library."""


class StoreConflict(StoreError):
    """The user was changed, added or removed by someone else meanwhile. Nothing was written; read again."""


@dataclass(frozen=True, eq=False)
class Option:
    """One side of a choice: its embedding [E], float32, and the text it was made from, where there was one."""

    embedding: Tensor
    text: str | None = None
    prompt: str = ""

    def key(self) -> bytes:
        """What tells this option from others, 16 bytes."""
        words = f"{self.prompt}\0{'' if self.text is None else self.text}\0".encode("utf-8", "surrogatepass")
        return hashlib.blake2b(words + tensor_bytes(self.embedding), digest_size=16).digest()


Choices = Sequence[tuple[Option, Option]]
"""(chosen, rejected), as many as there are."""


@dataclass(frozen=True, eq=False)
class StoredUser:
    """A user at rest, but for the choices. latent: bfloat16 [H].

    encoder: the fingerprint of the one that made the latent; "" where it is not known.
    choices: how many there are, or None where they are not kept. stamp: tells this version of this user from every
    other that ever was; both are given by the store.
    """

    name: str
    version: int
    strength: float
    latent: Tensor
    encoder: str = ""
    choices: int | None = 0
    stamp: Stamp = (0, 0)


@dataclass(frozen=True, eq=False)
class Change:
    """A user as it shall be, and choices that are added to those there, or replace them (None: none are kept)."""

    user: StoredUser
    choices: Choices | None = ()
    replaces: bool = False


class UserStore(Protocol):
    """Where users are at rest. Every call is one transaction; all methods may be called from any thread.

    Reading does not wait for those who write. All raise StoreError where the database fails or is damaged.
    """

    def about(self) -> dict[str, str]:
        """What the store says of itself: its "encoder", and towards which one a refresh is under way ("refreshing")."""

    def set_about(self, values: Mapping[str, str | None]) -> None:
        """Changes what `about` says; None takes a word back."""

    def get(self, name: str) -> StoredUser | None:
        """A user, or None."""

    def choices(self, name: str) -> Choices | None:
        """A user's choices in the order in which they were added; None where they are not kept, or there is no user."""

    def stamp(self, name: str) -> Stamp | None:
        """The stamp of a user as it is now, or None: whether a copy is still good."""

    def put(self, changes: Sequence[Change]) -> list[Stamp]:
        """Writes users, all or none: version 1 adds one, a later one changes the version before it.

        Choices that are replaced are forgotten as by `remove`. Raises StoreConflict where a new user's name is taken,
        or the version before is not the one there.
        """

    def remove(self, name: str) -> bool:
        """Forgets a user, with the options that nobody else refers to; False where there is none.

        Raises StoreError where the user is removed, but older copies could not be erased: it says so.
        """

    def names(self, after: str = "", *, not_by: str | None = None) -> Iterator[str]:
        """All names after this one, in order; those added or removed meanwhile may be among them or not.

        not_by: only of users whose latents that encoder has not made.
        """

    def __len__(self) -> int:
        """How many users there are."""

    def close(self) -> None:
        """Ends the connection."""


def tensor_bytes(tensor: Tensor) -> bytes:
    """The numbers of a tensor, one after the other, as they lie in memory."""
    return tensor.detach().cpu().contiguous().numpy().tobytes()
