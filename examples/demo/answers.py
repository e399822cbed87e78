"""Answers of a policy to many prompts of many users, all sampled alike by one engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm

from fssa_fast import SteerablePolicy

from .criteria import log_likelihood
from .sample import TEMPERATURE, TOP_P

MAX_TOKENS = 192


@dataclass(frozen=True)
class Answered:
    """An answer: whether it came to its end, and its log-likelihood a token under the base model."""

    text: str
    ended: bool
    log_likelihood: float


def answer(
    policy: SteerablePolicy, asked: Sequence[tuple[str, str]], *, rows: int = 64, seed: int = 0
) -> list[Answered]:
    """Answers (prompt, user) requests, in an order drawn from the seed so that users are mixed in every batch."""
    order = list(range(len(asked)))
    random.Random(seed).shuffle(order)
    found: dict[int, tuple[str, bool]] = {}
    with policy.engine(max_rows=rows, max_tokens=320 * rows, background=False) as engine:
        for start in tqdm(range(0, len(order), 4 * rows), desc="answering", unit=f"x{4 * rows}"):
            part = order[start : start + 4 * rows]
            results = engine.run(
                [
                    {
                        "prompt": [{"role": "user", "content": asked[i][0]}],
                        "user": asked[i][1],
                        "max_new_tokens": MAX_TOKENS,
                        "temperature": TEMPERATURE,
                        "top_p": TOP_P,
                        "seed": seed * len(asked) + i,
                    }
                    for i in part
                ]
            )
            for i, result in zip(part, results, strict=True):
                found[i] = (result.text or "").strip(), result.reason == "end"
    policy.unfuse()
    texts = [found[i][0] for i in range(len(asked))]
    likelihoods = log_likelihood(policy.model, policy.tokenizer, [prompt for prompt, _ in asked], texts)
    return [Answered(*found[i], likelihoods[i]) for i in range(len(asked))]
