"""The modulator: from a user's latent to the user's row of the bank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fssa_fast.arguments import check_count, check_tensor


class Modulator(nn.Linear):
    """The affine map from latents [U, H] to rows of the bank [U, M], all modulations of all sites at once.

    Args:
        latent_width: H. width: M.
        init: the bias at the start, [M]; None means zeros. It is the row of a latent of zeros, and with std 0 of every
            latent: 0 for FiLM's scale and shift, 1 for LoRA's gamma.
        std: standard deviation of the weights at the start, a number or one a column, [M]; 0 leaves them zero.

    Raises: ValueError, TypeError naming the argument.
    """

    def __init__(self, latent_width: int, width: int, *, init: Tensor | None = None, std: float | Tensor = 0.0) -> None:
        check_count("latent_width", latent_width)
        if width:  # a policy whose adapters are all plain modulates nothing
            check_count("width", width)
        super().__init__(latent_width, width)
        spread = torch.as_tensor(std, dtype=self.weight.dtype, device=self.weight.device)
        check_tensor("std", spread, (width,) if spread.dim() else ())
        if not spread.is_meta and not bool((spread >= 0).all()):
            raise ValueError(f"std: expected numbers >= 0, got {spread.min().item()}")
        with torch.no_grad():
            nn.init.normal_(self.weight).mul_(spread.expand(width).unsqueeze(-1))
            if init is None:
                self.bias.zero_()
            else:
                check_tensor("init", init, (width,))
                self.bias.copy_(init)
