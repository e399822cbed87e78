"""The demo: one small language model, a few users known by a handful of choices, all answered in one batch.

``python -m examples.demo`` prints each user's choices, the answers side by side and the time a token takes beside the
plain model's, and saves a picture.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

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


def time_per_token(sides: dict[str, Callable[[int], object]], tokens: int = 24, rounds: int = 3) -> dict[str, float]:
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


def save_picture(names: Sequence[str], answers: Sequence[str], path: Path) -> None:
    """Saves a bar chart: each axis' attribute of the answers, by user."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [axis for axis in AXES if axis.low in names or axis.high in names]
    figure, panels = plt.subplots(1, len(shown), figsize=(4.4 * len(shown), 3.4), squeeze=False)
    for panel, axis in zip(panels[0], shown, strict=True):
        for place, name in enumerate(names):
            values = [axis.measure(answer) for answer in answers[place :: len(names)]]
            color = "tab:orange" if name in (axis.low, axis.high) else "lightgray"
            panel.bar(name.strip("_"), sum(values) / len(values), color=color)
        panel.set_title(axis.name)
        panel.tick_params(axis="x", rotation=45)
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
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts for _ in names]
    rows = names * len(prompts)
    with console.status(f"answering {len(chats)} rows in one batch"):
        answers = policy.generate(chats, rows, max_new_tokens=options.tokens, do_sample=False, repetition_penalty=1.1)
    show_answers(prompts, names, answers)

    inputs = tokenize(policy, chats)

    def plain(count: int) -> object:
        return model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)

    def steered(count: int) -> object:
        with policy.steer(rows):
            return plain(count)

    with console.status("timing"):
        times = time_per_token({"plain": plain, "steered": steered})
    console.print(
        f"A step of {len(rows)} rows: plain model {times['plain']:.0f} ms, every row steered {times['steered']:.0f} ms "
        f"({times['steered'] / times['plain']:.2f} times)."
    )
    save_picture(names, answers, options.picture)
    console.print(f"Picture: {options.picture}")


if __name__ == "__main__":
    main()
