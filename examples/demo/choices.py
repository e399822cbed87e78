"""From sampled answers to users' choices: pairs that differ clearly on one axis and as little as may be on others."""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any

import torch

from fssa_fast import TextEmbedder
from fssa_fast.training import Preference

from .criteria import AXES, KINDS, Axis, distinct_2, foreign_share, preference, words
from .prompts import Split
from .sample import read_samples

__all__ = ["Pair", "better_pairs", "pairs_of", "pictures_pairs", "preferences", "with_both", "write_users"]

FRESH = 0.75  # the least share of distinct pairs of neighbouring words
FLUENT = -1.5  # the least log-likelihood a token, where it is known
CLEARLY_FRESHER = 0.15
ALIKE = 0.5  # the largest difference on the other axes, in margins
LONG_ENOUGH = 32  # words
PICTURES = "🌱🌍🌐🌊🌟🐦🍓🍕🌳🌌🌈✨🎨🚗💡🎉👩☎❌"


@dataclass(frozen=True)
class Pair:
    """One choice that a kind of user would make: `chosen` before `rejected`, answers to one prompt."""

    topic: str
    prompt: str
    chosen: str
    rejected: str
    chosen_ended: bool
    rejected_ended: bool


def pairs_of(
    records: Sequence[Mapping[str, Any]],
    split: Split,
    *,
    axes: Sequence[Axis] = AXES,
    each: int = 6,
    seed: int = 0,
) -> dict[str, list[Pair]]:
    """The pairs of every kind of user, by kind, in an order drawn from the seed.

    Of each prompt, the pairs whose answers differ by the axis' margin at least and by half a margin at most on any
    other axis: that a user likes short answers is not to be read off their being prose. The `each` most alike on the
    other axes are kept, no answer in more than two. Answers that repeat themselves are in no pair, or a
    model would learn to repeat itself; and where length is not what counts, answers are long enough to have a form. The
    opposite kind makes the opposite choice on the same pairs, so the two differ in nothing but the choice.

    Args:
        records: as `examples.demo.sample` writes them; those of the other split are left out.
    """
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if record["split"] == split and record["response"] and _good(record):
            by_prompt.setdefault(record["prompt"], []).append(record)
    draw = random.Random(seed)
    found: dict[str, list[Pair]] = {}
    for axis in axes:
        others = [other for other in axes if other is not axis]
        pairs: list[Pair] = []
        for prompt, answers in by_prompt.items():
            own = answers if axis.name == "length" else [a for a in answers if len(words(a["response"])) >= LONG_ENOUGH]
            clear = []
            for place, (a, b) in enumerate(permutations(own, 2)):
                apart = [abs(preference(other.high, a["response"], b["response"])) for other in others]
                if preference(axis.low, a["response"], b["response"]) >= 1 and max(apart, default=0.0) <= ALIKE:
                    clear.append((sum(apart), place, a, b))
            uses: Counter[int] = Counter()
            kept: list[Pair] = []
            for _, _, a, b in sorted(clear, key=lambda entry: entry[:2]):
                if len(kept) < each and max(uses[a["id"]], uses[b["id"]]) < 2:
                    uses.update((a["id"], b["id"]))
                    kept.append(Pair(a["topic"], prompt, a["response"], b["response"], a["ended"], b["ended"]))
            pairs += kept
        draw.shuffle(pairs)
        found[axis.low] = pairs
        found[axis.high] = [
            Pair(p.topic, p.prompt, p.rejected, p.chosen, p.rejected_ended, p.chosen_ended) for p in pairs
        ]
    return found


def _good(record: Mapping[str, Any]) -> bool:
    """Whether an answer may be preferred: no repetition, no emoji and, where that is known, likely enough."""
    return (
        distinct_2(record["response"]) >= FRESH
        and foreign_share(record["prompt"], record["response"]) == 0
        and record.get("log_likelihood", 0.0) >= FLUENT
    )


