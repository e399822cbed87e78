"""From users' choices to batches for NP-DPO: contexts and targets that never meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fssa_fast.generation.prompts import Prompt, prompt_ids
from fssa_fast.nn import pack_choices


@dataclass(frozen=True)
class Preference:
    """One choice of a user between two answers to a prompt (a text, or a chat of {"role", "content"}).

    `group` is what a context must not share with a target (a topic, a statement). An answer that did not end (it was
    cut off) is trained without its end token. `pair` holds the embeddings [2, E], chosen first. A choice that says
    nothing of its user (everyone prefers the answer that does not repeat itself) has `in_context` False: it is a
    target only.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    group: str
    pair: Tensor
    chosen_ended: bool = True
    rejected_ended: bool = True
    in_context: bool = True


@dataclass(frozen=True)
class TargetRow:
    """One answer as token ids; the response is ids[start:end]. `key` names the answer in the cache of the reference."""

    ids: list[int]
    start: int
    key: str


class PreferenceData(Dataset[dict[str, Any]]):
    """Draws examples: a user, a context of `min_context` to `max_context` choices, and targets of other groups.

    Example i is a function of (seed, i) alone, so that a run resumed at any step sees what an uninterrupted one saw.

    Args:
        users: each user's choices, by name. tokenizer: of the base model.
        length: how many examples an epoch has. targets: pairs an example.
        min_context, max_context: the smallest K, of users with as many choices, and the largest. Where the encoder is
            not trained, a context that tells little of its user is a label that is wrong half of the time.
        max_tokens: longer rows are cut at the end.
    Raises: ValueError for no users, and for one whose choices are all of one group: nothing would be left to predict.
    """

    def __init__(
        self,
        users: Mapping[str, Sequence[Preference]],
        tokenizer: Any,
        *,
        length: int,
        min_context: int = 0,
        max_context: int = 10,
        targets: int = 1,
        max_tokens: int = 256,
        seed: int = 0,
    ) -> None:
        if not users:
            raise ValueError("users: expected at least one, got none")
        alike = [name for name, choices in users.items() if len({choice.group for choice in choices}) < 2]
        if alike:
            more = f" and {len(alike) - 8} more" if len(alike) > 8 else ""
            raise ValueError(
                "users: expected choices of two groups or more for each, got one or none for "
                f"{', '.join(map(repr, alike[:8]))}{more}"
            )
        if max_context < 0 or targets < 1:
            raise ValueError(f"max_context, targets: expected >= 0 and >= 1, got {max_context} and {targets}")
        if not 0 <= min_context <= max_context:
            raise ValueError(f"min_context: expected 0 to max_context = {max_context}, got {min_context}")
        self.users, self.names, self.tokenizer = dict(users), sorted(users), tokenizer
        self.length, self.min_context, self.max_context = length, min_context, max_context
        self.targets, self.max_tokens, self.seed = targets, max_tokens, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw = self._draw(index)

        def below(count: int) -> int:
            return int(torch.randint(count, (), generator=draw))

        choices = self.users[self.names[below(len(self.names))]]
        groups = sorted({choice.group for choice in choices})
        order = torch.randperm(len(groups), generator=draw).tolist()
        count = 1 + below(len(groups) - 1)  # groups the context may draw from; the others are left for targets
        own = {groups[i] for i in order[:count]}
        context = [choice for choice in choices if choice.group in own and choice.in_context]
        others = [choice for choice in choices if choice.group not in own]
        size = min(self.min_context + below(self.max_context - self.min_context + 1), len(context))
        picked = [context[i] for i in torch.randperm(len(context), generator=draw)[:size].tolist()]
        wanted = [others[i] for i in torch.randperm(len(others), generator=draw)[: self.targets].tolist()]
        # As many in every example, some of them again: a mean over a batch is then one over its parts' means.
        wanted += [others[below(len(others))] for _ in range(self.targets - len(wanted))]
        return self._example(picked, wanted)

    def _draw(self, index: int) -> torch.Generator:
        if not 0 <= index < self.length:
            raise IndexError(f"index: expected one in [0, {self.length}), got {index}")
        return torch.Generator().manual_seed(self.seed * 1_000_003 + index)

    def _example(self, context: Sequence[Preference], targets: Sequence[Preference]) -> dict[str, Any]:
        # Which side a context's chosen option stands on carries no information: it is always the first.
        pairs = (
            torch.stack([choice.pair for choice in context])
            if context
            else targets[0].pair.new_empty(0, 2, targets[0].pair.shape[1])
        )
        return {"pairs": pairs, "rows": [self._rows(choice) for choice in targets]}

    def _rows(self, choice: Preference) -> tuple[TargetRow, TargetRow]:
        return (
            encode_answer(self.tokenizer, choice.prompt, choice.chosen, choice.chosen_ended, self.max_tokens),
            encode_answer(self.tokenizer, choice.prompt, choice.rejected, choice.rejected_ended, self.max_tokens),
        )


