"""`draw` by the native core, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fssa_fast._native import Core
from fssa_fast.arguments import check_tensor
from fssa_fast.backends.addresses import CODES, at, rows_of, slots_of
from fssa_fast.generation.sampling import Knobs, draw

MAX_VOCABULARY = 1 << 19  # whose weights, all together, float64 still holds exactly


class NativeDraw:
    """Draws as `sampling.draw` does, each row in a few passes of its own, the rows shared out over torch's threads.

    The exponential is the core's, within 2 units in the last place: a weight may differ from the definition's by as
    little, and a token where the random number falls between the two.
    """

    def __init__(self, core: Core) -> None:
        self._core = core

    def __call__(self, logits: Tensor, knobs: Knobs, rows: Tensor, positions: Tensor, filtered: bool = True) -> Tensor:
        """As `sampling.draw`; `filtered` is seen from the knobs.

        Logits of another dtype, or of more than 2^19 tokens, the definition draws from.
        Raises: TypeError, ValueError for another dtype, shape or device; IndexError for a row that has no knobs.
        """
        check_tensor("logits", logits, (None, None))
        count, width = logits.shape
        check_tensor("rows", rows, (count,), knobs.top_k)  # int32, and where the knobs are
        check_tensor("positions", positions, (count,), knobs.top_k)
        if not (logits.is_cpu and knobs.seed.is_cpu):
            raise ValueError(f"logits, knobs: expected the CPU, got {logits.device}, {knobs.seed.device}")
        if logits.dtype not in CODES or not 1 <= width <= MAX_VOCABULARY:
            return draw(logits, knobs, rows, positions, filtered)
        logits, rows, positions = rows_of(logits), rows.contiguous(), positions.contiguous()
        tokens = torch.empty(count, dtype=torch.int64)
        values = (knobs.temperature, knobs.min_p, knobs.top_k, knobs.top_p, knobs.seed)
        self._core.run(
            "sample", CODES[logits.dtype], count, width, at(logits), slots_of(rows, count, knobs.seed.shape[0]),
            *(value.data_ptr() for value in values), positions.data_ptr(), tokens.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return tokens
