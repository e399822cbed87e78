"""Two policies, or one and its base, on the same prompts for the same users: paired differences of their texts."""

from __future__ import annotations

import os
from collections.abc import Sequence
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
) -> list[Table]:
    """Both answer held-out prompts for users who made `count` choices; tables of A, B and A - B.

    Args:
        a, b: policies; b None is the base model of a. data: a file of choices. users: which of them; None: all.
        judge: a reward model, better one that neither was trained with; it is told the same choices, and embeds texts
            as a's embedder does. Without one, there are no win rates.
    """
    policy = SteerablePolicy.from_pretrained(a)
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
    embedder = policy.embedder
    if b is None:
        theirs = write(policy, [prompt for _, prompt in asked], [BASE] * len(asked), max_new_tokens=max_new_tokens)
    else:
        policy.detach()
        policy = SteerablePolicy.from_pretrained(b, policy.model)
        theirs = _answers(policy, asked, count, max_new_tokens)
    table = Table(f"Texts for {len(asked)} held-out prompts, after {count} choices", ["A", "B", "A - B"], scale=1.0,
                  first="measure", digits=3)  # fmt: skip
    for name in MEASURES:
        left, right = (np.array([float(getattr(text, name)) for text in texts]) for texts in (ours, theirs))
        table.rows[name] = [Cell(*interval([values])) for values in (left, right, left - right)]
    if judge is None:
        return [table]
    wins = _wins(RewardModel.from_pretrained(judge), embedder, asked, ours, theirs, count)
    won = Table("Win rate of A under the judge, %; a tie is half a win", ["A wins"], first="")
    won.rows["judged"] = [Cell(*interval([wins]))]
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
