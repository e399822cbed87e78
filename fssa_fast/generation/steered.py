"""What decoding needs of a policy, and all that it knows of one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from fssa_fast.steering.sites import Layout
from fssa_fast.users.bank import Bank
from fssa_fast.users.users import Users


class Steered(Protocol):
    """A causal LM that users steer, each with a row of the bank."""

    model: Any
    bank: Bank
    layout: Layout
    users: Users
    tokenizer: Any
    chat: bool | None
    fused: Any  # a FusedModel, or None

    @property
    def device(self) -> torch.device:
        """Where the model lies."""

    def serve(self, rows: Tensor | None, slots: Tensor | None) -> AbstractContextManager[None]:
        """The model's forwards in the block serve these rows of a table, of the bank's where None."""

    def steer(self, users: Sequence[str]) -> AbstractContextManager[Tensor]:
        """The model's forwards in the block serve these users, one a row."""
