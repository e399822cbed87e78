"""Measures the demo adapter: attributes and fluency of what users get, on topics never trained on.

``python -m examples.demo.evaluate ADAPTER samples.jsonl OUT`` writes OUT.json (the figures), OUT.md (two tables),
OUT.png and OUT.jsonl (the answers).

A person is one kind of user and a few choices between sampled answers on test topics; the prompts answered are on
other test topics. Everyone's answers, the base's too, are sampled alike (temperature 0.7, nucleus 0.95, at most 192
tokens) by one engine that serves all users in mixed batches.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from fssa_fast import BASE, Choice, SteerablePolicy, TextEmbedder

from .answers import answer
from .base import load_base, load_embedder
from .choices import Pair, pairs_of
from .criteria import AXES, Axis, distinct_2, foreign_share, measure, words
from .prompts import prompts
from .sample import read_samples

COUNTS = (1, 3, 5, 10)
POINTS = 7


@dataclass(frozen=True)
class Answer:
    """One answer: who was served, with how many choices (None: base and mixtures), and what is measured of it.

    `base_distinct_2` is of the base's own answer to the prompt, cut to as many words: the longer a text, the more of
    its pairs of words it has used before, so a short text is compared with the beginning of a long one.
    """

    group: str
    choices: int | None
    prompt: str
    text: str
    ended: bool
    log_likelihood: float
    distinct_2: float
    base_distinct_2: float
    foreign: float
    attributes: dict[str, float]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and the half-width of its 95 % interval (normal)."""
    return mean(values), 1.96 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def spearman(values: Sequence[float]) -> float:
    """Spearman's correlation of values with their places; equal values are ranked in order of their places."""
    return float(np.corrcoef(np.arange(len(values)), np.argsort(np.argsort(values, kind="stable")))[0, 1])


def add_people(
    policy: SteerablePolicy, pairs: Mapping[str, Sequence[Pair]], topics: Sequence[str], seed: int
) -> dict[tuple[str, int, str], str]:
    """Adds, for every kind, number of choices and topic, a person who chose on other topics: their names."""
    draw, names, users = random.Random(seed), {}, {}
    for kind, own in pairs.items():
        for topic in topics:
            others = [pair for pair in own if pair.topic != topic]
            picked = draw.sample(others, max(COUNTS))
            for count in COUNTS:
                name = names[kind, count, topic] = f"{kind}-{count}-{topic}"
                users[name] = [Choice(p.chosen, p.rejected, p.prompt) for p in picked[:count]]
    policy.users.add_many(users)
    return names


def answer_all(
    policy: SteerablePolicy, requests: Sequence[tuple[str, int | None, str, str]], *, batch: int, seed: int
) -> list[Answer]:
    """Answers (group, choices, prompt, user) requests, users mixed in every batch; BASE is asked every prompt."""
    answers = answer(policy, [(prompt, user) for _, _, prompt, user in requests], rows=batch, seed=seed)
    plain = {prompt: words(a.text) for (_, _, prompt, user), a in zip(requests, answers, strict=True) if user == BASE}
    return [
        Answer(
            group, count, prompt, a.text, a.ended, a.log_likelihood, distinct_2(a.text),
            distinct_2(" ".join(plain[prompt][: len(words(a.text))])), foreign_share(prompt, a.text), measure(a.text),
        )
        for (group, count, prompt, _), a in zip(requests, answers, strict=True)
    ]  # fmt: skip


def evaluate(
    policy: SteerablePolicy, samples: str | os.PathLike[str], *, repeats: int = 2, batch: int = 64, seed: int = 1
) -> dict[str, Any]:
    """All answers and the figures of the tables; `repeats` wordings of each test topic are asked."""
    asked = [prompt for prompt in prompts("test") if prompt.wording < repeats]
    topics = sorted({prompt.topic for prompt in asked})
    pairs = pairs_of(read_samples(samples), "test", seed=seed)
    names = add_people(policy, pairs, topics, seed)
    requests: list[tuple[str, int | None, str, str]] = [("base", None, p.text, BASE) for p in asked]
    for kind in pairs:
        requests += [(kind, k, p.text, names[kind, k, p.topic]) for k in COUNTS for p in asked]
    for axis in AXES:
        if axis.low not in pairs:
            continue
        for point in range(POINTS):
            share = point / (POINTS - 1)
            for topic in topics:
                ends = names[axis.low, max(COUNTS), topic], names[axis.high, max(COUNTS), topic]
                policy.users.interpolate(f"{axis.name}-{point}-{topic}", {ends[0]: 1 - share, ends[1]: share})
            requests += [(f"{axis.name}:{point}", None, p.text, f"{axis.name}-{point}-{p.topic}") for p in asked]
    answers = answer_all(policy, requests, batch=batch, seed=seed)
    return {"answers": [asdict(a) for a in answers], **figures(answers, [a for a in AXES if a.low in pairs])}


