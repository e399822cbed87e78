"""The synthetic task: two users with different reward functions, against what the best predictor could do."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fssa_fast.data.choices import ChoiceData, held_out_examples
from fssa_fast.data.synthetic import bayes_optimum, disagreement, synthetic
from fssa_fast.evaluation.questions import advantage, question_curve
from fssa_fast.evaluation.tables import Cell, Measured, Table, tables_of
from fssa_fast.nn import NPBTL, RewardModel
from fssa_fast.training.fit import ExamplesConfig, RewardConfig, fit_reward
from fssa_fast.training.scores import interval, model_predictor, score, truncate

COUNTS = (0, 1, 3, 5, 10)
WITHIN = 0.005
REPEATS = 500  # test examples of each user, of 20 targets each
# Below a context of a few choices the optimum leaves most of the error; the rest is at the boundaries y = 0.5 and
# y = y', which take many steps at a falling rate to place.
SHARED: dict[str, Any] = {"max_steps": 3000, "learning_rate": 3e-3}
SAMPLED = "NP-BTL, sampled latents"
MODELS: Mapping[str, tuple[RewardConfig, dict[str, Any]]] = {
    "BTL": (RewardConfig("btl"), {}),
    "DPL": (RewardConfig("dpl"), {}),
    "NP-BTL": (RewardConfig(), {}),
    SAMPLED: (RewardConfig(sampled=True), {"bound": "neural-process", "kl_weight": 0.05}),
}


def reproduce(
    *,
    seeds: Sequence[int],
    runs: str | os.PathLike[str] | None = None,
    steps: int | None = None,
    models: Mapping[str, tuple[RewardConfig, dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Trains every model with every seed; measures on pairs held out.

    Args:
        runs: where run directories go; None keeps none. steps: of each training, where not the usual number.
        models: those of MODELS, or others.
    """
    train, validation, test = synthetic()
    examples = held_out_examples(test, max_context=max(COUNTS), max_targets=20, repeats=REPEATS)
    p = disagreement(test)
    optimum = [bayes_optimum(p, count) for count in COUNTS]
    measured: Measured = {}
    seconds: dict[str, list[float]] = {}
    per_seed: dict[str, list[list[float]]] = {}
    last: dict[str, RewardModel] = {}
    questions: list[Table] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, (config, training) in (models or MODELS).items():
            for seed in seeds:
                directory = Path(runs or scratch) / f"{name.lower().replace(', ', '-').replace(' ', '-')}-{seed}"
                settings = {**SHARED, **training, "disable_tqdm": True}
                if steps is not None:
                    settings |= {"max_steps": steps, "warmup_steps": min(50, steps // 10)}
                begin = time.perf_counter()
                model = fit_reward(
                    config, train, None, directory, training=settings, examples=ExamplesConfig(10, 10), seed=seed,
                    provenance={"data": "synthetic"},
                )  # fmt: skip
                seconds.setdefault(name, []).append(round(time.perf_counter() - begin, 1))
                last[name] = model
                for count in COUNTS:
                    predict = model_predictor(model, samples=64)
                    scores = score(predict, test, truncate(examples, count), unit="example")
                    measured.setdefault(name, {}).setdefault(count, []).append(scores)
            per_seed[name] = [[measured[name][count][i].accuracy for count in COUNTS] for i in range(len(seeds))]
    table, *others = tables_of("Synthetic task", measured, digits=2)
    table.rows["Bayes optimum"] = [Cell(value) for value in optimum]
    if SAMPLED in last:
        questions = _questions(last[SAMPLED], test, seeds[-1])
    checks = [
        f"{name}, {count} choices: {'within' if abs(cell.mean - best) <= WITHIN else 'NOT within'} 0.5 points of the "
        f"optimum ({100 * (cell.mean - best):+.2f})"
        for name, cells in table.rows.items()
        if name.startswith("NP")
        for count, cell, best in zip(COUNTS, cells, optimum, strict=True)
    ]
    return {
        "tables": [table, *others, *questions],
        "checks": checks,
        "per seed": per_seed,
        "seconds of each training": seconds,
    }


def _questions(model: RewardModel, test: ChoiceData, seed: int) -> list[Table]:
    """What asking well is worth: questions chosen out of 30 by expected information, against random ones."""
    assert isinstance(model, NPBTL)
    counts = COUNTS[1:4]
    examples = held_out_examples(test, max_context=30, max_targets=20, repeats=max(1, REPEATS // 5), seed=seed)
    active, random = question_curve(model, test, examples, counts, samples=64)
    table = Table(
        "Questions: unseen pairs predicted, %, by questions asked", [str(k) for k in counts], first="questions"
    )
    table.rows["chosen by expected information"] = [Cell(*interval([active[k].accuracies])) for k in counts]
    table.rows["random"] = [Cell(*interval([random[k].accuracies])) for k in counts]
    table.rows["difference"] = [Cell(*interval([advantage(active[k], random[k])])) for k in counts]
    return [table]