def better_pairs(
    records: Sequence[Mapping[str, Any]], fresh: Sequence[Mapping[str, Any]], *, each: int = 3, seed: int = 0
) -> dict[str, list[Pair]]:
    """What everyone prefers, by the kind whose answer is rejected: one alike on all axes that is well written.

    Args:
        records: answers to choose from. fresh: a policy's own answers, as `examples.demo.resample` writes them; those
            that repeat themselves or are unlikely are rejected, the others chosen from too.
        each: pairs an answer is rejected in at most.
    """
    draw = random.Random(seed)
    good: dict[str, list[Mapping[str, Any]]] = {}
    for record in (*records, *fresh):
        if record["split"] == "train" and record["response"] and _good(record):
            good.setdefault(record["prompt"], []).append(record)
    found: dict[str, list[Pair]] = {kind: [] for kind in KINDS}
    for bad in fresh:
        if not bad["response"] or _good(bad):
            continue
        alike = [
            record
            for record in good.get(bad["prompt"], ())
            if all(abs(preference(axis.high, record["response"], bad["response"])) <= 1 for axis in AXES)
            and (
                distinct_2(record["response"]) >= distinct_2(bad["response"]) + CLEARLY_FRESHER
                or bad["log_likelihood"] < FLUENT
                or foreign_share(bad["prompt"], bad["response"]) > 0
            )
        ]
        for record in draw.sample(alike, min(each, len(alike))):
            found[bad["kind"]].append(
                Pair(bad["topic"], bad["prompt"], record["response"], bad["response"], record["ended"], bad["ended"])
            )
    return found


def pictures_pairs(pairs: Mapping[str, Sequence[Pair]], count: int, *, seed: int = 0) -> dict[str, list[Pair]]:
    """`count` choices of every kind's answers before the same ones broken off by pictures, which everyone makes.

    A steered policy begins one answer in a hundred with a picture and may not leave off; samples of a size that can be
    had show too few of them to learn from, so these are made up: three of four begin with the picture, the others go
    to pictures anywhere. Up to there the two answers are the same, so all there is to learn is not to begin.
    """
    draw = random.Random(seed)
    found = {}
    for kind, own in pairs.items():
        found[kind] = []
        for pair in draw.choices(own, k=count):
            words_begin = [match.start() for match in re.finditer(r"\S+", pair.chosen)]
            kept = pair.chosen[: draw.choice((0, 0, 0, draw.choice(words_begin)))]
            drawn = draw.choice(PICTURES) * draw.choice((1, 1, 12))
            found[kind].append(Pair(pair.topic, pair.prompt, pair.chosen, kept + drawn, pair.chosen_ended, False))
    return found


def with_both(users: Mapping[str, Sequence[Preference]], *, axes: Sequence[Axis] = AXES) -> dict[str, list[Preference]]:
    """The users and, for every combination of ends, one who cares about all axes, with as many choices on each."""
    found = {kind: list(own) for kind, own in users.items()}
    for ends in product(*((axis.low, axis.high) for axis in axes)):
        share = min(len(users[kind]) for kind in ends)
        found[" ".join(ends)] = [choice for kind in ends for choice in users[kind][:share]]
    return found


def preferences(
    pairs: Mapping[str, Sequence[Pair]], embedder: TextEmbedder, *, in_context: bool = True
) -> dict[str, list[Preference]]:
    """The pairs as the trainer takes them: embedded, with the topic as what contexts and targets never share."""
    found = {}
    for kind, own in pairs.items():
        texts = [(pair.prompt, text) for pair in own for text in (pair.chosen, pair.rejected)]
        # What is in no context needs no embedding.
        embedded = embedder.encode(texts) if own and in_context else torch.zeros(len(texts), embedder.width)
        embedded = embedded.view(len(own), 2, embedder.width)
        found[kind] = [
            Preference(
                [{"role": "user", "content": pair.prompt}],
                pair.chosen,
                pair.rejected,
                pair.topic,
                vectors,
                pair.chosen_ended,
                pair.rejected_ended,
                in_context,
            )
            for pair, vectors in zip(own, embedded, strict=True)
        ]
    return found


def write_users(samples: str, out: str, *, count: int = 5, seed: int = 0) -> None:
    """Writes the demo's users: `count` choices of each kind between answers on test topics, as JSON."""
    pairs = pairs_of(read_samples(samples), "test", seed=seed)
    users = {
        kind: [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in own[:count]]
        for kind, own in pairs.items()
    }
    Path(out).write_text(json.dumps(users, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the demo's users: choices on topics never trained on.")
    parser.add_argument("samples", help="JSON lines of examples.demo.sample")
    parser.add_argument("out", help="JSON file to write")
    options = parser.parse_args()
    write_users(options.samples, options.out)
