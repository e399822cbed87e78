"""What the three ops share: their library, rows by slot, whether autograd records, and dtypes under autocast."""

from __future__ import annotations

from functools import reduce
from typing import Any

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


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast runs matrix products on x's device; None outside autocast, and for float64."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def cast(dtype: torch.dtype, *tensors: Any) -> Any:
    """The tensors in this dtype; None stays None."""
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def cast_to_widest(*tensors: Tensor) -> Any:
    """The tensors in the dtype to which they promote together."""
    return cast(reduce(torch.promote_types, (t.dtype for t in tensors)), *tensors)
