"""What the ops take: the kinds of an encoder, its weights as one group, and the checks of arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INNER = ("linear", "mlp")
POOLING = ("self-attention", "mean", "sum")


class ContextWeights(NamedTuple):
    """The weights of a context encoder, as torch's Linear and MultiheadAttention hold them; None where not used."""

    inner0: Tensor  # [H, 2E]
    inner0_bias: Tensor  # [H]
    inner1: Tensor | None  # [H, H], inner "mlp"
    inner1_bias: Tensor | None  # [H]
    qkv: Tensor | None  # [3H, H], pooling "self-attention"
    qkv_bias: Tensor | None  # [3H]
    out: Tensor | None  # [H, H]
    out_bias: Tensor | None  # [H]
    outer0: Tensor  # [H, H]
    outer0_bias: Tensor  # [H]
    outer1: Tensor  # [Z, H]: Z = H, or 2H where latents are sampled
    outer1_bias: Tensor  # [Z]


def check_tensor(name: str, tensor: Tensor, shape: Sequence[int | None], like: Tensor | None = None) -> None:
    """Raises ValueError or TypeError unless `tensor` has `shape` (None: any size) and `like`'s dtype and device."""
    sizes = tensor.shape
    if sizes != shape:  # the common case is decided by one comparison
        if len(sizes) != len(shape) or any(w is not None and w != s for w, s in zip(shape, sizes, strict=True)):
            want = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
            raise ValueError(f"{name}: expected shape {want}, got {list(sizes)}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: expected a tensor with strides, got layout {tensor.layout}")
    if like is None:
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: expected a dtype of {[str(d) for d in DTYPES]}, got {tensor.dtype}")
        return
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name}: expected dtype {like.dtype}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {tensor.device}")


def check_written(name: str, tensor: Tensor) -> None:
    """Raises ValueError where two elements of a tensor that is written to may share their memory."""
    if tensor.is_contiguous():
        return
    reach = 0  # of the dimensions with smaller strides: the distance of their last element from their first
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(f"{name}: expected elements that share no memory, got strides {list(tensor.stride())}")
        reach += stride * (size - 1)


def check_integers(name: str, tensor: Tensor, shapes: Sequence[Sequence[int]], device: torch.device) -> None:
    """Raises ValueError or TypeError unless `tensor` is int32 or int64, of one of the shapes, on the device."""
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected dtype torch.int32 or torch.int64, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")
    if tensor.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name}: expected shape {wanted}, got {list(tensor.shape)}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: expected a tensor with strides, got layout {tensor.layout}")


def check_slots(slots: Tensor, x: Tensor) -> None:
    """`slots` is int32 or int64, on x's device, one a row of x (x.shape[0]) or one a token (x.shape[:-1])."""
    check_integers("slots", slots, (x.shape[:1], x.shape[:-1]), x.device)


def check_slot_range(slots: Tensor, count: int) -> None:
    """Raises IndexError unless every slot is in [0, count). Reads the values: for the definitions and for tests."""
    if slots.numel() and (int(slots.min()) < 0 or int(slots.max()) >= count):
        bad = slots[(slots < 0) | (slots >= count)][0]
        raise IndexError(f"slots: expected values in [0, {count}), got {int(bad)}")


def check_choices(choices: Tensor) -> None:
    """Raises ValueError unless every choice is 0 or 1."""
    if bool(((choices != 0) & (choices != 1)).any()):
        raise ValueError(f"choices: expected 0 or 1, got {int(choices[(choices != 0) & (choices != 1)][0])}")


def check_offsets(offsets: Sequence[int], count: int) -> None:
    """Raises ValueError unless the offsets begin at 0, never fall, and end at count."""
    if offsets[0] != 0 or offsets[-1] != count or any(a > b for a, b in zip(offsets[:-1], offsets[1:], strict=True)):
        raise ValueError(f"offsets: expected to rise from 0 to the {count} pairs, got {list(offsets)[:8]}...")


def check_count(name: str, value: int) -> None:
    """Raises TypeError or ValueError unless `value` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {value}")
