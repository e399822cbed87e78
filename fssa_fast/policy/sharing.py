"""Several policies on one base model: each has modules of its own, and all of them the same parameters."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def share_parameters(model: Model) -> Model:
    """A model that is another object with the same parameters and buffers; it takes no memory but for its modules.

    For a base model that nothing is attached to: a policy attaches to each copy, and steers that one alone. What
    changes the parameters in place changes them for all.
    """
    if any(name.endswith(".fssa") for name, _ in model.named_modules()):
        raise ValueError("model: expected a base model without steering, got one that a policy is attached to")
    kept = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in kept})
