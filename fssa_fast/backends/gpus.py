"""What the GPU backends ask of a machine before they run on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

OLDEST = (8, 0)  # compute capability of NVIDIA's


def newest() -> int:
    """The index of the machine's newest GPU."""
    return max(range(torch.cuda.device_count()), key=torch.cuda.get_device_capability)


def too_old(device: torch.device | int) -> str | None:
    """Why no kernel is compiled for this GPU, or None."""
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST:
        return None
    return "a GPU of compute capability {}.{} or newer is needed, this one has {}.{}".format(*OLDEST, *capability)


def tried(film: Callable[..., Any]) -> str | None:
    """Why the backend that has this op cannot run on the newest GPU, or None, by running it there once.

    Only there a driver older than the toolkit shows, a compiler that is missing or does not take the kernels, a chip
    that nothing was compiled for. Raises torch.OutOfMemoryError where no memory is left.
    """
    if torch.cuda.is_current_stream_capturing():  # a failure would end the capture
        return None
    device = torch.device("cuda", newest())
    try:
        x = torch.zeros(1, 8, device=device)
        film(x, x, x, torch.zeros(1, dtype=torch.int32, device=device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of torch, of triton, of the driver: each has its own
        return f"a trial on {torch.cuda.get_device_name(device)} failed: {type(error).__name__}: {error}"
    return None
