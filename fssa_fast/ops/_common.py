"""What the three ops share: the library they are registered in, rows by slot, and whether autograd records."""

from __future__ import annotations

import torch
from torch import Tensor

library = torch.library.Library("fssa", "DEF")


def gather_rows(table: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    """The rows `table[slots]`, shaped to broadcast against x [..., width]: one a row or one a token of x."""
    rows = table[slots.long()]
    return rows if slots.dim() == x.dim() - 1 else rows.view(rows.shape[0], *[1] * (x.dim() - 2), rows.shape[-1])


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record a call with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
