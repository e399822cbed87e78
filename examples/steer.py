"""Steers your own model: ``python -m examples.steer MODEL ENCODER choices.jsonl OUT``."""

from __future__ import annotations

import sys
from pathlib import Path

from fssa_fast import BASE, Choice
from fssa_fast.data.files import read_choices
from fssa_fast.training.config import DataConfig, PolicyRun
from fssa_fast.training.fit_policy import fit_policy


def main(model: str, encoder: str, choices: str, out: str, steps: int = 200) -> list[str]:
    """Trains a policy on the choices; returns the first prompt's answers for the first user and for the base model."""
    data = DataConfig(choices, encoder)
    policy = fit_policy(PolicyRun(model, data, str(Path(out)), training={"max_steps": steps}))
    first = read_choices(choices)[0]
    own = [c for c in read_choices(choices) if c.user == first.user]
    policy.users.add(first.user, [Choice(str(c.chosen), str(c.rejected), c.prompt) for c in own])
    answers = policy.generate([first.prompt] * 2, users=[first.user, BASE], max_new_tokens=64, do_sample=False)
    print(*answers, sep="\n---\n")
    return answers


if __name__ == "__main__":
    main(*sys.argv[1:])
