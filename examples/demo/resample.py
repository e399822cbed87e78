"""A further round of samples: the trained policy's own answers to the training prompts, as users of each kind get them.

``python -m examples.demo.resample ADAPTER samples.jsonl fresh.jsonl`` writes JSON lines with the fields of
``examples.demo.sample`` and with ``kind`` (whom it was for) and ``log_likelihood`` (a token, under the base model).
What a trained policy does badly, repeating itself in lists above all, shows in its own answers only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from pathlib import Path

from fssa_fast import Choice, SteerablePolicy, TextEmbedder

from .answers import answer
from .base import load_base, load_embedder
from .choices import pairs_of
from .criteria import KINDS
from .prompts import prompts
from .sample import read_samples

CHOICES = 10


def resample(
    policy: SteerablePolicy, samples: str | os.PathLike[str], out: str | os.PathLike[str], *, seed: int = 0
) -> None:
    """Answers two wordings of each training topic for a person of every kind, who has chosen on other topics."""
    draw = random.Random(seed)
    pairs = pairs_of(read_samples(samples), "train", seed=seed)
    asked = [prompt for prompt in prompts("train") if prompt.wording < 2]
    users: dict[str, list[Choice]] = {}
    for kind in KINDS:
        for topic in {prompt.topic: None for prompt in asked}:
            picked = draw.sample([pair for pair in pairs[kind] if pair.topic != topic], CHOICES)
            users[f"{kind} {topic}"] = [Choice(pair.chosen, pair.rejected, pair.prompt) for pair in picked]
    policy.users.add_many(users)
    wanted = [(kind, prompt) for prompt in asked for kind in KINDS]
    answers = answer(policy, [(prompt.text, f"{kind} {prompt.topic}") for kind, prompt in wanted], seed=seed)
    with Path(out).open("w", encoding="utf-8") as lines:
        for place, ((kind, prompt), answered) in enumerate(zip(wanted, answers, strict=True)):
            record = {
                "id": f"{kind} {seed} {place}",
                "split": "train",
                "topic": prompt.topic,
                "wording": prompt.wording,
                "prompt": prompt.text,
                "response": answered.text,
                "ended": answered.ended,
                "kind": kind,
                "log_likelihood": answered.log_likelihood,
            }
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Sample the trained policy's answers on the training prompts.")
    parser.add_argument("adapter", help="directory of the policy")
    parser.add_argument("samples", help="JSON lines of examples.demo.sample")
    parser.add_argument("out", help="JSON lines to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache-dir", help="where the dequantised model is kept")
    options = parser.parse_args()
    model, tokenizer = load_base(options.cache_dir)
    embedder = TextEmbedder(*load_embedder())
    policy = SteerablePolicy.from_pretrained(
        options.adapter, model, tokenizer=tokenizer, embedder=embedder, capacity=1024
    )
    resample(policy, options.samples, options.out, seed=options.seed)


if __name__ == "__main__":
    main()