class OpposedData(PreferenceData):
    """Draws what users disagree on: examples 2i and 2i + 1 are of two users who chose opposite sides of one pair.

    What makes an answer better for everyone cancels in a batch of an even number of examples, and what is left to learn
    is who prefers which. Arguments as of `PreferenceData`, and one target an example.

    Raises: ValueError as `PreferenceData`, and for users who disagree on nothing.
    """

    def __init__(self, users: Mapping[str, Sequence[Preference]], tokenizer: Any, **options: Any) -> None:
        super().__init__(users, tokenizer, targets=1, **options)
        sides: dict[tuple[str, str, str], list[tuple[str, Preference]]] = {}
        for name in self.names:
            for choice in self.users[name]:
                sides.setdefault((str(choice.prompt), choice.chosen, choice.rejected), []).append((name, choice))
        self.opposed = [
            (one, other)
            for (prompt, chosen, rejected), first in sides.items()
            if chosen < rejected
            for one in first
            for other in sides.get((prompt, rejected, chosen), ())
            if one[0] != other[0]
        ]
        if not self.opposed:
            raise ValueError("users: expected two who chose opposite sides of a pair, got none")

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw, both = self._draw(index), self._draw(index // 2)
        sides = self.opposed[int(torch.randint(len(self.opposed), (), generator=both))]
        name, target = sides[index % 2]
        known = [choice for choice in self.users[name] if choice.group != target.group and choice.in_context]
        size = int(torch.randint(self.min_context, self.max_context + 1, (), generator=draw))
        context = [known[i] for i in torch.randperm(len(known), generator=draw)[:size].tolist()]
        return self._example(context, [target])


def encode_answer(tokenizer: Any, prompt: Prompt, answer: str, ended: bool, max_tokens: int) -> TargetRow:
    """A prompt and an answer as token ids.

    Raises ValueError where the prompt alone fills max_tokens, or the answer is of no token.
    """
    start = prompt_ids(tokenizer, prompt)
    if len(start) >= max_tokens:
        raise ValueError(f"prompt: expected fewer than {max_tokens} tokens, got {len(start)}")
    if ended and tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: expected one with an end token, since the answer ended; got one without")
    response = tokenizer(answer, add_special_tokens=False)["input_ids"] + ([tokenizer.eos_token_id] if ended else [])
    if not response:
        raise ValueError("answer: expected at least one token, got an empty one")
    ids = (start + response)[:max_tokens]
    return TargetRow(ids, len(start), f"{tokenizer.decode(start)}\x00{answer}\x00{ended}\x00{max_tokens}")


def collate(examples: Sequence[Mapping[str, Any]], pad: int) -> dict[str, Any]:
    """A batch: contexts packed; target rows padded on the right, chosen and rejected of a pair one after the other.

    Returns pairs [N, 2, E], choices [N], offsets [U + 1]; input_ids, attention_mask [B, T]; response_start,
    response_end, slots [B]; keys, a list of B.
    """
    pairs = [example["pairs"] for example in examples]
    packed = pack_choices(pairs, [torch.zeros(len(p), dtype=torch.long) for p in pairs])
    rows = [(u, row) for u, example in enumerate(examples) for both in example["rows"] for row in both]
    width = max(len(row.ids) for _, row in rows)
    return {
        "pairs": packed[0],
        "choices": packed[1],
        "offsets": packed[2],
        "input_ids": torch.tensor([row.ids + [pad] * (width - len(row.ids)) for _, row in rows]),
        "attention_mask": torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for _, row in rows]),
        "response_start": torch.tensor([row.start for _, row in rows]),
        "response_end": torch.tensor([len(row.ids) for _, row in rows]),
        "slots": torch.tensor([u for u, _ in rows], dtype=torch.int32),
        "keys": [row.key for _, row in rows],
    }
