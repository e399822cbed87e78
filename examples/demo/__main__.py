"""The demo: one small language model, a few users known by a handful of choices, all answered in one batch.

``python -m examples.demo`` prints each user's choices, the answers side by side, and what a step of a batch of 32 users
takes beside the plain model's, and saves a picture.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fssa_fast import BASE, Choice, SteerablePolicy, TextEmbedder
from fssa_fast.generation.generate import tokenize

from .base import load_base, load_embedder
from .criteria import AXES

HERE = Path(__file__).parent
ADAPTER, CHOICES = HERE / "adapter", HERE / "choices.json"
PROMPTS = ("How can I learn to juggle?", "What should I know about glaciers?")
SHOWN = 2  # choices of each user that are printed
CROWD = 32  # users of the batch that is timed

UNITS = {"length": "log2 of the number of words", "form": "share of words in list items"}

console = Console()


def load_users() -> dict[str, list[Choice]]:
    """Each user's choices, between answers of the model to questions that the adapter was not trained on."""
    stored = json.loads(CHOICES.read_text(encoding="utf-8"))
    return {name: [Choice(c["chosen"], c["rejected"], c["prompt"]) for c in own] for name, own in stored.items()}


def shorten(text: str | torch.Tensor, length: int = 150) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(str(text).split())
    return line if len(line) <= length else line[: length - 1] + "…"


def show_choices(users: dict[str, list[Choice]]) -> None:
    """Prints what the library knows of each user."""
    table = Table(title="What is known of each user: choices between two answers", show_lines=True)
    for column in ("user", "question", "chosen", "rejected"):
        table.add_column(column)
    for name, choices in users.items():
        for choice in choices[:SHOWN]:
            table.add_row(name, choice.prompt, shorten(choice.chosen), shorten(choice.rejected))
    console.print(table)
    counts = {name: len(choices) for name, choices in users.items()}
    console.print(f"Choices known: {counts}; the first {SHOWN} of each are shown.\n")


def show_answers(prompts: Sequence[str], names: Sequence[str], answers: Sequence[str]) -> None:
    """Prints the answers, a prompt after the other, a user a column."""
    for start, prompt in enumerate(prompts):
        own = answers[start * len(names) : (start + 1) * len(names)]
        table = Table(title=prompt, show_lines=True)
        table.add_column("user")
        table.add_column("answer")
        for name, answer in zip(names, own, strict=True):
            table.add_row(name.strip("_"), answer)
        console.print(table)


def time_per_token(sides: dict[str, Callable[[int], object]], tokens: int = 12, rounds: int = 3) -> dict[str, float]:
    """Median milliseconds a decoding step of each side, measured in turn; the prompt's time is subtracted."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            times = []
            for count in (1, 1 + tokens):
                start = time.perf_counter()
                run(count)
                times.append(time.perf_counter() - start)
            found[name].append(1e3 * (times[1] - times[0]) / tokens)
    return {name: median(times) for name, times in found.items()}


@torch.no_grad()
def draw_latents(policy: SteerablePolicy, users: dict[str, list[Choice]], panel: Any) -> None:
    """The latents along their two principal axes: each user's way from no choice to all that are known."""
    latents = {}
    for name, own in users.items():
        grown = policy.users.add_many({f"the first {k} of {name}": own[:k] for k in range(len(own) + 1)})
        latents[name] = torch.stack([user.latent for user in grown if user.latent is not None])
    together = torch.cat(list(latents.values()))
    axes = torch.linalg.svd(together - together.mean(0), full_matrices=False).Vh[:2].T
    for name, own in latents.items():
        x, y = ((own - together.mean(0)) @ axes).T.tolist()
        (line,) = panel.plot(x, y, marker=".", alpha=0.6)
        panel.annotate(name, (x[-1], y[-1]), color=line.get_color())
    panel.set_title("latents, from no choice to five")
    panel.set_xlabel("first principal axis")
    panel.set_ylabel("second")


