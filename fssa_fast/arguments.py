"""What the three ops share: the library they are registered in, and the checks of their arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

library = torch.library.Library("fssa", "DEF")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, tensor: Tensor, shape: Sequence[int | None], like: Tensor | None = None) -> None:
    """Raises ValueError or TypeError unless `tensor` has `shape` (None: any size) and `like`'s dtype and device."""
    sizes = tuple(tensor.shape)
    if len(sizes) != len(shape) or any(w is not None and w != s for w, s in zip(shape, sizes, strict=True)):
        want = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
        raise ValueError(f"{name}: expected shape {want}, got {list(sizes)}")
    if like is None:
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: expected a dtype of {[str(d) for d in DTYPES]}, got {tensor.dtype}")
        return
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name}: expected dtype {like.dtype}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {tensor.device}")


def check_slots(slots: Tensor, x: Tensor) -> None:
    """`slots` is int32 or int64, on x's device, one a row of x (x.shape[0]) or one a token (x.shape[:-1])."""
    if slots.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"slots: expected dtype torch.int32 or torch.int64, got {slots.dtype}")
    if slots.device != x.device:
        raise ValueError(f"slots: expected device {x.device}, got {slots.device}")
    if slots.shape != x.shape[:1] and slots.shape != x.shape[:-1]:
        raise ValueError(f"slots: expected shape {list(x.shape[:1])} or {list(x.shape[:-1])}, got {list(slots.shape)}")


def check_slot_range(slots: Tensor, count: int) -> None:
    """Raises IndexError unless every slot is in [0, count). Reads the values: for the definitions and for tests."""
    if slots.numel() and (int(slots.min()) < 0 or int(slots.max()) >= count):
        bad = slots[(slots < 0) | (slots >= count)][0]
        raise IndexError(f"slots: expected values in [0, {count}), got {int(bad)}")


def gather_rows(table: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    """The rows `table[slots]`, shaped to broadcast against x [..., width]: one a row or one a token of x."""
    rows = table[slots.long()]
    return rows if slots.dim() == x.dim() - 1 else rows.view(rows.shape[0], *[1] * (x.dim() - 2), rows.shape[-1])


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record a call with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
