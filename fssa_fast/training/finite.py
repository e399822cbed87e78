"""A trainer that stops at the first step whose loss is no number, and says which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class NamesNaN(_Base):
    """For trainers: raises FloatingPointError at a loss of NaN or infinity, before any weight has changed by it."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"loss: expected a finite number, got {float(loss)} at step {self.state.global_step + 1}; the weights "
                "are those of the step before, and checkpoints are kept"
            )
        return loss
