"""The Triton backend: the kernels of `fssa_fast.kernels`, on NVIDIA and AMD GPUs.

Asked for by name it also takes CPU tensors where TRITON_INTERPRET=1 was set before triton was imported: the kernels then
run in Triton's interpreter, slowly, for tests. There, slots, choices and offsets are checked as by the definitions. On a
GPU their values are not read, since that would wait for it: they are checked where they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
import triton
from torch import Tensor

OLDEST = (3, 6)
if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
    raise ImportError(f"triton: expected version 3.6 or newer, got {triton.__version__}")

from fssa_fast.kernels import configs, context, film, lora  # noqa: E402  (an older triton fails in it, obscurely)
from fssa_fast.kernels.common import INTERPRETED  # noqa: E402
from fssa_fast.ops._common import check_slot_range  # noqa: E402
from fssa_fast.ops.context import check_choices, check_offsets  # noqa: E402

NAME = "triton"
DEVICES = {"cuda"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    """Why no kernel can run here: no GPU, and not interpreting."""
    if torch.cuda.is_available() or INTERPRETED.value:
        return None
    return "no GPU was found, and TRITON_INTERPRET=1 was not set before triton was imported"


def refuses(op: str, tensor: Tensor) -> str | None:
    """Why the op cannot take a call with this first tensor, or None."""
    if tensor.dtype not in DTYPES:
        return f"dtype {tensor.dtype} is not one of {', '.join(str(dtype) for dtype in DTYPES)}"
    if tensor.device.type != "cuda" and not (tensor.device.type == "cpu" and INTERPRETED.value):
        return f"tensors on {tensor.device} are taken only where TRITON_INTERPRET=1 was set before triton was imported"
    if op.startswith("film_norm") and tensor.shape[-1] > configs.WIDEST_NORM:
        return f"a norm over {tensor.shape[-1]} is wider than {configs.WIDEST_NORM}"
    return None
