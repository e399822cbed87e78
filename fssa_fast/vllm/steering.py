"""Steering a model of vLLM: child modules named `fssa` on its blocks and linears, and what reads them in a forward."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fssa_fast.ops import lora_
from fssa_fast.vllm.rows import WorkerRows


class FilmChild(nn.Module):
    """What hangs on a block: its columns of the rows, scale first, then shift."""

    def __init__(self, rows: WorkerRows, columns: slice) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns


def film_stream(block: nn.Module, args: Any, output: Any) -> Any:
    """FiLM on a block's output: a forward hook.

    The blocks of vLLM return what they add and the stream it is to be added to; the next norm adds them. Only the
    stream is changed, by what FiLM changes of their sum, so that a base row keeps its bits whichever norm follows. In
    plain PyTorch, since a compiler then joins it with that norm, which an op of its own would prevent.
    """
    child: FilmChild = block.fssa  # type: ignore[assignment]
    added, stream = output if isinstance(output, tuple) else (None, output)
    hidden = stream if added is None else added + stream
    slots = child.rows.slots[: hidden.shape[0]]
    scale, shift = child.rows.rows[:, child.columns].index_select(0, slots).chunk(2, -1)
    stream = stream + torch.addcmul(shift, hidden, scale)
    return stream if added is None else (added, stream)


def steer_block(block: nn.Module, rows: WorkerRows, columns: slice) -> None:
    """Hangs FiLM on a block."""
    block.add_module("fssa", FilmChild(rows, columns))
    block.register_forward_hook(film_stream)


class LoraChild(nn.Module):
    """What hangs on a linear: all adapters of its projections as one, scaled. a: [R, D], b: [R, O], of this worker.

    gamma, beta: their columns of the rows; beta None where no adapter has one, or another worker adds it.
    """

    a: Tensor
    b: Tensor

    def __init__(self, rows: WorkerRows, a: Tensor, b: Tensor, gamma: slice, beta: slice | None) -> None:
        super().__init__()
        self.rows, self.gamma, self.beta = rows, gamma, beta
        self.register_buffer("a", a, persistent=False)
        self.register_buffer("b", b, persistent=False)

    def add_to(self, output: Tensor, x: Tensor) -> None:
        """Adds what the adapters make of the inputs [T, D] to the linear's outputs [T, O]."""
        rows = self.rows.rows
        beta = None if self.beta is None else rows[:, self.beta]
        slots = self.rows.slots[: x.shape[0]]
        lora_(x, [output], a=self.a, bs=[self.b], gamma=rows[:, self.gamma], beta=beta, slots=slots, scaling=1.0)


def steer_linear(linear: Any, child: LoraChild) -> None:
    """Hangs adapters on a linear, before anything is summed or gathered over workers.

    Its quantisation method becomes one of a class that is made here from the method's own, so that what vLLM asks of
    it, its type among others, has the answers it had.
    """
    linear.add_module("fssa", child)
    linear.requires_unquantized_input = True  # what is before it must not hand it quantised numbers
    theirs = type(linear.quant_method)

    def apply(self: Any, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        output = theirs.apply(self, layer, x, bias)
        layer.fssa.add_to(output, x)
        return output

    method: Any = object.__new__(type(f"Steered{theirs.__name__}", (theirs,), {"apply": apply}))
    method.__dict__.update(copy.copy(linear.quant_method.__dict__))
    linear.quant_method = method
