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
from fssa_fast.training.objectives import np_btl

Batch = tuple[list[Tensor], Tensor]


def draw_batch(
    users: Mapping[str, Sequence[Preference]], draw: random.Random, *, size: int, count: int | None, targets: int
) -> Batch:
    """`size` people: contexts [K, 2, E], K fixed or drawn from 0 to 10; targets [size, targets, 2, E], other topics."""
    kinds, contexts, wanted = sorted(users), [], []
    groups = sorted({choice.group for own in users.values() for choice in own})
    for _ in range(size):
        own = users[draw.choice(kinds)]
        held = set(draw.sample(groups, len(groups) // 2))
        context = [choice.pair for choice in own if choice.group not in held]
        target = [choice.pair for choice in own if choice.group in held]
        number = draw.randint(0, 10) if count is None else count
        picked = draw.sample(context, number)
        contexts.append(torch.stack(picked) if picked else torch.empty(0, *own[0].pair.shape))
        wanted.append(torch.stack(draw.sample(target, targets)))
    return contexts, torch.stack(wanted)


def pack(contexts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Contexts, chosen first, as encoders take them."""
    return pack_choices(contexts, [torch.zeros(len(c), dtype=torch.long) for c in contexts])


def fit_reward(
    users: Mapping[str, Sequence[Preference]],
    latent_width: int,
    *,
    steps: int = 800,
    size: int = 48,
    noise: float = 0.05,
    seed: int = 0,
) -> NPBTL:
    """Trains NP-BTL on the users' choices; `noise` on the embeddings keeps it from learning single answers by heart."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    width = next(iter(users.values()))[0].pair.shape[-1]
    model = NPBTL(width, latent_width, inner="mlp", dropout=0.0).train()
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
    model: NPBTL, users: Mapping[str, Sequence[Preference]], count: int, *, size: int = 512, seed: int = 1
) -> float:
    """Share of unseen targets ordered rightly with `count` choices known."""
    contexts, targets = draw_batch(users, random.Random(seed), size=size, count=count, targets=8)
    rewards = model(targets, *pack(contexts))
    return float((rewards[..., 0] > rewards[..., 1]).float().mean())


@torch.no_grad()
def standardize(encoder: ContextEncoder, users: Mapping[str, Sequence[Preference]], *, seed: int = 2) -> None:
    """Shifts and scales the latents, in the last Linear, to mean 0 and mean square 1 over people with five choices."""
    contexts, _ = draw_batch(users, random.Random(seed), size=512, count=5, targets=1)
    latents = encoder.latents(*pack(contexts))
    mean = latents.mean(0)
    scale = (latents - mean).square().mean().sqrt()
    encoder.outer1.bias.sub_(mean).div_(scale)
    encoder.outer1.weight.div_(scale)
