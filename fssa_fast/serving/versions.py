"""The versions of an adapter that a server holds over one base model, and which of them answers whom.

Each version is a policy with an engine of its own. They share the base model's parameters, and the packed copies of
those weights that no adapter is packed into; they share the users' database, where each makes its own latents of the
same choices. Rows of different versions cannot share a product, since A and B differ: the engines' steps take turns.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fssa_fast.data.history import BASE_VERSION
from fssa_fast.generation import Engine
from fssa_fast.policy import SteerablePolicy
from fssa_fast.policy.sharing import share_parameters
from fssa_fast.policy.storage import load_base, read_description, tokenizer_beside
from fssa_fast.users.store import UserStore

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Version:
    """One version. share: of the users, beside the other versions' shares."""

    name: str
    policy: SteerablePolicy
    engine: Engine
    share: float = 1.0

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name == BASE_VERSION:
            raise ValueError(
                f"version: expected letters, digits, dots and hyphens, and not {BASE_VERSION!r}, got {self.name!r:.80}"
            )
        if isinstance(self.share, bool) or not (math.isfinite(self.share) and self.share >= 0):
            raise ValueError(f"share: expected a finite number of at least 0, got {self.share!r} for {self.name}")


class Versions:
    """All versions of a server. The first is the one that writes to the users' database, and answers those without a
    name, and blends.

    Args: experiment: its name decides with a user's which version answers; another name draws all users again.
    Raises ValueError for names that are not each there once, or shares that are all 0.
    """

    def __init__(self, versions: Sequence[Version], experiment: str = "") -> None:
        self._by_name = {version.name: version for version in versions}
        if not versions or len(self._by_name) < len(versions):
            raise ValueError(f"versions: expected one or more, each name once, got {[v.name for v in versions]}")
        self._whole = sum(version.share for version in versions)
        if not self._whole:
            raise ValueError("share: expected one above 0, got none")
        self.first, self.experiment = versions[0], experiment

    def __iter__(self) -> Iterator[Version]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def get(self, name: str) -> Version | None:
        """A version by its name."""
        return self._by_name.get(name)

    def of(self, user: str | None) -> Version:
        """The version that answers a user, by the stored name: always the same while names and shares are."""
        if user is None:
            return self.first
        words = f"{self.experiment}\0{user}".encode("utf-8", "surrogatepass")
        at = int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "big") / 2**64 * self._whole
        for version in self:
            at -= version.share
            if at < 0:
                return version
        return max(self, key=lambda version: version.share)  # what rounding left over


def only(policy: SteerablePolicy, engine: Engine) -> Versions:
    """The versions of a server that has one."""
    return Versions([Version("main", policy, engine)])


class Shelf:
    """A base model in memory, on which versions are made.

    Args:
        directory: a policy that names base and embedder where these are None. engine: arguments of each engine.
        shared: whether there may be versions with other encoders, here or in other replicas; see `StoredUsers`.
        placed: device_map and dtype of the base.
    """

    def __init__(
        self,
        directory: Path,
        base: str | None,
        embedder: str | None,
        store: UserStore,
        engine: Mapping[str, Any],
        shared: bool,
        **placed: Any,
    ) -> None:
        saved = read_description(directory)
        self._base, folder = load_base(
            base, saved.base.name_or_path, directory=directory, revision=saved.base.revision, **placed
        )
        self._tokenizer, self._embedder = tokenizer_beside(folder), embedder
        self._store, self._engine, self._shared = store, dict(engine), shared
        self._made: Version | None = None  # the last one

    def make(self, name: str, directory: Path, share: float = 1.0) -> Version:
        """A version of what is saved there. Raises ValueError for a base or an embedder that is not the first one's."""
        other = None if self._made is None else self._made.policy
        policy = SteerablePolicy.from_pretrained(
            directory,
            share_parameters(self._base),
            tokenizer=self._tokenizer,
            embedder=self._embedder if other is None else other.embedder,
            capacity=max(64, 4 * self._engine["max_rows"]),
        )
        policy.use_store(self._store, shared=self._shared)
        policy.fuse(beside=None if other is None else other.fused)
        self._made = Version(name, policy, policy.engine(**self._engine), share)
        return self._made
