"""Real people's choices: NP-BTL against models without users, a variational encoder, and a linear model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fssa_fast.data.choices import ChoiceData, Example, held_out_examples
from fssa_fast.data.people import CONVERSATION, Parts, helpful_harmless, polis, stated_choice
from fssa_fast.evaluation.linear import HierarchicalLogit, UserLogits
from fssa_fast.evaluation.tables import Cell, Measured, Table, tables_of
from fssa_fast.training.fit import ExamplesConfig, RewardConfig, fit_reward
from fssa_fast.training.scores import Floats, Predictor, Unit, interval, model_predictor, score, truncate

LINEAR = "linear (hierarchical logit)"
SIGNS = "linear (a logit a criterion, and Bayes over them)"


@dataclass(frozen=True)
class Task:
    """One data set: how it is loaded, measured and fitted."""

    title: str
    load: Callable[[Path, int, str | None], Parts]  # from directory, seed, and conversation
    counts: tuple[int, ...]
    training: dict[str, Any]
    examples: ExamplesConfig
    latent_width: int = 64
    pooling: Literal["self-attention", "mean"] = "self-attention"  # of the encoders
    components: int | None = None  # of the linear baseline
    compress: int | None = None  # principal components of the options that every model sees
    simulated: int = 0  # users drawn from the linear baseline that join the training users
    members: int = 1  # models whose probabilities are averaged
    repeats: int = 4  # draws of context and targets a test user
    share: float = 0.6  # of a test user's groups, for the context
    unit: Unit = "user"  # of the intervals


PANEL: dict[str, Any] = {
    "max_steps": 3000,
    "eval_steps": 250,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "warmup_steps": 50,
}
TEXT: dict[str, Any] = {
    "max_steps": 1500,
    "eval_steps": 100,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "warmup_steps": 50,
}
SIMULATED: dict[str, Any] = {"simulated": 20_000, "members": 3, "repeats": 8, "share": 0.65}
TASKS: dict[str, tuple[Task, ...]] = {
    "polis": (
        Task(
            "Polis, bowling-green, contested pairs",
            lambda directory, seed, name: polis(directory, seed=seed, conversation=name or CONVERSATION),
            (0, 1, 3, 5, 10, 20),
            TEXT,
            ExamplesConfig(20, 16),
            components=32,
        ),
    ),
    "stated-choice": (
        Task(
            "Stated choice, train",
            lambda directory, seed, _: stated_choice(directory, "train", seed=seed),
            (0, 1, 3, 5, 8),
            PANEL,
            ExamplesConfig(8, 8),
            **SIMULATED,
        ),
        Task(
            "Stated choice, electricity",
            lambda directory, seed, _: stated_choice(directory, "electricity", seed=seed),
            (0, 1, 3, 5, 10, 18),
            PANEL,
            ExamplesConfig(18, 8),
            **SIMULATED,
        ),
    ),
    "hh": (
        Task(
            "Helpful and harmless, conflicting pairs",
            lambda directory, seed, _: helpful_harmless(directory, seed=seed),
            (0, 1, 3, 5, 10),
            {**TEXT, "embedding_noise": 0.3, "max_steps": 400, "eval_steps": 50},
            ExamplesConfig(30, 32),
            latent_width=32,
            pooling="mean",  # a latent then says who the user is, and not how many choices were given
            compress=32,
            repeats=200,
            unit="pair",
        ),
    ),
}


def reproduce(
    name: Literal["polis", "stated-choice", "hh"],
    *,
    data: str | os.PathLike[str],
    seeds: Sequence[int],
    runs: str | os.PathLike[str] | None = None,
    steps: int | None = None,
    conversation: str | None = None,
) -> dict[str, Any]:
    """Trains every model with every seed, which also draws the split, and measures on what is held out.

    Args:
        data: the data set's directory. runs: where run directories go; None keeps none.
        steps: of each training, where not the usual number.
        conversation: which one of Polis'; None takes bowling-green's.
    """
    found: dict[str, Any] = {"tables": [], "checks": [], "settings": []}
    for task in TASKS[name]:
        if conversation is not None:
            task = replace(task, title=f"Polis, {conversation}, contested pairs")
        _reproduce(task, Path(data), seeds, runs, steps, conversation, found)
    return found


def _reproduce(
    task: Task,
    data: Path,
    seeds: Sequence[int],
    runs: Any,
    steps: int | None,
    conversation: str | None,
    found: dict[str, Any],
) -> None:
    measured: Measured = {}
    criteria: dict[str, list[Floats]] = {}
    given: list[Floats] = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in seeds:
            parts = compress(task.load(data, seed, conversation), task.compress)
            examples = held_out_examples(
                parts[2], max_context=max(task.counts), repeats=task.repeats, share=task.share, seed=seed
            )
            given.append(np.array([[min(k, len(e.context)) for k in task.counts] for e in examples]).mean(0))
            predictors = _fit(task, parts, Path(runs or scratch), seed, steps)
            for model, predict in predictors.items():
                for count in task.counts:
                    scores = score(predict, parts[2], truncate(examples, count), unit=task.unit)
                    measured.setdefault(model, {}).setdefault(count, []).append(scores)
                if task.unit == "pair":  # the most choices', for each of the few users
                    for user, label in enumerate(parts[2].users):
                        mine = [e for e in truncate(examples, max(task.counts)) if e.user == user]
                        own = score(predict, parts[2], mine, unit="pair").accuracies
                        criteria.setdefault(f"{model}: {label}", []).append(own)
    found["tables"] += tables_of(task.title, measured)
    accuracies = {
        model: {count: [scores.accuracies for scores in own] for count, own in by_count.items()}
        for model, by_count in measured.items()
    }
    if criteria:
        by_user = Table(f"{task.title}: by criterion, after {max(task.counts)} choices", ["accuracy"])
        by_user.rows = {label: [Cell(*interval(values))] for label, values in criteria.items()}
        found["tables"].append(by_user)
        for label, values in criteria.items():
            if label.startswith("NP-BTL:"):
                mean = interval(values)[0]
                found["checks"].append(f"{task.title}: {label} {'above' if mean > 0.62 else 'NOT above'} 62 %")
    for other in [model for model in accuracies if model != "NP-BTL"]:
        for count in task.counts:
            if count == 0:
                continue
            difference = [a - b for a, b in zip(accuracies["NP-BTL"][count], accuracies[other][count], strict=True)]
            mean, low, high = interval(difference)
            verdict = "above" if mean > 0 else "NOT above"
            sure = "" if low > 0 or high < 0 else ", not beyond chance"
            found["checks"].append(
                f"{task.title}, {count} choices: NP-BTL {verdict} {other}: {100 * mean:+.1f} "
                f"[{100 * low:.1f}, {100 * high:.1f}]{sure}"
            )
    found["settings"].append({
        "task": task.title,
        "choices given, mean": dict(zip(task.counts, np.mean(given, 0).round(2).tolist(), strict=True)),
        "training": task.training,
    })  # fmt: skip


def _fit(task: Task, parts: Parts, runs: Path, seed: int, steps: int | None) -> dict[str, Predictor]:
    train, validation, _ = parts
    linear = HierarchicalLogit(train, components=task.components, seed=seed)
    taught = train
    if task.simulated:
        taught = join(train, linear.simulate(train, task.simulated, seed=seed))
    settings: dict[str, Any] = {**task.training, "disable_tqdm": True}
    if steps is not None:
        settings |= {"max_steps": steps, "eval_steps": min(settings["eval_steps"], steps), "warmup_steps": steps // 10}
    width = task.latent_width
    models: dict[str, tuple[RewardConfig, dict[str, Any], ChoiceData]] = {
        "BTL": (RewardConfig("btl", width), {}, train),
        "DPL": (RewardConfig("dpl", width), {}, train),
        "variational (VPL-style)": (
            RewardConfig(latent_width=width, sampled=True, pooling=task.pooling),
            {"bound": "variational", "kl_weight": 0.01},
            train,
        ),
        "NP-BTL": (RewardConfig(latent_width=width, pooling=task.pooling), {}, taught),
    }  # fmt: skip
    found: dict[str, Predictor] = {LINEAR: linear.predict}
    if task.unit == "pair":  # the users of training and test are the same
        found[SIGNS] = UserLogits(train, validation).predict
    for name, (config, extra, data) in models.items():
        members = [
            fit_reward(
                config,
                data,
                validation,
                runs / f"{_slug(task.title)}-{_slug(name)}-{seed}-{member}",
                training={**settings, **extra},
                examples=task.examples,
                seed=1000 * member + seed,
                provenance={"data": task.title, "split seed": seed},
            )
            for member in range(task.members)
        ]
        found[name] = mean_predictor([model_predictor(member) for member in members])
    return found


def compress(parts: Parts, components: int | None) -> Parts:
    """The parts with their options' first principal components, those of the options that training users chose
    among; None leaves them as they are."""
    if components is None:
        return parts
    seen = parts[0].options[torch.from_numpy(np.unique(np.concatenate(parts[0].choices)))]
    mean = seen.mean(0)
    basis = torch.linalg.svd(seen - mean, full_matrices=False).Vh[:components].T
    train, validation, test = (replace(part, options=(part.options - mean) @ basis) for part in parts)
    return train, validation, test


def join(real: ChoiceData, simulated: ChoiceData) -> ChoiceData:
    """Real and simulated users of the same options; real ones repeated, so that each half is drawn as often."""
    times = max(1, len(simulated.users) // len(real.users))
    users = tuple(f"{name}/{i}" for i in range(times) for name in real.users)
    return ChoiceData(real.options, real.groups, users + simulated.users, real.choices * times + simulated.choices)


def mean_predictor(predictors: Sequence[Predictor]) -> Predictor:
    """The mean of several predictors' probabilities."""
    if len(predictors) == 1:
        return predictors[0]

    def predict(data: ChoiceData, examples: Sequence[Example]) -> list[Floats]:
        return [np.mean(each, 0) for each in zip(*(p(data, examples) for p in predictors), strict=True)]

    return predict


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