def invite(policy: SteerablePolicy, known: Sequence[str], count: int) -> list[str]:
    """So many different users: those known by their choices, and others on the ways between them."""
    names = list(known)
    while len(names) < count:
        one, other = (known[(len(names) + step) % len(known)] for step in (0, 1 + len(names) // len(known) % 3))
        share = round(0.1 + 0.8 * len(names) / count, 2)
        names.append(f"{share} {one}, {1 - share:.2f} {other}")
        policy.users.interpolate(names[-1], {one: share, other: 1 - share})
    return names


def fused_steps(policy: SteerablePolicy, ids: torch.Tensor, users: Sequence[str], count: int) -> None:
    """Answers `count` tokens a row by the fused form: all rows' prompts in one step, then a token of each in a step."""
    fused = policy.fused or policy.fuse()
    rows, length = ids.shape
    cache = fused.new_cache(rows, length + count)
    blocks = -(-(length + count) // cache.block)
    for row in range(rows):
        cache.assign(row, list(range(1 + row * blocks, 1 + (row + 1) * blocks)))
    with policy.users.slots(users) as slots:
        tokens, sequences = ids.flatten(), torch.arange(rows, dtype=torch.int32).repeat_interleave(length)
        positions = torch.arange(length, dtype=torch.int32).repeat(rows)
        last = torch.arange(length - 1, rows * length, length)
        logits = fused.forward(tokens, slots[sequences.long()], sequences, positions, cache, last)
        for position in range(length, length + count - 1):
            each = torch.arange(rows, dtype=torch.int32)
            logits = fused.forward(logits.argmax(-1), slots, each, torch.full_like(each, position), cache)
    fused.forget(cache)


def save_picture(
    policy: SteerablePolicy, users: dict[str, list[Choice]], names: Sequence[str], answers: Sequence[str], path: Path
) -> None:
    """Saves each axis' attribute of the answers, by user, and where the users' latents lie."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [axis for axis in AXES if axis.low in names or axis.high in names]
    figure, panels = plt.subplots(1, 1 + len(shown), figsize=(4.4 * (1 + len(shown)), 3.4), squeeze=False)
    for panel, axis in zip(panels[0], shown, strict=True):
        for place, name in enumerate(names):
            values = [axis.measure(answer) for answer in answers[place :: len(names)]]
            color = "tab:orange" if name in (axis.low, axis.high) else "lightgray"
            panel.bar(name.strip("_"), sum(values) / len(values), color=color)
        panel.set_title(axis.name)
        panel.set_ylabel(UNITS.get(axis.name, ""))
        panel.tick_params(axis="x", rotation=45)
    draw_latents(policy, users, panels[0, -1])
    figure.suptitle("The same questions, one batch, a different user in every row")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description="Answer different users in one batch.")
    parser.add_argument("--adapter", default=str(ADAPTER), help="directory of the policy")
    parser.add_argument("--picture", default="demo.png", type=Path, help="where to save the picture")
    parser.add_argument("--tokens", default=128, type=int, help="the longest answer")
    parser.add_argument("--prompt", action="append", help="ask this instead; may be repeated")
    parser.add_argument("--cache-dir", help="where the dequantised base model is kept")
    options = parser.parse_args()

    with console.status("loading SmolLM2-135M-Instruct, MiniLM and the adapter"):
        model, tokenizer = load_base(options.cache_dir)
        policy = SteerablePolicy.from_pretrained(
            options.adapter, model, tokenizer=tokenizer, embedder=TextEmbedder(*load_embedder())
        )
        users = load_users()
        policy.users.add_many(users)
    show_choices(users)

    prompts, names = options.prompt or list(PROMPTS), [BASE, *users]
    begin = time.perf_counter()
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts for _ in names]
    rows = names * len(prompts)
    with console.status(f"answering {len(chats)} rows in one batch"):
        answers = policy.generate(chats, rows, max_new_tokens=options.tokens, do_sample=False, repetition_penalty=1.1)
    show_answers(prompts, names, answers)

    crowd = invite(policy, list(users), CROWD)
    inputs = tokenize(policy, [[{"role": "user", "content": prompts[0]}]] * CROWD)

    def plain(count: int) -> object:
        return model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)

    def attached(count: int) -> object:
        with policy.steer(crowd):
            return plain(count)

    def fused(count: int) -> object:
        return fused_steps(policy, inputs["input_ids"], crowd, count)

    with console.status(f"timing a batch of {CROWD} users"):
        policy.fuse()
        sides = {"the plain model (transformers)": plain, "steered, attached": attached, "steered, fused": fused}
        times = time_per_token(sides)
    table = Table(title=f"A step of {CROWD} rows, every row another user")
    for column in ("", "milliseconds", "over the plain model"):
        table.add_column(column, justify="left" if not column else "right")
    for name, milliseconds in times.items():
        table.add_row(name, f"{milliseconds:.0f}", f"{milliseconds / next(iter(times.values())):.2f}")
    console.print(table)
    save_picture(policy, users, names, answers, options.picture)
    console.print(f"Picture: {options.picture}. All of it took {time.perf_counter() - begin:.0f} s.")


if __name__ == "__main__":
    main()
