"""Whose steps a fused block runs by: the native core's on the CPU, Triton's on a GPU, the definitions anywhere."""

from __future__ import annotations

import logging
from importlib.util import find_spec

import torch

from fssa_fast._native import load_native
from fssa_fast.backends import BackendError, chosen_backend
from fssa_fast.backends.addresses import CODES
from fssa_fast.generation.block_ops import BlockOps
from fssa_fast.generation.graphs import CudaGraphs
from fssa_fast.generation.native_ops import NativeOps
from fssa_fast.generation.plain_ops import PlainOps
from fssa_fast.generation.trial import try_block

logger = logging.getLogger("fssa_fast")

_TRIED: set[tuple[type, torch.device, torch.dtype, int]] = set()
ATTENTION = ("auto", "flash-attn", "own")


def ops_for(device: torch.device, dtype: torch.dtype, head_width: int, attention: str = "auto") -> BlockOps:
    """The steps by the backend chosen, which then takes this dtype on this device or raises BackendError.

    Left to itself: the native core for the CPU, Triton for a GPU, else the definitions. attention: by flash-attn, which
    runs beside Triton, where "auto" finds it and it takes such heads; by our own kernels; "flash-attn" takes it or
    raises BackendError. Triton's steps and flash-attn's are taken after one block of them was as its definition says.
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
        from fssa_fast.generation.flash_ops import FlashOps, load_flash  # needs triton
        from fssa_fast.generation.triton_ops import TritonOps

        if attention == "flash-attn" or (attention == "auto" and find_spec("flash_attn") is not None):
            from fssa_fast.generation.flash_ops import FlashOps, load_flash

            try:
                return _tried(FlashOps(device, dtype, head_width, load_flash()), device, dtype, head_width)
            except BackendError as missing:
                if attention == "flash-attn":
                    raise
                logger.warning("attention runs by our own kernels: %s", missing)
        return _tried(TritonOps(device, dtype), device, dtype, head_width)
    if name != "cpu":
        raise BackendError("it has no steps of a block")
    core, reason = load_native()
    if device.type != "cpu":
        reason = f"tensors on {device} are not taken"
    elif dtype not in CODES:
        reason = f"dtype {dtype} is not taken"
    if core is None or reason is not None:
        raise BackendError(reason)
    return NativeOps(core)


def _tried(ops: BlockOps, device: torch.device, dtype: torch.dtype, head_width: int) -> BlockOps:
    """The steps, after a block of them has been tried: once for each kind of them."""
    key = type(ops), device, dtype, head_width
    if key not in _TRIED:
        captures = device.type == "cuda" and ops.capturable
        try_block(ops, device, dtype, head_width, CudaGraphs(device) if captures else None)
        _TRIED.add(key)
    return ops
