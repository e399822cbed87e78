"""The one rule of accuracy: an error at most twice that of PyTorch's own evaluation of the definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def doubled(value: Any) -> Any:
    """The same arguments with every floating-point tensor in float64, at any depth of lists and tuples."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return [doubled(v) for v in value] if isinstance(value, (list, tuple)) else value


def flat(value: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value if v is not None for t in flat(v)]


def check_parity(got: Any, definition: Callable[..., Any], args: Sequence[Any]) -> None:
    """Asserts that `got`, computed from args, has at most twice the error of the definition evaluated in args' dtype.

    The error is the largest distance from the definition in float64, an output tensor at a time; two roundings of the
    tensor's largest element are granted on top, for where PyTorch happens to be exact.
    """
    exact, plain = flat(definition(*doubled(args))), flat(definition(*args))
    results = flat(got)
    assert len(results) == len(exact) == len(plain)
    for index, (mine, theirs, truth) in enumerate(zip(results, plain, exact, strict=True)):
        assert mine.shape == truth.shape and mine.dtype == theirs.dtype, f"output {index}"
        if not truth.numel():
            continue
        error = (mine.double() - truth).abs().max().item()
        bound = 2 * (theirs.double() - truth).abs().max().item()
        bound += 2 * torch.finfo(mine.dtype).eps * truth.abs().max().item()
        assert error <= bound, f"output {index}: error {error:.3g}, allowed {bound:.3g}"
