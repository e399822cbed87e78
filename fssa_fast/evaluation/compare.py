"""Two policies, or one and its base, on the same prompts for the same users: paired differences of their texts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fssa_fast.data.files import read_choices
from fssa_fast.evaluation.policies import BASE, MEASURES, HeldOut, Written, held_out, write
from fssa_fast.evaluation.tables import Cell, Table
from fssa_fast.nn import NPBTL, RewardModel
from fssa_fast.policy import SteerablePolicy
from fssa_fast.training.fit_policy import preferences
from fssa_fast.training.scores import Floats, interval
from fssa_fast.users import Choice, TextEmbedder


@dataclass(frozen=True)
class Answered:
    """What two policies answered to the same held-out prompts: for whom, and the embedder of the first."""

    asked: list[tuple[HeldOut, Any]]
    ours: list[Written]
    theirs: list[Written]
    count: int
    embedder: TextEmbedder

    def by_user(self, values: Floats) -> Floats:
        """The mean of each user's: prompts of one user, who has one row, are not independent of each other."""
        _, where = np.unique([example.user for example, _ in self.asked], return_inverse=True)
        return np.bincount(where, values) / np.bincount(where)

    def wins(self, judge: RewardModel) -> Floats:
        """Of each user, how often the first one's text is the better under a judge; a tie is half a win."""
        return self.by_user(_wins(judge, self.embedder, self.asked, self.ours, self.theirs, self.count))


def answer_both(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str] | None,
    data: str | os.PathLike[str],
    users: Sequence[str] | None,
    *,
    count: int = 10,
    prompts: int = 32,
    max_new_tokens: int = 96,
    base: Any = None,
    embedder: str | None = None,
    **placed: Any,
) -> Answered:
    """Both answer held-out prompts for users who made `count` choices; arguments as of `compare_policies`."""
    policy = SteerablePolicy.from_pretrained(a, base, embedder=embedder, **placed)
    assert policy.embedder is not None
    by_user: dict[str, list[Any]] = {}
    for choice in read_choices(data):
        if users is None or choice.user in users:
            by_user.setdefault(choice.user, []).append(choice)
    found = held_out(preferences(by_user, policy.embedder.encode), max_context=count)
    # One prompt of every user in turn, until there are enough.
    asked = [
        (example, example.targets[i].prompt)
        for i in range(max(len(example.targets) for example in found))
        for example in found
        if i < len(example.targets)
    ][:prompts]
    ours = _answers(policy, asked, count, max_new_tokens)
    texts = policy.embedder
    if b is None:
        theirs = write(policy, [prompt for _, prompt in asked], [BASE] * len(asked), max_new_tokens=max_new_tokens)
    else:
        policy.detach()
        policy = SteerablePolicy.from_pretrained(b, policy.model, embedder=embedder)
        theirs = _answers(policy, asked, count, max_new_tokens)
    return Answered(asked, ours, theirs, count, texts)


def compare_policies(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str] | None,
    data: str | os.PathLike[str],
    users: Sequence[str] | None,
    *,
    judge: str | os.PathLike[str] | None = None,
    count: int = 10,
    prompts: int = 32,
    max_new_tokens: int = 96,
    **models: Any,
) -> list[Table]:
    """Both answer held-out prompts for users who made `count` choices; tables of A, B and A - B, intervals by users.

    Args:
        a, b: policies; b None is the base model of a. data: a file of choices. users: which of them; None: all.
        judge: a reward model, better one that neither was trained with; it is told the same choices, and embeds texts
            as a's embedder does. Without one, there are no win rates.
        models: base, embedder, device_map and dtype of the policies, as of `SteerablePolicy.from_pretrained`.
    """
    both = answer_both(a, b, data, users, count=count, prompts=prompts, max_new_tokens=max_new_tokens, **models)
    title = f"Texts for {len(both.asked)} held-out prompts, after {count} choices"
    table = Table(title, ["A", "B", "A - B"], scale=1.0, first="measure", digits=3)
    for name in MEASURES:
        left, right = (
            both.by_user(np.array([float(getattr(text, name)) for text in texts])) for texts in (both.ours, both.theirs)
        )
        table.rows[name] = [Cell(*interval([values])) for values in (left, right, left - right)]
    if judge is None:
        return [table]
    won = Table("Win rate of A under the judge, %; a tie is half a win", ["A wins"], first="")
    won.rows["judged"] = [Cell(*interval([both.wins(RewardModel.from_pretrained(judge))]))]
    return [table, won]


def _answers(
    policy: SteerablePolicy, asked: Sequence[tuple[HeldOut, Any]], count: int, max_new_tokens: int
) -> list[Written]:
    found: list[Written] = []
    for begin in range(0, len(asked), 16):
        part = asked[begin : begin + 16]
        names = [f"held out {i}" for i in range(len(part))]
        for name, (example, _) in zip(names, part, strict=True):
            policy.users.add(name, [Choice(*choice.pair) for choice in example.context[:count]])
        found += write(policy, [prompt for _, prompt in part], names, max_new_tokens=max_new_tokens)
        for name in names:
            policy.users.remove(name)
    return found


@torch.no_grad()
def _wins(
    judge: RewardModel,
    embedder: TextEmbedder,
    asked: Sequence[tuple[HeldOut, Any]],
    ours: Sequence[Written],
    theirs: Sequence[Written],
    count: int,
) -> Floats:
    found = []
    for (example, prompt), left, right in zip(asked, ours, theirs, strict=True):
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        targets = embedder.encode([(text, left.text), (text, right.text)]).view(1, 1, 2, -1)
        context = [choice.pair for choice in example.context[:count]]
        if isinstance(judge, NPBTL):
            pairs = torch.stack(context) if context else torch.empty(0, 2, embedder.width)
            rewards = judge(targets, pairs, torch.zeros(len(pairs), dtype=torch.long), torch.tensor([0, len(pairs)]))
        else:
            rewards = judge(targets)
        first = float(judge.log_probs(rewards).flatten()[0].exp())  # type: ignore[operator]
        found.append(0.5 if left.text == right.text else float(first > 0.5))
    return np.array(found)
