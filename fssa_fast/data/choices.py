"""Users' choices as arrays, and the examples drawn from them: a context, and targets that share nothing with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fssa_fast.data.groups import Indices, sides, splittable

# Of a user with more choices than this, an example draws from so many, picked at random: time does not grow with data.
POOL = 192


@dataclass(frozen=True)
class ChoiceData:
    """Options, and which of two each user chose.

    options: embeddings or features, float32 [n, E].
    groups: the group of each option, [n]. A context and its targets share no group: neither an option, nor what would
        tell about it (the other options of the same question, the answers to the same prompt).
    users: the users' names. choices: of each user, option indices [K, 2], the chosen one first.
    """

    options: Tensor
    groups: Indices
    users: tuple[str, ...]
    choices: tuple[Indices, ...]

    def __post_init__(self) -> None:
        count = len(self.options)
        if self.options.dim() != 2 or self.options.dtype != torch.float32:
            raise ValueError(f"options: expected float32 [n, E], got {self.options.dtype} {list(self.options.shape)}")
        if not torch.isfinite(self.options).all():
            row = int((~torch.isfinite(self.options)).any(1).nonzero()[0])
            raise ValueError(f"options: expected finite numbers, got NaN or infinity in row {row}")
        if self.groups.shape != (count,):
            raise ValueError(f"groups: expected one for each of {count} options, got shape {list(self.groups.shape)}")
        if len(self.users) != len(self.choices) or not self.users:
            raise ValueError(
                f"users, choices: expected as many of one as of the other and at least one, got {len(self.users)} and "
                f"{len(self.choices)}"
            )
        if len(set(self.users)) != len(self.users):
            raise ValueError("users: expected different names, got one twice")
        for name, own in zip(self.users, self.choices, strict=True):
            if own.ndim != 2 or own.shape[1] != 2 or (own.size and not 0 <= own.min() <= own.max() < count):
                raise ValueError(f"choices of {name!r}: expected option indices [K, 2] in [0, {count})")
            if (own[:, 0] == own[:, 1]).any():
                raise ValueError(f"choices of {name!r}: expected two different options, got one and itself")

    @property
    def width(self) -> int:
        """E."""
        return self.options.shape[1]

    def used_options(self) -> Tensor:
        """The options [m, E] that some user chose, or did not choose, each once."""
        return self.options[torch.from_numpy(np.unique(np.concatenate([own.ravel() for own in self.choices])))]

    def of_users(self, picked: Sequence[int]) -> ChoiceData:
        """The same options, and these users only."""
        return replace(self, users=tuple(self.users[i] for i in picked), choices=tuple(self.choices[i] for i in picked))

    def predictable(self) -> ChoiceData:
        """Without the users of whose choices none is left to predict when another is known: all share a group."""
        return self.of_users(splittable(self.groups, self.choices))


def split_users(count: int, seed: int, shares: Sequence[float] = (0.7, 0.1, 0.2)) -> list[list[int]]:
    """Disjoint lists of users 0 .. count - 1, in these shares, drawn from the seed: training, validation, test."""
    if abs(sum(shares) - 1) > 1e-9 or min(shares) < 0:
        raise ValueError(f"shares: expected numbers >= 0 that sum to 1, got {list(shares)}")
    order = np.random.default_rng(seed).permutation(count)
    bounds = np.round(np.cumsum([0, *shares]) * count).astype(int)
    return [sorted(order[a:b].tolist()) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


@dataclass(frozen=True)
class Example:
    """A user's context [K, 2] and targets [P, 2], option indices, the chosen option first; they share no group."""

    user: int
    context: Indices
    targets: Indices


def draw_example(
    data: ChoiceData, user: int, rng: np.random.Generator, *, max_context: int, targets: int | None, share: float
) -> Example | None:
    """An example of one user, or None where this draw of groups leaves no target.

    Args:
        max_context: the most choices the context may have; their order is random, so its first K are a context too.
        targets: how many, drawn again where there are fewer; None takes all there are, once.
        share: of the user's groups, for the context.
    """
    own = data.choices[user]
    if len(own) > POOL:
        own = own[rng.integers(len(own), size=POOL)]
    context, others = sides(data.groups, own, rng, share)
    if not len(others):
        return None
    context = context[rng.permutation(len(context))[:max_context]]
    if targets is not None:
        others = others[rng.permutation(len(others))[:targets]]
        if len(others) < targets:
            others = others[rng.integers(len(others), size=targets)]
    return Example(user, context, others)


class ChoiceExamples(Dataset[Example]):
    """Examples for training; example i is a function of (seed, i) alone, so that a resumed run sees the same.

    Args:
        data: every user must be `predictable`. length: how many examples an epoch has.
        max_context: the largest K; K is uniform from 0 to it, or to what the user has. targets: P.
    """

    def __init__(
        self, data: ChoiceData, *, length: int, max_context: int = 10, targets: int = 8, seed: int = 0
    ) -> None:
        if max_context < 0 or targets < 1 or length < 1:
            raise ValueError(
                f"max_context, targets, length: expected >= 0, >= 1 and >= 1, got {max_context}, {targets}, {length}"
            )
        self.data, self.length, self.max_context, self.targets, self.seed = data, length, max_context, targets, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.length:
            raise IndexError(f"index: expected one in [0, {self.length}), got {index}")
        rng = np.random.default_rng((self.seed, index))
        while True:
            user, size = int(rng.integers(len(self.data.users))), int(rng.integers(self.max_context + 1))
            found = draw_example(
                self.data, user, rng, max_context=size, targets=self.targets, share=rng.uniform(0.25, 0.75)
            )
            if found is not None:
                return found


def pack_examples(data: ChoiceData, examples: Sequence[Example]) -> dict[str, Tensor]:
    """A batch: contexts packed, pairs [N, 2, E], choices [N], offsets [U + 1]; targets [U, P, 2, E], chosen first.

    Every example must have as many targets.
    """
    counts = [len(example.context) for example in examples]
    context = torch.from_numpy(np.concatenate([example.context for example in examples]))
    targets = torch.from_numpy(np.stack([example.targets for example in examples]))
    return {
        "pairs": data.options[context],
        "choices": torch.zeros(len(context), dtype=torch.long),
        "offsets": torch.tensor([0, *counts]).cumsum(0),
        "targets": data.options[targets],
    }


def held_out_examples(
    data: ChoiceData, *, max_context: int, max_targets: int = 32, repeats: int = 1, share: float = 0.6, seed: int = 0
) -> list[Example]:
    """For measuring: of every user `repeats` examples with the longest context there is, up to max_context, and
    targets of other groups. The first K of a context are the context of K choices: all K are measured on the same
    targets. Users of whom no draw leaves a target are left out.
    """
    found = []
    for user in range(len(data.users)):
        rng = np.random.default_rng((seed, user))
        for _ in range(repeats):
            example = draw_example(data, user, rng, max_context=max_context, targets=None, share=share)
            if example is not None:
                kept = example.targets[rng.permutation(len(example.targets))[:max_targets]]
                found.append(replace(example, targets=kept))
    return found
