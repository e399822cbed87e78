"""What a fused block computes, step by step: the interface that `native_ops`, `triton_ops`, `flash_ops` and
`plain_ops`, the definitions, implement; `which_ops` says whose steps run.

Every method prepares one step on tensors that stay where they are, and returns it as a function without arguments, so
that a decode step is a list of calls. Results are written into the tensors given. In the native steps the bits of a row
do not depend on the other rows, nor on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fssa_fast.generation.cache import BlockCache

Step = Callable[[], None]

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class Packed:
    """A weight [O, I] as the steps of one kind of machine like it."""

    data: Tensor
    outputs: int
    width: int


@dataclass(frozen=True)
class Expansion:
    """The second half of an adapter: y [n, O] += (gamma[slot] * hidden [n, R] + beta[slot]) B, scaling within B."""

    hidden: Tensor
    gamma: Tensor
    beta: Tensor | None
    b: Packed
    y: Tensor


@dataclass(frozen=True)
class AttentionSettings:
    """What attention in one block needs to know beside its inputs; cos and sin are float32 [positions, head_width]."""

    heads: int
    kv_heads: int
    head_width: int
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    cos: Tensor
    sin: Tensor
    scale: float
    softcap: float
    window: int


@dataclass(frozen=True)
class FilmNorm:
    """The arguments of the op `film_norm`, rows [n, D], and where its results go: hidden may be residual, normed x."""

    x: Tensor
    residual: Tensor
    scale: Tensor
    shift: Tensor
    slots: Tensor
    weight: Tensor
    eps: float
    hidden: Tensor
    normed: Tensor


@dataclass(frozen=True)
class AttentionInputs:
    """Of n tokens: q [n, heads * head_width], k and v [n, kv_heads * head_width], their positions and sequences [n]."""

    q: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor
    sequences: Tensor


class BlockOps(Protocol):
    """The steps of a fused block. n tokens; `slots`, `positions`, `sequences` are int32 [n]."""

    capturable: bool  # whether steps on a GPU can be captured in a graph: nothing waits for it or reads from it
    cache_block: int  # positions of a block of the cache

    def pack(self, weight: Tensor) -> Packed:
        """A weight [O, I], copied into the form that `linear` and `adapt` take."""

    def linear(self, x: Tensor, weight: Packed, bias: Tensor | None, y: Tensor) -> Step:
        """y [n, O] = x [n, I] W^T + bias"""

    def adapt(self, parts: Sequence[Expansion], slots: Tensor) -> Step:
        """Adds adapters to their projections' outputs, in the order given."""

    def gate(self, activation: str, gate: Tensor, up: Tensor, y: Tensor) -> Step:
        """y = activation(gate) * up, all [n, F]"""

    def film_norm(self, given: FilmNorm) -> Step:
        """The op `film_norm`."""

    def attention(
        self, settings: AttentionSettings, given: AttentionInputs, cache: BlockCache, layer: int, out: Tensor
    ) -> Step:
        """Norms of queries and keys, rotary positions, the write into the cache, attention up to each token itself.

        out: [n, heads * head_width]
        """
