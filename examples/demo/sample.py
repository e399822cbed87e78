"""Samples answers of the base model, in many styles, for pairs to choose from.

``python -m examples.demo.sample samples.jsonl`` writes one JSON object a line::

    {"id", "split", "topic", "wording", "prompt", "length", "form", "voice", "response", "ended", "tokens"}

``length``, ``form`` and ``voice`` say in which style the model was asked to answer (``null``: it was not told). The
instruction stands in the prompt while sampling only: the stored prompt is the bare question, so that the answer looks
as if the model had hit upon the style itself. List answers are also started for the model ("1."), excited ones partly
so ("Great question!"); what starts them is part of the stored response.

Interrupted runs go on where they stopped and give the same answers as uninterrupted ones.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from .base import chat_prompt, load_base
from .criteria import ended
from .prompts import SPLITS, Prompt, Split, prompts

__all__ = ["Job", "jobs", "nucleus", "pack_linears", "read_samples", "sample", "sample_batch"]

LENGTHS, FORMS, VOICES = ("short", "long"), ("prose", "list"), ("neutral", "child", "academic", "fan")
_SHAPES = {
    ("short", "prose"): "Answer in one sentence.",
    ("long", "prose"): "Answer in one paragraph.",
    ("short", "list"): "Make a list with one short line for each point.",
    ("long", "list"): "Give me five points, two sentences each.",
}
_VOICES = {
    "neutral": "",
    "child": " Use simple words for a five-year-old child.",
    "academic": " Use a formal, academic style.",
    "fan": " You are so excited!!!",
}
_EXCLAMATIONS = ("Great question!", "Yes! This is so exciting!", "Wow, what a question!", "Oh, I love this!")
_BULLETS = ("1.", "1.", "-")
_MAX_TOKENS = {None: 192, "long": 192, "short": 96}
_TOPICS_TOGETHER = 8
TEMPERATURE, TOP_P = 0.7, 0.95  # at a temperature of 1, a model this small is not fluent


@dataclass(frozen=True)
class Job:
    """One answer to be sampled; see the module's text for the fields.

    ``opening`` is what the answer starts with, ``max_tokens`` how many tokens the model may add to it.
    """

    id: int
    split: Split
    topic: str
    wording: int
    prompt: str
    length: str | None
    form: str | None
    voice: str | None
    instruction: str
    opening: str
    max_tokens: int


def jobs(rounds: int = 2, seed: int = 0) -> list[Job]:
    """Everything to sample, in an order in which any beginning is of use: some topics whole, of both splits.

    In a round every topic is asked in two wordings, of which one gets two of the voices and the other the other two,
    each in every length and form, and both are asked once without any instruction. Topics of the test split take part
    in the first round only.

    Args:
        rounds: 1 (about 1,500 answers) or 2 (1,000 more, of the training topics in their two other wordings).
        seed: of order, voices, bullets and exclamations.
    """
    if rounds not in (1, 2):
        raise ValueError(f"rounds must be 1 or 2, got {rounds}")
    generator = random.Random(seed)
    found: list[Job] = []
    for number in range(rounds):
        topics: dict[tuple[Split, str], list[Prompt]] = {}
        for split in SPLITS if number == 0 else SPLITS[:1]:
            for prompt in prompts(split):
                topics.setdefault((split, prompt.topic), []).append(prompt)
        order = list(topics)
        generator.shuffle(order)
        for start in range(0, len(order), _TOPICS_TOGETHER):
            block = [
                job
                for split, topic in order[start : start + _TOPICS_TOGETHER]
                for job in _topic_jobs(split, topics[split, topic][2 * number : 2 * number + 2], generator)
            ]
            # Answers of like length share batches.
            block.sort(key=lambda job: job.max_tokens)
            found += block
    return [replace(job, id=place) for place, job in enumerate(found)]


def _topic_jobs(split: Split, asked: Sequence[Prompt], generator: random.Random) -> Iterator[Job]:
    """The answers to two wordings of a topic, not yet numbered."""
    voices = generator.sample(VOICES, len(VOICES))
    for half, prompt in enumerate(asked):
        base = Job(0, split, prompt.topic, prompt.wording, prompt.text, None, None, None, "", "", _MAX_TOKENS[None])
        yield base
        for voice in voices[half::2]:
            for (length, form), shape in _SHAPES.items():
                openings = [generator.choice(_EXCLAMATIONS)] if voice == "fan" else []
                openings += [generator.choice(_BULLETS)] if form == "list" else []
                yield replace(
                    base,
                    length=length,
                    form=form,
                    voice=voice,
                    instruction=shape + _VOICES[voice],
                    opening="\n\n".join(openings),
                    max_tokens=_MAX_TOKENS[length],
                )


def nucleus(
    logits: torch.Tensor, *, temperature: float, top_p: float, generator: torch.Generator, candidates: int = 64
) -> torch.Tensor:
    """Sample a token a row from the smallest set of likeliest tokens that holds ``top_p`` of the probability.

    The set is sought among the ``candidates`` likeliest tokens: sorting the whole vocabulary takes as long as a step.

    Args:
        logits: ``[rows, vocabulary]``.
        temperature: divides the logits.
        top_p: the probability the set holds at least.
        generator: source of randomness.
        candidates: an upper limit of the set's size.
    """
    scaled = logits.float() / temperature
    top, tokens = scaled.topk(candidates, dim=-1)
    probability = (top - scaled.logsumexp(-1, keepdim=True)).exp()
    outside = probability.cumsum(-1) - probability >= top_p
    drawn = torch.multinomial(probability.masked_fill(outside, 0.0), 1, generator=generator)
    return tokens.gather(-1, drawn).squeeze(-1)


def _check_sampling(temperature: float, top_p: float) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")


def pack_linears(model: PreTrainedModel, rows: int) -> None:
    """Give a float32 model's linears oneDNN-packed weights: on a CPU, faster from some eight rows on.

    The packed copies are used by ``forward`` and do not follow later changes of the weights; for inference only.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.bias is None:
            packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), rows)
            module.forward = lambda x, w=packed: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


