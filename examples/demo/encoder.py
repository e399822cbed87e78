"""Fits the context encoder first, as part of a reward model on embeddings, which takes a minute.

A policy could learn its encoder by itself, but only through answers: until the latents tell users apart there is
nothing for the adapters to learn, and the other way round. The reward model (NP-BTL) learns from embeddings alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fssa_fast.nn import NPBTL, ContextEncoder, pack_choices
from fssa_fast.training import Preference
from fssa_fast.training.fit_policy import standardize_latents
from fssa_fast.training.objectives import np_btl

from .criteria import AXES

Batch = tuple[list[Tensor], Tensor]


def draw_batch(
    users: Mapping[str, Sequence[Preference]], draw: random.Random, *, size: int, count: int | None, targets: int
) -> Batch:
    """`size` people: contexts [K, 2, E], K fixed or drawn from 0 to 10; targets [size, targets, 2, E], other topics.

    A person has an end on every axis and was asked about one axis or about all; the targets are of all axes in turn.
    On axes that a person was not asked about, every other choice is the opposite one: without these, liking short
    answers and liking lists would be one latent, since nobody would ever contradict it.
    """
    contexts, wanted = [], []
    groups = sorted({choice.group for own in users.values() for choice in own})
    for _ in range(size):
        ends = [draw.choice((axis.low, axis.high)) for axis in AXES]
        asked = ends if draw.random() < 0.5 else [draw.choice(ends)]
        held = set(draw.sample(groups, len(groups) // 2))
        known = {kind: [choice.pair for choice in users[kind] if choice.group not in held] for kind in ends}
        unseen = {kind: [choice.pair for choice in users[kind] if choice.group in held] for kind in ends}
        number = draw.randint(0, 10) if count is None else count
        context = [draw.choice(known[draw.choice(asked)]) for _ in range(number)]
        target = [(kind, draw.choice(unseen[kind])) for kind in (ends[i % len(ends)] for i in range(targets))]
        width = users[ends[0]][0].pair.shape[-1]
        contexts.append(torch.stack(context) if context else torch.empty(0, 2, width))
        wanted.append(torch.stack([p if kind in asked or draw.random() < 0.5 else p.flip(0) for kind, p in target]))
    return contexts, torch.stack(wanted)


def pack(contexts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Contexts, chosen first, as encoders take them."""
    return pack_choices(contexts, [torch.zeros(len(c), dtype=torch.long) for c in contexts])


def fit_reward(
    users: Mapping[str, Sequence[Preference]],
    latent_width: int,
    *,
    steps: int = 1500,
    size: int = 48,
    noise: float = 0.02,
    gain: float = 8.0,
    seed: int = 0,
) -> NPBTL:
    """Trains NP-BTL on the users' choices; `noise` on the embeddings keeps it from learning single answers by heart.

    The numbers of an embedding of length 1 are small (0.05 at a width of 384), and layers initialised for inputs of
    size 1 take thousands of steps to find them: `gain` multiplies the first layers' initial weights.
    """
    torch.manual_seed(seed)
    draw = random.Random(seed)
    width = next(iter(users.values()))[0].pair.shape[-1]
    model = NPBTL(width, latent_width, inner="mlp", dropout=0.0).train()
    with torch.no_grad():
        model.encoder.inner0.weight.mul_(gain)
        model.target0.weight.mul_(gain)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="fitting the encoder", unit="step"):
        contexts, targets = draw_batch(users, draw, size=size, count=None, targets=8)
        contexts = [context + noise * torch.randn_like(context) for context in contexts]
        rewards = model(targets + noise * torch.randn_like(targets), *pack(contexts))
        loss = np_btl(rewards, torch.zeros(rewards.shape[:2], dtype=torch.long)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(
    model: NPBTL, users: Mapping[str, Sequence[Preference]], kind: str, judged: str, count: int, *, size: int = 256
) -> float:
    """Share of the choices of kind `judged` that are predicted for users of `kind` with `count` choices known.

    Close to 1 where the two are the same, 0.5 where they are of different axes, if the axes are told apart.
    """
    draw = random.Random(1)
    groups = sorted({choice.group for own in users.values() for choice in own})
    contexts, targets = [], []
    for _ in range(size):
        held = set(draw.sample(groups, len(groups) // 2))
        context = draw.sample([choice.pair for choice in users[kind] if choice.group not in held], count)
        contexts.append(torch.stack(context) if context else torch.empty(0, *users[kind][0].pair.shape))
        targets.append(torch.stack(draw.sample([choice.pair for choice in users[judged] if choice.group in held], 4)))
    rewards = model(torch.stack(targets), *pack(contexts))
    return float((rewards[..., 0] > rewards[..., 1]).float().mean())


def standardize(encoder: ContextEncoder, users: Mapping[str, Sequence[Preference]], *, seed: int = 2) -> None:
    """Shifts and scales the latents to mean 0 and mean square 1 over people with five choices."""
    standardize_latents(encoder, draw_batch(users, random.Random(seed), size=512, count=5, targets=1)[0])
