"""Trains a reward model on your own CSV, and says how well it predicts people it has not seen.

``python -m examples.train_reward ratings.csv items.csv OUT``: ratings.csv has columns user, item, value; items.csv has
a column item and features, numbers, in all others. Everything else is what ``fssa data make-choices``, ``fssa train
reward`` and ``fssa eval`` do, with more options.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fssa_fast.data.choices import held_out_examples, split_users
from fssa_fast.data.files import choice_data, read_choices
from fssa_fast.data.make import make_choices, read_items
from fssa_fast.training.fit import RewardConfig, fit_reward
from fssa_fast.training.scores import interval, model_predictor, score, truncate


def main(ratings: str, items: str, out: str, steps: int = 1000) -> dict[int, tuple[float, float, float]]:
    """Returns the accuracy on held-out people, with its 95 % interval, by number of choices known."""
    make_choices(ratings, out, "ratings", items=read_items(items), max_pairs=50)
    data = choice_data(read_choices(Path(out) / "choices.jsonl"))
    train, validation, test = (data.of_users(part) for part in split_users(len(data.users), seed=0))
    model = fit_reward(RewardConfig(), train, validation, Path(out) / "run", training={"max_steps": steps})
    examples = held_out_examples(test, max_context=10, repeats=4)
    found = {}
    for count in (0, 1, 3, 10):
        found[count] = interval([score(model_predictor(model), test, truncate(examples, count)).accuracies])
        print(f"{count:>2} choices: {100 * found[count][0]:.1f} % of unseen choices predicted")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
