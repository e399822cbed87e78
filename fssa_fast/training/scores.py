"""How well rewards predict choices never seen: accuracy by number of choices, likelihood, calibration, intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fssa_fast.data.choices import ChoiceData, Example
from fssa_fast.nn import NPBTL, RewardModel, pack_choices

Floats = NDArray[np.float64]
Predictor = Callable[[ChoiceData, Sequence[Example]], list[Floats]]
"""Of each example, the probabilities [P] that the options which were chosen would be, given its context."""


@dataclass(frozen=True)
class Scores:
    """Predictions for held-out examples: probabilities of the options chosen, [P] an example, and the unit of each
    prediction, [N] in all: what intervals are drawn over. Every example counts once."""

    units: NDArray[np.int64]
    probabilities: list[Floats]

    def _by_unit(self, of_predictions: Callable[[Floats], Floats]) -> Floats:
        values = of_predictions(np.concatenate(self.probabilities))
        weights = np.concatenate([np.full(len(p), 1 / len(p)) for p in self.probabilities])
        _, where = np.unique(self.units, return_inverse=True)
        return np.bincount(where, values * weights) / np.bincount(where, weights)

    @property
    def accuracies(self) -> Floats:
        """Of each unit, the share of choices predicted rightly; one predicted with even odds counts a half."""
        return self._by_unit(_right)

    @property
    def accuracy(self) -> float:
        """The mean of `accuracies`."""
        return float(self.accuracies.mean())

    @property
    def nll(self) -> float:
        """Mean over units of minus the log-probability of a choice, in nats."""
        return float(self.losses.mean())

    @property
    def losses(self) -> Floats:
        """Of each unit, the mean of minus the log-probability of a choice, in nats; even odds lose 0.693."""
        return self._by_unit(lambda p: -np.log(np.maximum(p, 1e-300)))

    def calibration(self, bins: int = 10) -> list[tuple[float, float, int]]:
        """Of predictions in equal bins of the odds-on option's probability, 0.5 to 1: mean stated, share right, how
        many; bins without predictions are left out."""
        p = np.concatenate(self.probabilities)
        stated, right = np.maximum(p, 1 - p), _right(p)
        where = np.minimum(((stated - 0.5) * 2 * bins).astype(int), bins - 1)
        return [
            (float(stated[where == i].mean()), float(right[where == i].mean()), int((where == i).sum()))
            for i in range(bins)
            if (where == i).any()
        ]

    @property
    def calibration_error(self) -> float:
        """The expected calibration error: mean over predictions of |stated - right| of their bin."""
        table = self.calibration()
        return sum(n * abs(stated - right) for stated, right, n in table) / sum(n for _, _, n in table)


def _right(probabilities: Floats) -> Floats:
    even = np.abs(probabilities - 0.5) < 1e-9  # but for rounding, which would be taken for an opinion
    return np.where(even, 0.5, probabilities > 0.5)


def truncate(examples: Sequence[Example], count: int) -> list[Example]:
    """The examples with the first `count` choices of their contexts."""
    return [replace(example, context=example.context[:count]) for example in examples]


Unit = Literal["user", "example", "pair"]


def score(predict: Predictor, data: ChoiceData, examples: Sequence[Example], *, unit: Unit = "user") -> Scores:
    """Scores of a predictor on examples.

    unit: what is drawn independently of each other. The user; where there are few users the example, if examples have
    little in common; else the pair of options: draws that share their pairs are no independent ones.
    """
    if unit == "pair":
        pairs = np.sort(np.concatenate([example.targets for example in examples]), 1)
        units = np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)
    else:
        of_example = [i if unit == "example" else example.user for i, example in enumerate(examples)]
        units = np.repeat(of_example, [len(example.targets) for example in examples])
    return Scores(units.astype(np.int64), predict(data, examples))


def model_predictor(model: RewardModel, *, samples: int = 64, seed: int = 0, batch: int = 256) -> Predictor:
    """Predictions of a reward model, in evaluation mode; of sampled latents, the mean over samples of probabilities."""

    @torch.no_grad()
    def predict(data: ChoiceData, examples: Sequence[Example]) -> list[Floats]:
        training = model.training
        model.eval()
        draw = torch.Generator().manual_seed(seed)
        found: list[Floats] = []
        for begin in range(0, len(examples), batch):
            part = examples[begin : begin + batch]
            width = max(len(example.targets) for example in part)
            # Filled up by repeating; what is repeated is cut off again.
            rows = np.stack([np.resize(example.targets, (width, 2)) for example in part])
            targets = data.options[torch.from_numpy(rows)]
            if isinstance(model, NPBTL):
                contexts = [data.options[torch.from_numpy(example.context)] for example in part]
                packed = pack_choices(contexts, [torch.zeros(len(c), dtype=torch.long) for c in contexts])
                noise = None
                if model.encoder.sampled:
                    noise = torch.randn(samples, len(part), model.latent_width, generator=draw)
                rewards = model(targets, *packed, noise)
            else:
                rewards = model(targets)
            probabilities = model.log_probs(rewards)[..., 0].double().exp()  # type: ignore[operator]
            if probabilities.dim() == 3:
                probabilities = probabilities.mean(0)
            found += [p[: len(e.targets)].numpy() for p, e in zip(probabilities, part, strict=True)]
        model.train(training)
        return found

    return predict


def interval(values: Sequence[Floats], *, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """The mean over runs of the mean over units, and its 95 % interval, by the bootstrap over the units of each run."""
    rng = np.random.default_rng(seed)
    means = np.stack([own[rng.integers(len(own), size=(draws, len(own)))].mean(1) for own in values]).mean(0)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(np.mean([own.mean() for own in values])), float(low), float(high)
