"""Both answers of a pair in one row, behind the prompt that they share: the prompt is computed once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Models whose blocks mix tokens by attention alone, and read positions and a mask of pairs of tokens as they are given.
MODELS = {"gemma2", "gemma3_text", "gpt2", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"}
SAVES = 7 / 8  # shared from this share of the tokens down: attention, which is masked then, takes longer


@dataclass(frozen=True)
class SharedRows:
    """P rows of T tokens: a prompt, its first answer, its second answer, which does not see the first.

    input_ids, position_ids: [P, T]. attention_mask: [P, 1, T, T], added to the scores. columns: [2P, L], where each
    token of the 2P rows of L tokens is that were put together.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    columns: Tensor

    def apart(self, hidden: Tensor) -> Tensor:
        """What the 2P rows would have had [2P, L, D], from [P, T, D]. At padding: anything."""
        index = self.columns.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return hidden.repeat_interleave(2, 0).gather(1, index)


def can_share(model: Any, length: int) -> bool:
    """Whether a model computes in shared rows what it does in rows of `length` tokens."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return (
        config.model_type in MODELS
        and config._attn_implementation in ("eager", "sdpa")
        and (window is None or length <= window)
    )


def share_prompts(input_ids: Tensor, start: Tensor, end: Tensor, dtype: torch.dtype) -> SharedRows | None:
    """Puts rows 2i and 2i + 1 together, which are a prompt and an answer each; None where that saves too little.

    Args:
        input_ids: [2P, L]. start, end: [2P], of the answers. dtype: of the mask.
    """
    length = input_ids.shape[1]
    first, second = slice(0, None, 2), slice(1, None, 2)
    if len(input_ids) % 2 or not torch.equal(start[first], start[second]):
        return None
    column = torch.arange(length, device=input_ids.device)
    prompt = column < start[first].unsqueeze(1)
    if not torch.equal(input_ids[first].where(prompt, 0), input_ids[second].where(prompt, 0)):
        return None
    begin, middle, stop = start[first, None], end[first, None], (end[first] + end[second] - start[second])[:, None]
    total = int(stop.max())
    if total > SAVES * 2 * length:
        return None
    at = torch.arange(total, device=input_ids.device).expand(len(begin), -1)
    in_second = at >= middle
    position = torch.where(in_second, at - middle + begin, at).clamp(max=length - 1)
    ids = torch.where(in_second, input_ids[second].gather(1, position), input_ids[first].gather(1, position))
    query, key = at.unsqueeze(2), at.unsqueeze(1)
    hidden_from = in_second.unsqueeze(2) & (key >= begin.unsqueeze(2)) & (key < middle.unsqueeze(2))
    seen = (key <= query) & ~hidden_from
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
    own = column.expand(len(begin), -1)
    columns = torch.stack([own, torch.where(own >= begin, own - begin + middle, own)], 1).flatten(0, 1)
    return SharedRows(ids, position, mask.unsqueeze(1), columns.clamp(max=total - 1))
