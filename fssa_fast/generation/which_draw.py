"""What draws the tokens: the native core on the CPU, the definition anywhere."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from fssa_fast._native import load_native
from fssa_fast.backends import BackendError, chosen_backend
from fssa_fast.generation.native_draw import NativeDraw
from fssa_fast.generation.sampling import draw

logger = logging.getLogger("fssa_fast")


def which_draw(device: torch.device) -> Callable[..., Tensor]:
    """What draws on this device: `draw`, or on the CPU the native core's, unless the backend chosen is another.

    Raises BackendError where the backend "cpu" was asked for by name and its native module is not there.
    """
    chosen = chosen_backend()
    if device.type != "cpu" or chosen not in ("auto", "cpu"):
        return draw
    core, reason = load_native()
    if core is not None:
        return NativeDraw(core)
    if chosen == "cpu":
        raise BackendError(f"backend 'cpu' was asked for but cannot draw tokens: {reason}")
    logger.warning("tokens are drawn by the definition in PyTorch (%s)", reason)
    return draw
