"""The Triton backend: the kernels of `fssa_fast.kernels`, on NVIDIA and AMD GPUs.

Asked for by name it also takes CPU tensors where TRITON_INTERPRET=1 was set before triton was imported: the kernels
then run in Triton's interpreter, slowly, for tests. There, slots, choices and offsets are checked as by the
definitions. On a GPU their values are not read, since that would wait for it: they are checked where they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from fssa_fast.arguments import check_choices, check_offsets, check_slot_range
from fssa_fast.backends import BackendError, gpus

try:
    import triton
except ImportError as error:
    raise ImportError(
        f"triton could not be imported ({error}); torch's builds for GPUs bring it, or `pip install triton` does"
    ) from error

OLDEST, NEWEST = "3.6", "3.9"  # that the kernels were tested with
if tuple(map(int, triton.__version__.split(".")[:2])) < tuple(map(int, OLDEST.split("."))):
    raise ImportError(f"triton: expected version {OLDEST} or newer, got {triton.__version__}")
try:
    from fssa_fast.kernels import configs, context, context_backward, film, lora
    from fssa_fast.kernels.common import INTERPRETED
except Exception as error:  # what a later release no longer has shows as anything
    raise ImportError(
        f"triton {triton.__version__} does not take the kernels, which were tested with {OLDEST} to {NEWEST}: {error!r}"
    ) from error

NAME = "triton"
DEVICES = {"cuda"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    """Why no kernel can run here, or None: not interpreting and no GPU, GPUs too old, or a trial that fails."""
    if INTERPRETED.value:
        return None
    if not torch.cuda.is_available():
        return "no GPU was found, and TRITON_INTERPRET=1 was not set before triton was imported"
    reason = gpus.too_old(gpus.newest())
    if reason is not None:
        return reason
    failure = gpus.tried(IMPLEMENTATIONS["film"])
    return failure and f"{failure} (triton {triton.__version__}; tested with {OLDEST} to {NEWEST})"


def refuses(op: str, tensor: Tensor) -> str | None:
    """Why the op cannot take a call with this first tensor, or None."""
    if tensor.dtype not in DTYPES:
        return f"dtype {tensor.dtype} is not one of {', '.join(str(dtype) for dtype in DTYPES)}"
    if tensor.device.type != "cuda" and not (tensor.device.type == "cpu" and INTERPRETED.value):
        return f"tensors on {tensor.device} are taken only where TRITON_INTERPRET=1 was set before triton was imported"
    if op.startswith("film_norm") and tensor.shape[-1] > configs.WIDEST_NORM:
        return f"a norm over {tensor.shape[-1]} is wider than {configs.WIDEST_NORM}"
    return gpus.too_old(tensor.device) if tensor.device.type == "cuda" else None


def prefers(op: str, args: Sequence[Any]) -> bool:
    """False for what `refuses` cannot see: pairs of a dtype other than the bank's that no kernel takes."""
    return op != "context_rows_" or args[2].dtype in DTYPES


def _check_pairs(pairs: Tensor, choices: Tensor, offsets: Tensor) -> None:
    if pairs.dtype not in DTYPES:
        raise BackendError(f"backend 'triton' cannot take pairs of dtype {pairs.dtype}")
    if choices.device.type == "cpu":
        check_choices(choices)
    if offsets.device.type == "cpu":
        check_offsets(offsets.tolist(), pairs.shape[0])


def _launching(run: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    """The kernels' function, on the device of its tensors; `check` reads values, and only where that is free."""

    @wraps(run)
    def call(*args: Any) -> Any:
        tensor = args[0] if isinstance(args[0], Tensor) else args[0][0]
        check(*args)
        if tensor.device.type == "cpu":
            return run(*args)
        with torch.cuda.device(tensor.device):
            return run(*args)

    return call


def _slots_at(slots: int, table: int) -> Callable[..., None]:
    """Checks the argument at `slots` against the rows of the one at `table`, on the CPU."""

    def check(*args: Any) -> None:
        if args[slots].device.type == "cpu":
            check_slot_range(args[slots], args[table].shape[0])

    return check


def _check_rows(bank: Tensor, slots: Tensor, pairs: Tensor, choices: Tensor, offsets: Tensor, *_: Any) -> None:
    _check_pairs(pairs, choices, offsets)
    if slots.device.type == "cpu":
        check_slot_range(slots, bank.shape[0])


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "film": _launching(film.film, _slots_at(3, 1)),
    "film_norm": _launching(film.film_norm, _slots_at(4, 2)),
    "film_backward": _launching(film.film_backward, _slots_at(4, 2)),
    "film_norm_backward": _launching(film.film_norm_backward, _slots_at(6, 4)),
    "lora": _launching(lora.lora, _slots_at(6, 4)),
    "lora_": _launching(lora.lora_, _slots_at(6, 4)),
    "lora_backward": _launching(lora.lora_backward, _slots_at(6, 4)),
    "context": _launching(context.context, lambda pairs, choices, offsets, *_: _check_pairs(pairs, choices, offsets)),
    "context_rows_": _launching(context.context_rows_, _check_rows),
    "context_backward": _launching(context_backward.context_backward, lambda grad, *args: _check_pairs(*args[:3])),
}
