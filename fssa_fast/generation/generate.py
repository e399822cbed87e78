"""Generation: one user a row, and whatever transformers' `generate` can do; by the fused form where that does it."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from fssa_fast.generation.by_engine import answers, asked, joined
from fssa_fast.generation.prompts import Prompt, prompt_ids, told
from fssa_fast.generation.steered import Steered

Prompts = Sequence[Prompt] | Tensor


def generate(
    policy: Steered,
    prompts: Prompts,
    users: Sequence[str],
    *,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Any:
    """Answers prompts, each for its user, all in one batch.

    Args:
        prompts: texts (told as `policy.chat` says), or chats (lists of {"role", "content"}, put through the
            tokenizer's chat template), in any mix; or token ids [B, T], padded on the left, with `attention_mask`.
        users: a name for each prompt, BASE, or PRIOR.
        options: those of transformers' `generate`: max_new_tokens, do_sample, num_beams, num_return_sequences,
            cache_implementation="static", streamer, ...

    Returns: for texts and chats the answers, a text a prompt, or a list of texts a prompt with
        num_return_sequences > 1. For token ids, what `model.generate` returns.

    A policy that has been fused answers by its fused form where the options are max_new_tokens, do_sample, temperature,
    top_k, top_p, repetition_penalty, num_return_sequences, and token ids that end or fill: greedy answers are the same,
    sampled ones have the same distribution and follow torch's seed, by draws of their own. All else is transformers'.
    Raises: TypeError where prompts or users are one text; ValueError where they are not as many, or a prompt is empty;
        UnknownUser.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts: expected a list of texts or chats, or token ids, got the text {prompts!r:.80}")
    if isinstance(users, str):
        raise TypeError(f"users: expected a list of names, one a prompt, got the text {users!r:.80}")
    if isinstance(prompts, Tensor) and (prompts.dim() != 2 or prompts.is_floating_point() or not prompts.shape[1]):
        raise ValueError(f"prompts: expected token ids [B, T], got {prompts.dtype} {list(prompts.shape)}")
    if len(prompts) != len(users):
        raise ValueError(f"users: expected one for each of the {len(prompts)} prompts, got {len(users)}")
    if len(prompts) == 0:
        raise ValueError("prompts: expected at least one, got none")
    if isinstance(prompts, Tensor):
        inputs = {"input_ids": prompts}
        if attention_mask is not None:
            if attention_mask.shape != prompts.shape:
                raise ValueError(
                    f"attention_mask: expected shape {list(prompts.shape)}, got {list(attention_mask.shape)}"
                )
            inputs["attention_mask"] = attention_mask
    else:
        if attention_mask is not None:
            raise ValueError("attention_mask: expected None, since prompts are texts; got a tensor")
        inputs = tokenize(policy, prompts)
        options.setdefault("pad_token_id", _pad_token(policy.tokenizer))
    call = asked(policy, options)
    rows = None if call is None else call.rows(inputs["input_ids"], inputs.get("attention_mask"))
    if call is not None and rows is not None:
        found = answers(policy, call, rows, users)
        return joined(call, prompts, found) if isinstance(prompts, Tensor) else _texts(policy, found, call.count)
    returned, repeats = _repeats(policy, options)
    with policy.steer([user for user in users for _ in range(repeats)]):
        output = policy.model.generate(**inputs, **options)
    if isinstance(prompts, Tensor):
        return output
    ids = output if isinstance(output, Tensor) else output.sequences
    return _texts(policy, ids[:, inputs["input_ids"].shape[1] :], returned)


def _texts(policy: Steered, ids: Tensor | Sequence[list[int]], count: int) -> list[Any]:
    """Answers as texts: one a prompt, or a list of `count`."""
    texts = policy.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts if count == 1 else [texts[i : i + count] for i in range(0, len(texts), count)]


def stream(policy: Steered, prompt: Prompt, user: str, **options: Any) -> Iterator[str]:
    """Answers one prompt piece by piece, as the pieces come; leaving the loop early ends the generation.

    Args: as for `generate`, for one prompt and one user. Raises: what `generate` raises, at the first piece.
    """
    if policy.tokenizer is None:
        raise ValueError("prompt: expected a policy with a tokenizer; this one was made without")
    call = asked(policy, options)
    if call is not None and call.count == 1:
        inputs = tokenize(policy, [prompt])
        rows = call.rows(inputs["input_ids"], inputs["attention_mask"])
        if rows is not None:
            with call.engine(policy, rows) as engine:
                yield from engine.submit(**call.request(rows[0], user)).text()
            return
    streamer = TextIteratorStreamer(policy.tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop, failures = threading.Event(), []
    criteria = StoppingCriteriaList([*options.pop("stopping_criteria", []), _Stopped(stop)])

    def run() -> None:
        try:
            generate(policy, [prompt], [user], streamer=streamer, stopping_criteria=criteria, **options)
        except BaseException as error:  # handed to the consumer's thread
            failures.append(error)
            streamer.end()

    # In this thread's context: which backend was chosen holds for the worker too.
    worker = threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True)
    worker.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        stop.set()
        worker.join()
    if failures:
        raise failures[0]


class _Stopped(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def tokenize(policy: Steered, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Token ids [B, T] and attention mask of texts and chats, padded on the left, on the policy's device."""
    tokenizer = policy.tokenizer
    if tokenizer is None:
        raise ValueError("prompts: expected token ids, since this policy has no tokenizer; got texts")
    rows = [prompt_ids(tokenizer, told(prompt, policy.chat), f"prompts[{i}]") for i, prompt in enumerate(prompts)]
    width, pad = max(map(len, rows)), _pad_token(tokenizer)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=policy.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=policy.device)
    return {"input_ids": ids, "attention_mask": mask}


def _pad_token(tokenizer: Any) -> int:
    # Any token does: padding is masked. Models trained without a padding token have at least an end.
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)


def _repeats(policy: Steered, options: Mapping[str, Any]) -> tuple[int, int]:
    """How many sequences a prompt come back, and how many batch rows `generate` makes of one."""
    config = options.get("generation_config") or policy.model.generation_config

    def setting(name: str) -> int:
        value = options.get(name)
        return int((getattr(config, name, None) if value is None else value) or 1)

    returned = setting("num_return_sequences")
    return returned, max(returned, setting("num_beams"))
