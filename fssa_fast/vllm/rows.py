"""The rows of one worker: a row a request, and the slot of every token of a step.

Everything is allocated once. Rows and slots are written in place, before a step and in the order of its stream, so that
a captured graph reads them where they were when it was captured.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fssa_fast.vllm.latents import decode


class Columns:
    """Gathers the columns that one worker reads, in the order in which it reads them.

    Args: weight [M, H], bias [M]: the policy's modulator, for the columns that are affine in the latent. Columns from M
        on are strengths of plain adapters, 1 for a user of strength 1.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._weight, self._bias = weight, bias
        self._weights: list[Tensor] = []
        self._biases: list[Tensor] = []
        self.width = 0

    def add(self, columns: slice, count: int) -> slice:
        """Takes `count` columns: those of the policy's row, or one strength as often as that."""
        if columns.start >= len(self._bias):
            return self._append(self._weight.new_zeros(count, self._weight.shape[1]), self._bias.new_ones(count))
        return self._append(self._weight[columns], self._bias[columns])

    def add_zeros(self, count: int) -> slice:
        """Takes `count` columns that are 0 for everyone."""
        return self._append(self._weight.new_zeros(count, self._weight.shape[1]), self._bias.new_zeros(count))

    def _append(self, weight: Tensor, bias: Tensor) -> slice:
        self._weights.append(weight)
        self._biases.append(bias)
        self.width += len(bias)
        return slice(self.width - len(bias), self.width)

    def gathered(self) -> tuple[Tensor, Tensor]:
        """The modulator of the worker's columns: weight, bias."""
        if not self._weights:  # a pipeline stage without steering
            return self._weight[:0], self._bias[:0]
        return torch.cat(self._weights), torch.cat(self._biases)


class WorkerRows(nn.Module):
    """Rows [S, M] of a worker's requests; row 0 is the base model's. slots: int32 [T], the row of every token.

    Args:
        weight, bias: the modulator of this worker's columns, float32. requests, tokens: how many a step has at most.
    """

    rows: Tensor
    slots: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        *,
        requests: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        for name, tensor in (
            ("weight", weight.to(device)),
            ("bias", bias.to(device)),
            ("rows", torch.zeros(requests + 1, len(bias), dtype=dtype, device=device)),
            ("slots", torch.zeros(tokens, dtype=torch.int32, device=device)),
        ):
            self.register_buffer(name, tensor, persistent=False)

    @torch.no_grad()
    def fill(self, slot: int, text: str | None) -> None:
        """Writes the row of a request, by itself: its bits do not depend on who is served beside it.

        text: of its steering; None is the base model.
        """
        if text is None:
            self.rows[slot].zero_()
            return
        steering = decode(text, self.weight.shape[1])
        latent = steering.latent.to(self.weight.device, torch.float32, non_blocking=True)
        row = F.linear(latent[None], self.weight, self.bias)[0]
        self.rows[slot] = (steering.strength * row).to(self.rows.dtype)

    @torch.no_grad()
    def point(self, starts: Tensor, requests: Tensor) -> None:
        """Says whose every token is, without a look at the numbers: for runners that keep a batch on the device.

        Args:
            starts: int32 [N + 1], where each request's tokens begin, and where the last one's end.
            requests: [N], the rows of the requests, before row 0 is counted.
        """
        tokens = torch.arange(len(self.slots), dtype=starts.dtype, device=starts.device)
        owner = torch.searchsorted(starts[1:].contiguous(), tokens, right=True, out_int32=True)
        rows = torch.cat([requests.to(torch.int32) + 1, self.slots.new_zeros(1)])  # beyond the last token: the base
        self.slots.copy_(rows.index_select(0, owner))
