"""Which question to ask next: the pair whose answer would tell most about a user's latent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fssa_fast.data.choices import ChoiceData, Example, Indices
from fssa_fast.nn import NPBTL
from fssa_fast.training.scores import Floats, Scores, model_predictor, score


@torch.no_grad()
def expected_information(
    model: NPBTL, context: Tensor, candidates: Tensor, *, samples: int = 256, seed: int = 0
) -> Tensor:
    """How much the answer to each candidate question would tell about a user, in nats.

    Semantics: the mutual information of the answer and the latent, under q(z|context):
    `H(mean over z of p(answer | z)) - mean over z of H(p(answer | z))`. A pair that nobody can call has none, since its
    answer is noise; nor has one that everybody calls alike.

    Args:
        model: with sampled latents, in evaluation mode.
        context: the user's choices so far, [K, 2, E], the chosen option first; K may be 0.
        candidates: pairs that may be asked, [P, 2, E].
        samples: of the latent.

    Returns: [P]. Raises ValueError for a model whose latents are points: it does not say what it does not know.
    """
    if not model.encoder.sampled:
        raise ValueError("model: expected sampled latents, got points (sampled=False)")
    noise = torch.randn(samples, 1, model.latent_width, generator=torch.Generator().manual_seed(seed))
    offsets = torch.tensor([0, len(context)])
    choices = torch.zeros(len(context), dtype=torch.long)
    rewards = model(candidates.unsqueeze(0), context, choices, offsets, noise)
    p = model.log_probs(rewards)[:, 0, :, 0].double().exp()
    return (_entropy(p.mean(0)) - _entropy(p).mean(0)).clamp_min(0).to(candidates.dtype)


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p) + torch.special.entr(1 - p)


def ask(model: NPBTL, data: ChoiceData, known: Indices, pool: Indices, *, samples: int = 256, seed: int = 0) -> int:
    """The place in `pool` [P, 2] of the pair to ask next, given the choices `known` [K, 2]; option indices of `data`.

    Raises ValueError for an empty pool, and as `expected_information`.
    """
    if not len(pool):
        raise ValueError("pool: expected at least one pair to ask, got none")
    context, candidates = (data.options[torch.from_numpy(indices)] for indices in (known, pool))
    return int(expected_information(model, context, candidates, samples=samples, seed=seed).argmax())


def question_curve(
    model: NPBTL, data: ChoiceData, examples: Sequence[Example], counts: Sequence[int], *, samples: int = 256
) -> tuple[dict[int, Scores], dict[int, Scores]]:
    """Scores by number of questions, questions chosen by `ask` and drawn at random, on the same targets.

    The questions that may be asked are each example's context; its order is the random one.
    """
    model.eval()
    predict = model_predictor(model)
    active, random = {}, {}
    asked = [_order(model, data, example, max(counts), samples) for example in examples]
    for count in counts:
        chosen = [replace(e, context=order[:count]) for e, order in zip(examples, asked, strict=True)]
        drawn = [replace(e, context=e.context[:count]) for e in examples]
        active[count] = score(predict, data, chosen, unit="example")
        random[count] = score(predict, data, drawn, unit="example")
    return active, random


def _order(model: NPBTL, data: ChoiceData, example: Example, count: int, samples: int) -> Indices:
    known, pool = example.context[:0], example.context
    for number in range(min(count, len(pool))):
        i = ask(model, data, known, pool, samples=samples, seed=number)
        known, pool = np.concatenate([known, pool[i : i + 1]]), np.delete(pool, i, 0)
    return known


def advantage(active: Scores, random: Scores) -> Floats:
    """By how much chosen questions are better than random ones, of each example."""
    return active.accuracies - random.accuracies