@torch.inference_mode()
def sample_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Job],
    *,
    temperature: float,
    top_p: float,
    seed: int,
) -> list[dict[str, Any]]:
    """One answer for each job, as the objects that :func:`sample` writes.

    Rows that have ended leave the batch, so that a few long answers do not cost as much as a full batch of them.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = [chat_prompt(tokenizer, f"{job.prompt} {job.instruction}".strip()) + job.opening for job in batch]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    tokens, mask = inputs.input_ids, inputs.attention_mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    answers: list[list[int]] = [[] for _ in batch]
    rows = list(range(len(batch)))
    while rows:
        logits = model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
        ).logits[:, -1]
        drawn = nucleus(logits, temperature=temperature, top_p=top_p, generator=generator)
        going = []
        for place, (row, token) in enumerate(zip(rows, drawn.tolist(), strict=True)):
            if not _done(answers[row], batch[row], tokenizer.eos_token_id):
                answers[row].append(token)
            if not _done(answers[row], batch[row], tokenizer.eos_token_id):
                going.append(place)
        if len(going) <= 0.85 * len(rows):
            kept = torch.tensor(going, dtype=torch.long)
            cache.batch_select_indices(kept)
            rows = [rows[place] for place in going]
            drawn, mask, positions = drawn[kept], mask[kept], positions[kept]
        tokens, positions = drawn[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    found = []
    for job, answer in zip(batch, answers, strict=True):
        record = asdict(job)
        del record["instruction"], record["opening"], record["max_tokens"]
        response = (job.opening + tokenizer.decode(answer, skip_special_tokens=True)).strip()
        found.append(
            {**record, "response": response, "ended": ended(answer, tokenizer.eos_token_id), "tokens": len(answer)}
        )
    return found


def _done(answer: list[int], job: Job, eos_token_id: int) -> bool:
    return len(answer) >= job.max_tokens or answer[-1:] == [eos_token_id]


def read_samples(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The answers in a file written by :func:`sample`; a last line cut off in writing is left out."""
    records = []
    with Path(path).open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                records.append(json.loads(line))
    return records


def sample(
    path: str | os.PathLike[str],
    *,
    rounds: int = 2,
    batch_size: int = 64,
    temperature: float = TEMPERATURE,
    top_p: float = TOP_P,
    seed: int = 0,
    minutes: float | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> list[dict[str, Any]]:
    """Sample all of :func:`jobs` into a JSON lines file, going on with what the file already holds.

    Args:
        path: the file; call again with the same settings to go on with it.
        rounds: how much to sample, see :func:`jobs`.
        batch_size: answers sampled together.
        temperature: divides the logits.
        top_p: mass of the nucleus sampled from.
        seed: of the styles and of the sampling.
        minutes: start no batch after this time; no limit by default.
        cache_dir: where the dequantised model is kept, see :func:`~examples.demo.base.load_base`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    _check_sampling(temperature, top_p)
    path = Path(path)
    todo = jobs(rounds, seed)
    records = read_samples(path) if path.exists() else []
    for place, record in enumerate(records):
        if place >= len(todo) or any(record[name] != getattr(todo[place], name) for name in ("id", "prompt", "voice")):
            raise ValueError(f"path: line {place + 1} of {path} is of other settings; name another file")
    records = records[: len(records) // batch_size * batch_size] if len(records) < len(todo) else records
    _rewrite(path, records)
    if len(records) == len(todo):
        return records
    model, tokenizer = load_base(cache_dir)
    pack_linears(model, batch_size)
    started = time.monotonic()
    with path.open("a", encoding="utf-8") as out, tqdm(total=len(todo), initial=len(records), unit="answer") as bar:
        for start in range(len(records), len(todo), batch_size):
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                break
            batch = todo[start : start + batch_size]
            new = sample_batch(model, tokenizer, batch, temperature=temperature, top_p=top_p, seed=seed + start)
            out.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in new)
            out.flush()
            records += new
            bar.update(len(new))
    return records


def _rewrite(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Leave exactly ``records`` in the file, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".partial")
    scratch.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    scratch.replace(path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Sample the base model's answers in many styles.")
    parser.add_argument("path", help="JSON lines file to write, or to go on with")
    parser.add_argument("--rounds", type=int, default=2, choices=(1, 2), help="1: about 1,500 answers, 2: 2,600")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=TEMPERATURE)
    parser.add_argument("--top-p", type=float, default=TOP_P)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="start no batch after this time")
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--cache-dir", help="where the dequantised model is kept")
    options = vars(parser.parse_args())
    threads = options.pop("threads")
    if threads is not None:
        torch.set_num_threads(threads)
    sample(options.pop("path"), **options)


if __name__ == "__main__":
    main()