def figures(answers: Sequence[Answer], axes: Sequence[Axis]) -> dict[str, Any]:
    """Attributes by kind and number of choices, and along the mixtures; fluency beside the base's."""

    def of(group: str, count: int | None = None) -> list[Answer]:
        return [a for a in answers if a.group == group and a.choices == count]

    base = of("base")
    steering, path = [], []
    for axis in axes:
        for count in COUNTS:
            row: dict[str, Any] = {"axis": axis.name, "choices": count}
            for name, group in (("low", of(axis.low, count)), ("base", base), ("high", of(axis.high, count))):
                row[name] = interval([a.attributes[axis.name] for a in group])
            row["apart"] = row["low"][0] + row["low"][1] < row["high"][0] - row["high"][1]
            steering.append(row | {"kinds": [axis.low, axis.high]})
        means = [mean(a.attributes[axis.name] for a in of(f"{axis.name}:{point}")) for point in range(POINTS)]
        path.append({"axis": axis.name, "means": means, "spearman": spearman(means)})
    fluency = []
    for group in ("base", *(kind for axis in axes for kind in (axis.low, axis.high))):
        own = base if group == "base" else [a for a in answers if a.group == group]
        fluency.append(
            {
                "group": group,
                "answers": len(own),
                "log_likelihood": mean(a.log_likelihood for a in own if a.text),
                "distinct_2": mean(a.distinct_2 for a in own),
                "base_distinct_2": mean(a.base_distinct_2 for a in own),
                "foreign": max(a.foreign for a in own),
                "foreign_answers": sum(a.foreign > 0 for a in own),
                "ended": mean(a.ended for a in own),
                "words": mean(len(a.text.split()) for a in own),
            }
        )
    return {"steering": steering, "path": path, "fluency": fluency}


def tables(result: Mapping[str, Any]) -> str:
    """The figures as two Markdown tables."""

    def cell(value: Sequence[float]) -> str:
        return f"{value[0]:.2f} ± {value[1]:.2f}"

    lines = [
        "| axis (from, to) | choices | first | base | second | intervals apart | Spearman, 7 points |",
        "|---" * 7 + "|",
    ]
    spearman = {row["axis"]: row["spearman"] for row in result["path"]}
    for row in result["steering"]:
        last = f"{spearman[row['axis']]:.2f}" if row["choices"] == max(COUNTS) else ""
        lines.append(
            f"| {row['axis']} ({row['kinds'][0]}, {row['kinds'][1]}) | {row['choices']} | {cell(row['low'])} | "
            f"{cell(row['base'])} | {cell(row['high'])} | {'yes' if row['apart'] else 'no'} | {last} |"
        )
    lines += [
        "",
        "| answers of | nats a token, base | distinct-2 | of the base, as long | foreign characters | ended | words |",
        "|---" * 7 + "|",
    ]
    for row in result["fluency"]:
        lines.append(
            f"| {row['group']} ({row['answers']}) | {row['log_likelihood']:.2f} | {row['distinct_2']:.3f} | "
            f"{row['base_distinct_2']:.3f} | {row['foreign_answers']} answers | "
            f"{row['ended']:.2f} | {row['words']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def plot(result: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Attributes by number of choices, and along the way from one user to the other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, len(result["path"]), figsize=(4.2 * len(result["path"]), 6.4), squeeze=False)
    for column, way in enumerate(result["path"]):
        rows = [row for row in result["steering"] if row["axis"] == way["axis"]]
        top, bottom = panels[0][column], panels[1][column]
        for side, color in (("low", "tab:blue"), ("high", "tab:orange")):
            values = [row[side] for row in rows]
            label = rows[0]["kinds"][side == "high"]
            top.errorbar(COUNTS, [v[0] for v in values], [v[1] for v in values], fmt="o-", color=color, label=label)
        top.axhline(rows[0]["base"][0], color="gray", linestyle="--", label="base")
        top.set(title=way["axis"], xlabel="choices known", ylabel="attribute of the answers")
        top.legend()
        shares = [point / (POINTS - 1) for point in range(POINTS)]
        bottom.plot(shares, way["means"], "o-", color="tab:green")
        bottom.set(xlabel=f"share of “{rows[0]['kinds'][1]}” in the mixture", ylabel="attribute of the answers")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure the demo adapter.")
    parser.add_argument("adapter", help="directory of the policy")
    parser.add_argument("samples", help="JSON lines of examples.demo.sample")
    parser.add_argument("out", help="where to write OUT.json, OUT.md and OUT.png")
    parser.add_argument("--repeats", type=int, default=2, help="wordings of each test topic, 1 to 4")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cache-dir", help="where the dequantised model is kept")
    options = parser.parse_args()
    model, tokenizer = load_base(options.cache_dir)
    policy = SteerablePolicy.from_pretrained(
        options.adapter, model, tokenizer=tokenizer, embedder=TextEmbedder(*load_embedder()), capacity=2048
    )
    result = evaluate(policy, options.samples, repeats=options.repeats, batch=options.batch, seed=options.seed)
    out = Path(options.out)
    answers = result.pop("answers")
    out.with_suffix(".jsonl").write_text(
        "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers), encoding="utf-8"
    )
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(tables(result), encoding="utf-8")
    plot(result, out.with_suffix(".png"))
    print(tables(result))


if __name__ == "__main__":
    main()
