"""Whose steps a fused block runs by: the native core's on the CPU, Triton's on a GPU, the definitions anywhere."""

from __future__ import annotations

import logging
from importlib.util import find_spec

import torch

from fssa_fast._native import load_native
from fssa_fast.backends import BackendError, chosen_backend
from fssa_fast.backends.addresses import CODES
from fssa_fast.generation.block_ops import BlockOps
from fssa_fast.generation.native_ops import NativeOps
from fssa_fast.generation.plain_ops import PlainOps

logger = logging.getLogger("fssa_fast")

ATTENTION = ("auto", "flash-attn", "own")


def ops_for(device: torch.device, dtype: torch.dtype, head_width: int, attention: str = "auto") -> BlockOps:
    """The steps by the backend chosen, which then takes this dtype on this device or raises BackendError.

    Left to itself: the native core for the CPU, Triton for a GPU, else the definitions. attention: by flash-attn, which
    runs beside Triton, where "auto" finds it and it takes such heads; by our own kernels; "flash-attn" takes it or
    raises BackendError.
    """
    if attention not in ATTENTION:
        raise ValueError(f"attention: expected one of {', '.join(ATTENTION)}, got {attention!r}")
    chosen = chosen_backend()
    name = chosen if chosen != "auto" else "cpu" if device.type == "cpu" else "triton"
    if attention == "flash-attn" and name != "triton":
        raise BackendError(f"flash-attn was asked for but runs beside the backend 'triton' only, not {name!r}")
    if name == "reference":
        return PlainOps()
    try:
        return _ops_of(name, device, dtype, head_width, attention)
    except (BackendError, ImportError) as reason:
        if chosen != "auto" or attention == "flash-attn":
            asked = attention if attention == "flash-attn" else f"backend {name!r}"
            raise BackendError(f"{asked} was asked for but cannot run the fused form: {reason}") from reason
        logger.warning("the fused form runs by its definitions in PyTorch (%s: %s)", name, reason)
        return PlainOps()


def _ops_of(name: str, device: torch.device, dtype: torch.dtype, head_width: int, attention: str) -> BlockOps:
    if name == "triton":
        from fssa_fast.generation.flash_ops import flash_ops  # needs triton
        from fssa_fast.generation.triton_ops import TritonOps

        own = TritonOps(device, dtype)
        if attention == "flash-attn":
            return flash_ops(device, dtype, head_width, PlainOps())
        if attention == "auto" and find_spec("flash_attn") is not None:
            try:
                return flash_ops(device, dtype, head_width, PlainOps())
            except BackendError as missing:
                logger.warning("attention runs by our own kernels: %s", missing)
        return own
    if name != "cpu":
        raise BackendError("it has no steps of a block")
    core, reason = load_native()
    if device.type != "cpu":
        reason = f"tensors on {device} are not taken"
    elif dtype not in CODES:
        reason = f"dtype {dtype} is not taken"
    if reason is not None:
        raise BackendError(reason)
    return NativeOps(core)
