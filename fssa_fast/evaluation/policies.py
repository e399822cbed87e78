"""How well a policy follows users never seen: implicit rewards on held-out pairs, and the texts it writes for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fssa_fast.generation.generate import tokenize
from fssa_fast.policy.policy import SteerablePolicy
from fssa_fast.training.data import Preference, collate, encode_answer
from fssa_fast.training.policy import ReferenceCache, policy_log_probs
from fssa_fast.training.scores import Floats
from fssa_fast.users.users import BASE


@dataclass(frozen=True)
class HeldOut:
    """A user's choices to learn from, in order, and choices of other groups to predict."""

    user: str
    context: list[Preference]
    targets: list[Preference]


def held_out(
    users: Mapping[str, Sequence[Preference]],
    *,
    max_context: int,
    max_targets: int = 16,
    repeats: int = 1,
    seed: int = 0,
) -> list[HeldOut]:
    """Of every user `repeats` divisions of the choices by group, context and targets; raises ValueError for one whose
    choices are all of one group. The first K of a context are the context of K choices."""
    found = []
    for number, name in enumerate(sorted(users)):
        own, rng = users[name], np.random.default_rng((seed, number))
        groups = sorted({choice.group for choice in own})
        if len(groups) < 2:
            raise ValueError(f"users: expected choices of two groups or more for {name!r}, got {len(groups)}")
        for _ in range(repeats):
            order = rng.permutation(len(groups))
            known = {groups[i] for i in order[: max(1, round(0.6 * len(groups)) - (len(groups) == 2))]}
            context = [own[i] for i in rng.permutation(len(own)) if own[i].group in known]
            targets = [own[i] for i in rng.permutation(len(own)) if own[i].group not in known]
            found.append(HeldOut(name, context[:max_context], targets[:max_targets]))
    return found


def each_held_out(
    users: Mapping[str, Sequence[Preference]], *, max_context: int, seed: int = 0
) -> dict[str, list[HeldOut]]:
    """Every choice of every user as the one target, with a context of its own, drawn from the other groups.

    A target is met once, so that what is found of one is independent of what is found of the next.
    """
    found: dict[str, list[HeldOut]] = {}
    for number, name in enumerate(sorted(users)):
        rng, found[name] = np.random.default_rng((seed, number)), []
        for target in users[name]:
            others = [choice for choice in users[name] if choice.group != target.group]
            context = [others[i] for i in rng.permutation(len(others))[:max_context]]
            found[name].append(HeldOut(name, context, [target]))
    return found


@torch.no_grad()
def implicit_margins(
    policy: SteerablePolicy,
    examples: Sequence[HeldOut],
    count: int,
    *,
    reference: ReferenceCache | None = None,
    max_tokens: int = 256,
    batch: int = 8,
) -> list[Floats]:
    """Of each example [P]: by how much more than the base the policy, knowing `count` choices, prefers each chosen
    answer to the rejected one, in nats."""
    policy.eval()
    reference = reference or ReferenceCache()
    pad = policy.tokenizer.eos_token_id if policy.tokenizer.pad_token_id is None else policy.tokenizer.pad_token_id
    rows = []
    for example in examples:
        context = [choice.pair for choice in example.context[:count]]
        width = policy.steering.encoder.embedding_width
        pairs = torch.stack(context) if context else torch.empty(0, 2, width)
        for choice in example.targets:
            both = tuple(
                encode_answer(policy.tokenizer, choice.prompt, answer, ended, max_tokens)
                for answer, ended in (
                    (choice.chosen, choice.chosen_ended),
                    (choice.rejected, choice.rejected_ended),
                )
            )
            rows.append({"pairs": pairs, "rows": [both]})
    margins: list[float] = []
    for begin in range(0, len(rows), batch):
        packed = collate(rows[begin : begin + batch], pad)
        part = {name: own.to(policy.device) if isinstance(own, torch.Tensor) else own for name, own in packed.items()}
        latents = policy.encoder.latents(part["pairs"], part["choices"], part["offsets"])
        ours = policy_log_probs(policy, part, policy.rows(latents), part["slots"])
        gain = (ours - reference.log_probs(policy, part).to(ours)).view(-1, 2)
        margins += (gain[:, 0] - gain[:, 1]).double().tolist()
    ends = np.cumsum([len(example.targets) for example in examples])[:-1]
    return [np.array(part) for part in np.split(np.array(margins), ends)]


@dataclass(frozen=True)
class Written:
    """An answer and what can be said of it without a judge."""

    text: str
    ended: bool
    words: int
    distinct: float  # share of different pairs of neighbouring words
    likelihood: float  # mean log-probability of a token under the base model, in nats


MEASURES = ("words", "ended", "distinct", "likelihood")


@torch.no_grad()
def write(
    policy: SteerablePolicy, prompts: Sequence[Any], users: Sequence[str], *, max_new_tokens: int = 96, batch: int = 16
) -> list[Written]:
    """Answers prompts greedily, one for each user (BASE is the base model), and measures the answers."""
    policy.eval()
    found: list[Written] = []
    end = policy.tokenizer.eos_token_id
    for begin in range(0, len(prompts), batch):
        inputs = tokenize(policy, list(prompts[begin : begin + batch]))
        ids = policy.generate(
            inputs["input_ids"],
            list(users[begin : begin + batch]),
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=end if policy.tokenizer.pad_token_id is None else policy.tokenizer.pad_token_id,
        )
        start = inputs["input_ids"].shape[1]
        for row, mask, output in zip(inputs["input_ids"], inputs["attention_mask"], ids, strict=True):
            answer = output[start:].tolist()
            ended = end in answer
            answer = answer[: answer.index(end) + 1] if ended else answer
            text = policy.tokenizer.decode(answer, skip_special_tokens=True)
            prompt = row[mask.bool()]
            tokens = torch.cat([prompt, output.new_tensor(answer)]).unsqueeze(0)
            whole = {
                "input_ids": tokens,
                "attention_mask": torch.ones_like(tokens),
                "response_start": torch.tensor([len(prompt)], device=tokens.device),
                "response_end": torch.tensor([tokens.shape[1]], device=tokens.device),
            }
            likelihood = float(policy_log_probs(policy, whole, None, None)) / max(1, len(answer))
            words = text.split()
            pairs = list(zip(words[:-1], words[1:], strict=True))
            distinct = len(set(pairs)) / len(pairs) if pairs else 1.0
            found.append(Written(text, ended, len(words), distinct, likelihood))
    return found


__all__ = ["BASE", "HeldOut", "MEASURES", "Written", "each_held_out", "held_out", "implicit_margins", "write"]
