"""What of transformers' `generate` an engine over the fused form does: answers greedy or sampled, several a prompt."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fssa_fast.backends import chosen_backend
from fssa_fast.generation.engine import Engine
from fssa_fast.generation.fused import FusedModel
from fssa_fast.generation.sampling import Sampling
from fssa_fast.generation.steered import Steered

logger = logging.getLogger("fssa_fast")

OPTIONS = (
    "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_return_sequences",
    "num_beams", "use_cache", "eos_token_id", "pad_token_id",
)  # fmt: skip
NOTHING = ("bos_token_id", "max_length", "transformers_version", "_from_model_config")  # says nothing beside OPTIONS
MAX_ROWS = 256

_told: weakref.WeakSet[FusedModel] = weakref.WeakSet()  # which were said to be stale


class _Other(Exception):
    """Why it is left to transformers."""


@dataclass(frozen=True)
class Asked:
    """A call of `generate`, in the engine's words."""

    fused: FusedModel
    count: int  # answers a prompt
    max_new_tokens: int
    ends: tuple[int, ...]
    pad: int | None
    sampling: Mapping[str, Any]

    def rows(self, ids: Tensor, mask: Tensor | None) -> list[list[int]] | None:
        """The tokens of prompts [B, T] without what fills them up on the left; None where it is not on the left."""
        if mask is None:  # as transformers takes it from the tokens
            seen = torch.ones_like(ids, dtype=torch.bool)
            if self.pad is not None and self.pad not in self.ends:
                seen = ids.ne(self.pad)
        else:
            seen = mask.ne(0)
        if not seen[:, -1].all() or (seen[:, :-1] & ~seen[:, 1:]).any():
            return None
        rows = [row[own].tolist() for row, own in zip(ids, seen, strict=True)]
        fits = max(map(len, rows)) + self.max_new_tokens <= self.fused.max_positions
        return rows if fits and all(0 <= t < self.fused.vocabulary for row in rows for t in row) else None

    def engine(self, policy: Steered, rows: Sequence[Sequence[int]]) -> Engine:
        """An engine with room for answers to these prompts, whose steps are taken by who waits for them."""
        block, together = self.fused.cache_block, min(len(rows) * self.count, MAX_ROWS)
        length = max(map(len, rows)) + self.max_new_tokens
        return Engine(
            policy,
            self.fused,
            max_rows=together,
            max_tokens=together * -(-length // block) * block,
            max_length=length,
            max_waiting=len(rows) * self.count,
            max_waiting_per_user=len(rows) * self.count,
            warm_up=False,  # only what is met
            ends=self.ends,
            background=False,
        )

    def request(self, row: Sequence[int], user: str) -> dict[str, Any]:
        """The arguments of `submit` for one prompt, with a seed from torch's generator, as transformers' draws are."""
        seed = {"seed": int(torch.randint(1 << 62, ()))} if self.sampling["temperature"] else {}
        return {"prompt": row, "user": user, "max_new_tokens": self.max_new_tokens, **self.sampling, **seed}


def asked(policy: Steered, options: Mapping[str, Any]) -> Asked | None:
    """The call, where the policy has a fused form and an engine does the same; None leaves it to transformers."""
    fused = policy.fused
    if fused is None:
        return None
    try:
        return _asked(policy, fused, options)
    except _Other as reason:
        logger.debug("generate runs the attached form: %s", reason)
        return None


def _asked(policy: Steered, fused: FusedModel, options: Mapping[str, Any]) -> Asked:
    if (changed := fused.stale()) is not None:
        if fused not in _told:
            _told.add(fused)
            logger.warning("generate runs the attached form: %s since it was fused; call policy.fuse() again", changed)
        raise _Other("the fused one is stale")
    if chosen_backend() != fused.backend:
        raise _Other(f"backend {chosen_backend()!r} is chosen, and the fused form was made with {fused.backend!r}")
    config = policy.model.generation_config
    settings = {name for name, setting in config.to_diff_dict().items() if setting not in (None, False)}
    others = sorted((set(options) - {*OPTIONS}) | (settings - {*OPTIONS, *NOTHING}))
    if others:
        raise _Other(f"{', '.join(others)}: transformers knows what it means")

    def value(name: str, default: Any) -> Any:
        if name in options:
            return default if options[name] is None and name != "top_k" else options[name]
        found = getattr(config, name, None)
        return default if found is None else found

    count, samples, length = value("num_return_sequences", 1), value("do_sample", False), value("max_new_tokens", None)
    if value("num_beams", 1) != 1 or value("use_cache", True) is not True:
        raise _Other("beams, and answers without a cache, are transformers'")
    if not all(isinstance(n, int) and n > 0 for n in (count, length)) or samples not in (True, False):
        raise _Other("max_new_tokens or num_return_sequences is none that an engine takes")
    if count > 1 and not samples:
        raise _Other("several greedy answers are transformers' to refuse")
    ends = options["eos_token_id"] if "eos_token_id" in options else config.eos_token_id
    ends = () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
    pad = value("pad_token_id", ends[0] if ends else None)
    if not all(isinstance(token, int) for token in (*ends, *(() if pad is None else (pad,)))):
        raise _Other("eos_token_id or pad_token_id is none that an engine takes")
    knobs = {"temperature": 0.0, "repetition_penalty": value("repetition_penalty", 1.0)}
    if samples:
        knobs |= {"temperature": value("temperature", 1.0), "top_p": value("top_p", 1.0)}
        knobs["top_k"] = value("top_k", 50) or 0
        if not knobs["temperature"]:
            raise _Other("a temperature of 0 is transformers' to refuse")
    try:
        Sampling(**knobs)
    except (TypeError, ValueError) as error:
        raise _Other(str(error)) from None
    return Asked(fused, count, length, ends, pad, knobs)


def answers(policy: Steered, call: Asked, rows: Sequence[list[int]], users: Sequence[str]) -> list[list[int]]:
    """The tokens of every answer, as many a prompt as were asked for. Raises what the engine raises; UnknownUser."""
    with call.engine(policy, rows) as engine:
        handles = [
            handle
            for row, user in zip(rows, users, strict=True)
            for handle in engine.submit_many(**call.request(row, user), n=call.count)
        ]
        return [handle.result().tokens for handle in handles]


def joined(call: Asked, ids: Tensor, found: Sequence[list[int]]) -> Tensor:
    """Prompts [B, T] with their answers behind them, filled up on the right, as transformers returns them."""
    longest = max(map(len, found))
    fill = 0 if call.pad is None else call.pad  # without an end all are as long
    behind = torch.tensor([tokens + [fill] * (longest - len(tokens)) for tokens in found], device=ids.device)
    return torch.cat([ids.repeat_interleave(call.count, 0), behind], 1)
