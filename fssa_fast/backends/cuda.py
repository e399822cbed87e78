"""The native CUDA backend: the kernels of csrc/cuda, called by address; forward only, for the latency of decoding.

It is asked for by name (FSSA_BACKEND=cuda): it is chosen automatically only where a committed measurement shows that it
wins, and there is none yet. The values of slots, choices and offsets are not read, since that would wait for the GPU:
they are checked where they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fssa_fast._native import FOLDER, Cuda
from fssa_fast.backends import gpus
from fssa_fast.backends.addresses import CODES
from fssa_fast.backends.native_ops import ForwardOps

NAME = "cuda"
DEVICES: set[str] = set()  # of no device by itself, see above

_core: Cuda | None = None
_reason: str | None = None
try:
    _core = Cuda(FOLDER / "_cuda.so")
except (OSError, ImportError) as error:
    _reason = (
        f"fssa_fast/_cuda.so could not be loaded ({error}); `pip install --no-build-isolation .` in a checkout builds "
        "it where torch has CUDA and nvcc is on the PATH"
    )


def unavailable() -> str | None:
    """Why no kernel can run here, or None: torch without CUDA, no GPU, GPUs too old, no module, or one that fails."""
    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    if not torch.cuda.is_available():
        return "no GPU was found"
    return gpus.too_old(gpus.newest()) or _reason or gpus.tried(film)


def refuses(op: str, tensor: Tensor) -> str | None:
    """Why the op cannot take a call with this first tensor, or None."""
    if op not in IMPLEMENTATIONS:
        return "there is no CUDA kernel for it"
    if tensor.dtype not in CODES:
        return f"dtype {tensor.dtype} is not one of {', '.join(str(dtype) for dtype in CODES)}"
    if tensor.device.type != "cuda":
        return f"tensors on {tensor.device} are not taken"
    return gpus.too_old(tensor.device)


def prefers(op: str, args: Sequence[Any]) -> bool:
    """False: no measurement shows yet where these kernels win."""
    return False


@contextmanager
def _stream_of(tensor: Tensor) -> Iterator[int]:
    """Makes the tensor's device the current one; its current stream, as a number."""
    with torch.cuda.device(tensor.device):
        yield torch.cuda.current_stream().cuda_stream


def _workspace(tensor: Tensor) -> Callable[[int], int]:
    """Gives memory on the tensor's device, which lives until the launches that use it are on the stream."""
    kept: list[Tensor] = []

    def take(size: int) -> int:
        kept.append(torch.empty(size, dtype=torch.uint8, device=tensor.device))
        return kept[-1].data_ptr()

    return take


def _launch(op: str, tensor: Tensor, *members: Any) -> None:
    assert _core is not None  # or else the backend is unavailable
    with _stream_of(tensor) as stream:
        _core.run(op, stream, _workspace(tensor), *members)


def _one_thread() -> int:
    return 1  # the interface asks for a number, which is not used here


_forward = ForwardOps(NAME, _launch, _one_thread)
film, film_norm, lora, lora_ = _forward.film, _forward.film_norm, _forward.lora, _forward.lora_
context, context_rows_ = _forward.context, _forward.context_rows_

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = _forward.implementations()
