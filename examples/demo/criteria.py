"""What a user may care about, each as a number a program reads off the text, and measures of fluency.

An :class:`Axis` has a user at each of its ends: on ``length``, the user ``short`` prefers the answer with fewer words,
the user ``long`` the one with more. A difference counts from the axis' margin on.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .base import chat_prompt

__all__ = [
    "AXES",
    "KINDS",
    "Axis",
    "axis_of",
    "distinct_2",
    "ended",
    "foreign_share",
    "log_likelihood",
    "measure",
    "preference",
    "words",
]

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_LIST_ITEM = re.compile(r"^\s*(?:[-*•]|\d{1,2}[.)])\s*\S")


@dataclass(frozen=True)
class Axis:
    """One criterion of choice.

    Attributes:
        name: name of the axis.
        low: the kind of user who prefers small values.
        high: the kind of user who prefers large values.
        measure: from a text to the value.
        margin: two texts closer than this do not differ on the axis.
    """

    name: str
    low: str
    high: str
    measure: Callable[[str], float]
    margin: float


def words(text: str) -> list[str]:
    """The words of a text: runs of letters, apostrophes within, no digits."""
    return _WORD.findall(text)


def _log_words(text: str) -> float:
    return math.log2(max(1, len(words(text))))


def _list_share(text: str) -> float:
    """Share of the words that stand on lines opened by a bullet or a number; 0 with fewer than two such lines."""
    lines = [line for line in text.splitlines() if line.strip()]
    items = [line for line in lines if _LIST_ITEM.match(line)]
    if len(items) < 2:
        return 0.0
    total = sum(len(line.split()) for line in lines)
    return sum(len(line.split()) for line in items) / total


AXES: tuple[Axis, ...] = (
    Axis("length", "short", "long", _log_words, 0.8),
    Axis("form", "prose", "list", _list_share, 0.5),
)
KINDS: tuple[str, ...] = tuple(kind for axis in AXES for kind in (axis.low, axis.high))


def axis_of(kind: str) -> tuple[Axis, int]:
    """The axis a kind of user cares about and the direction, -1 or +1, in which it prefers values to go."""
    for axis in AXES:
        if kind in (axis.low, axis.high):
            return axis, 1 if kind == axis.high else -1
    raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")


def measure(text: str) -> dict[str, float]:
    """The value of a text on every axis, by name."""
    return {axis.name: axis.measure(text) for axis in AXES}


def preference(kind: str, first: str, second: str) -> float:
    """How much a kind of user prefers the first text, in margins of its axis: clearly from 1 on, not at all at 0."""
    axis, sign = axis_of(kind)
    return sign * (axis.measure(first) - axis.measure(second)) / axis.margin


def distinct_2(text: str) -> float:
    """Share of distinct ones among the pairs of neighbouring words; 1 where there is no pair."""
    found = [word.lower() for word in words(text)]
    pairs = list(zip(found, found[1:], strict=False))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def foreign_share(prompt: str, response: str) -> float:
    """Share of a response's characters that are neither ASCII nor common typography, nor of a script in the prompt.

    Scripts are told apart by the first word of a letter's Unicode name. Raised and lowered digits (CO₂) belong to every
    script; symbols and emoji count as foreign.
    """
    if not response:
        return 0.0
    scripts = {_script(char) for char in prompt if char.isalpha()} | {"LATIN"}

    def foreign(char: str) -> bool:
        if char.isascii() or char in "‘’“”–—…•°½é£€" or unicodedata.category(char) == "No":
            return False
        return _script(char) not in scripts if char.isalpha() else True

    return sum(map(foreign, response)) / len(response)


def _script(char: str) -> str:
    return unicodedata.name(char, "UNKNOWN").split()[0]


def ended(token_ids: Sequence[int], eos_token_id: int) -> bool:
    """Whether generated tokens hold the end of the answer, rather than being cut off."""
    return eos_token_id in token_ids


@torch.inference_mode()
def log_likelihood(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    batch_size: int = 16,
) -> list[float]:
    """Mean log-likelihood a token of each response after its prompt, the end-of-answer token left out.

    Args:
        model: the base model; an adapter on it should be off.
        tokenizer: its tokenizer.
        prompts: what was asked, without the chat template.
        responses: as many answers; an empty one gives NaN.
        batch_size: rows a forward pass.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"prompts and responses must be equally many, got {len(prompts)} and {len(responses)}")
    heads = [tokenizer(chat_prompt(tokenizer, prompt), add_special_tokens=False).input_ids for prompt in prompts]
    tails = [tokenizer(response, add_special_tokens=False).input_ids for response in responses]
    values = [math.nan] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda row: len(heads[row]) + len(tails[row]))  # little padding a batch
    for start in tqdm(range(0, len(order), batch_size), desc="log-likelihoods", unit="batch"):
        rows = order[start : start + batch_size]
        width = max(len(heads[row]) + len(tails[row]) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        attended, scored = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
        for place, row in enumerate(rows):
            head, both = len(heads[row]), len(heads[row]) + len(tails[row])
            ids[place, :both] = torch.tensor(heads[row] + tails[row])
            attended[place, :both] = 1
            scored[place, head:both] = True
        # bfloat16 is several times faster on most processors and changes the mean by some thousandths.
        with torch.autocast(model.device.type, torch.bfloat16):
            logits = model(input_ids=ids, attention_mask=attended, use_cache=False).logits[:, :-1]
        losses = functional.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
        kept = scored[:, 1:]
        for row, value in zip(rows, (-(losses * kept).sum(1) / kept.sum(1)).tolist(), strict=True):
            values[row] = value
    return values
