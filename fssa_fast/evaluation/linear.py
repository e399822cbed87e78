"""Linear baselines: a hierarchical logit, every user's weights a draw from one distribution; and a logit a user."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fssa_fast.data.choices import ChoiceData, Example, Indices
from fssa_fast.training.scores import Floats


class HierarchicalLogit:
    """`p(a > b) = sigmoid(w_u . (a - b))`, `w_u ~ N(mean, covariance)`, fitted by EM with Laplace approximations.

    Args:
        data: the users to fit it to. components: principal components of the options that it sees; None takes the
            options as they are.
        iterations: of EM. pairs: at most so many choices of a user are used, drawn at random.
    """

    def __init__(
        self, data: ChoiceData, *, components: int | None = None, iterations: int = 30, pairs: int = 128, seed: int = 0
    ) -> None:
        self.basis = None
        if components is not None and components < data.width:
            centred = (data.options - data.options.mean(0)).double()
            self.basis = torch.linalg.svd(centred, full_matrices=False).Vh[:components].T
        features = self._features(data)
        features_scale = float(features.std())
        self.scale = 1 / features_scale
        rng = np.random.default_rng(seed)
        own = [c[rng.permutation(len(c))[:pairs]] for c in data.choices]
        differences, mask = self._pack(features * self.scale, own)
        width = differences.shape[-1]
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.covariance = torch.eye(width, dtype=torch.float64)
        weights = None
        for _ in range(iterations):
            # Few steps a time: the next iteration goes on from here.
            weights, spread = self._posterior(differences, mask, start=weights, steps=3)
            self.mean = weights.mean(0)
            offset = weights - self.mean
            self.covariance = spread.mean(0) + offset.T @ offset / len(weights)

    def _features(self, data: ChoiceData) -> Tensor:
        options = data.options.double()
        return options if self.basis is None else options @ self.basis

    @staticmethod
    def _pack(features: Tensor, choices: Sequence[Indices]) -> tuple[Tensor, Tensor]:
        """Differences chosen - rejected [U, P, d], filled up with zeros, and which are there [U, P]."""
        width = max(1, *(len(c) for c in choices)) if len(choices) > 1 else max(1, len(choices[0]))
        found = features.new_zeros(len(choices), width, features.shape[1])
        mask = features.new_zeros(len(choices), width)
        for u, own in enumerate(choices):
            index = torch.from_numpy(own)
            found[u, : len(own)] = features[index[:, 0]] - features[index[:, 1]]
            mask[u, : len(own)] = 1
        return found, mask

    def _posterior(
        self, differences: Tensor, mask: Tensor, *, start: Tensor | None = None, steps: int = 12
    ) -> tuple[Tensor, Tensor]:
        """Mode [U, d] and covariance [U, d, d] of every user's weights, by Newton's method, its steps halved while
        they lead down."""
        precision = torch.linalg.inv(self.covariance)
        weights = self.mean.expand(len(differences), -1).clone() if start is None else start

        def log_posterior(w: Tensor) -> Tensor:
            offset = w - self.mean
            fit = (F.logsigmoid((differences * w.unsqueeze(1)).sum(-1)) * mask).sum(1)
            return fit - 0.5 * ((offset @ precision) * offset).sum(1)

        def hessian(w: Tensor) -> tuple[Tensor, Tensor]:
            p = torch.sigmoid((differences * w.unsqueeze(1)).sum(-1))
            gradient = torch.einsum("up,upd->ud", (1 - p) * mask, differences) - (w - self.mean) @ precision
            scaled = differences * (p * (1 - p) * mask).unsqueeze(-1)
            return gradient, scaled.mT @ differences + precision

        value = log_posterior(weights)
        for _ in range(steps):
            gradient, curvature = hessian(weights)
            step = torch.linalg.solve(curvature, gradient)
            size = torch.ones(len(weights), 1, dtype=weights.dtype)
            for _ in range(6):
                tried = weights + size * step
                reached = log_posterior(tried)
                worse = reached < value - 1e-12
                if not worse.any():
                    break
                size[worse] *= 0.5
            better = reached >= value
            weights, value = torch.where(better[:, None], tried, weights), torch.where(better, reached, value)
            if float((size * step).abs().max()) < 1e-6:
                break
        return weights, torch.linalg.inv(hessian(weights)[1])

    def predict(self, data: ChoiceData, examples: Sequence[Example]) -> list[Floats]:
        """A `Predictor`: the posterior given each context, its spread moderating the probabilities."""
        features = self._features(data) * self.scale
        weights, spread = self._posterior(*self._pack(features, [example.context for example in examples]))
        found = []
        for w, s, example in zip(weights, spread, examples, strict=True):
            index = torch.from_numpy(example.targets)
            difference = features[index[:, 0]] - features[index[:, 1]]
            variance = ((difference @ s) * difference).sum(1)
            logit = (difference @ w) / (1 + torch.pi / 8 * variance).sqrt()
            found.append(torch.sigmoid(logit).numpy())
        return found

    def simulate(self, data: ChoiceData, count: int, *, seed: int = 0) -> ChoiceData:
        """`count` users that the fitted distribution would have: each answers the questions of a user of `data`.

        A user who is asked to choose among more than two chooses the best by reward with Gumbel noise, so that choices
        of one question agree with each other.
        """
        rng = np.random.default_rng(seed)
        features = (self._features(data) * self.scale).numpy()
        root = np.linalg.cholesky(self.covariance.numpy())
        choices = []
        for _ in range(count):
            weights = self.mean.numpy() + root @ rng.standard_normal(len(self.mean))
            asked = data.choices[rng.integers(len(data.users))]
            utility = dict.fromkeys(np.unique(asked).tolist(), 0.0)
            for option in utility:
                utility[option] = float(features[option] @ weights + rng.gumbel())
            choices.append(_answers(asked, data.groups, utility))
        return ChoiceData(data.options, data.groups, tuple(f"simulated/{i}" for i in range(count)), tuple(choices))


class UserLogits:
    """A logistic regression for each training user, and Bayes over whose of them somebody's choices are.

    For few users who are the same in training and test, such as two criteria. The penalty on the weights is the one of
    a grid that predicts the validation users' choices best.
    """

    PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)

    def __init__(self, train: ChoiceData, validation: ChoiceData) -> None:
        own, held_out = self._differences(train), self._differences(validation)
        self.scale = 1 / float(own[0].std())

        def loss(weights: Tensor) -> float:
            terms = [-F.logsigmoid(self.scale * d @ w).mean() for d, w in zip(held_out, weights, strict=True)]
            return float(sum(terms))

        fitted = [torch.stack([self._fit(self.scale * d, penalty) for d in own]) for penalty in self.PENALTIES]
        self.weights = min(fitted, key=loss)

    @staticmethod
    def _differences(data: ChoiceData) -> list[Tensor]:
        options = data.options.double()
        return [options[torch.from_numpy(own[:, 0])] - options[torch.from_numpy(own[:, 1])] for own in data.choices]

    @staticmethod
    def _fit(differences: Tensor, penalty: float, steps: int = 50) -> Tensor:
        """Newton's method; the loss is convex."""
        weights = differences.new_zeros(differences.shape[1])
        eye = penalty * torch.eye(len(weights), dtype=weights.dtype)
        for _ in range(steps):
            p = torch.sigmoid(differences @ weights)
            gradient = differences.T @ (1 - p) - penalty * weights
            step = torch.linalg.solve((differences * (p * (1 - p))[:, None]).T @ differences + eye, gradient)
            weights = weights + step
            if float(step.abs().max()) < 1e-9:
                break
        return weights

    def predict(self, data: ChoiceData, examples: Sequence[Example]) -> list[Floats]:
        """A `Predictor`: the users' predictions, each weighted by how likely the context is his."""
        logits = self.scale * data.options.double() @ self.weights.T  # [options, users]
        found = []
        for example in examples:
            context, targets = (
                F.logsigmoid(logits[torch.from_numpy(pairs[:, 0])] - logits[torch.from_numpy(pairs[:, 1])])
                for pairs in (example.context, example.targets)
            )
            found.append((targets + torch.log_softmax(context.sum(0), 0)).exp().sum(1).numpy())
        return found


def _answers(asked: Indices, groups: Indices, utility: dict[int, float]) -> Indices:
    """The best of each question, preferred to every other. Pairs of one group are one question."""
    questions: dict[tuple[int, int], list[int]] = {}
    for number, (chosen, rejected) in enumerate(asked.tolist()):
        group = int(groups[chosen])
        key = (group, -1) if group == groups[rejected] else (group, number)
        options = questions.setdefault(key, [])
        options += [option for option in (chosen, rejected) if option not in options]
    found = []
    for options in questions.values():
        best = max(options, key=utility.__getitem__)
        found += [(best, other) for other in options if other != best]
    return np.array(found, dtype=np.int64)
