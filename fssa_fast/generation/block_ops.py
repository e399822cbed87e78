"""What a fused block computes, step by step: by the native core on the CPU, by Triton's kernels on a GPU (see
`triton_ops`), and by the definitions in PyTorch anywhere.

Every method prepares one step on tensors that stay where they are, and returns it as a function without arguments, so
that a decode step is a list of calls. Results are written into the tensors given. In the native steps the bits of a row
do not depend on the other rows, nor on how many there are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from fssa_fast._native import load_native
from fssa_fast.backends import BackendError, chosen_backend
from fssa_fast.backends.addresses import CODES, at, slots_of
from fssa_fast.generation.cache import BLOCK, BlockCache
from fssa_fast.ops.film import film_norm_reference

logger = logging.getLogger("fssa_fast")

Step = Callable[[], None]

PANEL = 32  # outputs that lie side by side in a packed weight

ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1}


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

    def film_norm(
        self,
        x: Tensor,
        residual: Tensor,
        scale: Tensor,
        shift: Tensor,
        slots: Tensor,
        weight: Tensor,
        eps: float,
        hidden: Tensor,
        normed: Tensor,
    ) -> Step:
        """The op `film_norm`; hidden may be residual, and normed x."""

    def attention(
        self,
        settings: AttentionSettings,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        sequences: Tensor,
        cache: BlockCache,
        layer: int,
        out: Tensor,
    ) -> Step:
        """Norms of queries and keys, rotary positions, the write into the cache, attention up to each token itself."""


ATTENTION = ("auto", "flash-attn", "own")


def ops_for(device: torch.device, dtype: torch.dtype, head_width: int, attention: str = "auto") -> BlockOps:
    """The steps by the backend chosen, which then takes this dtype on this device or raises BackendError.

    Left to itself: the native core for the CPU, Triton for a GPU, else the definitions. attention: by flash-attn, which
    runs beside Triton, where "auto" finds it and it takes such heads; by our own kernels; "flash-attn" takes it or
    raises BackendError.
    """
    if attention not in ATTENTION:
        raise ValueError(f"attention: expected one of {', '.join(ATTENTION)}, got {attention!r}")
    chosen = chosen_backend()
    name = chosen if chosen != "auto" else "cpu" if device.type == "cpu" else "triton"
    if attention == "flash-attn" and name != "triton":
        raise BackendError(f"flash-attn was asked for but runs beside the backend 'triton' only, not {name!r}")
    if name == "reference":
        return PlainOps()
    try:
        return _ops_of(name, device, dtype, head_width, attention)
    except (BackendError, ImportError) as reason:
        if chosen != "auto" or attention == "flash-attn":
            asked = attention if attention == "flash-attn" else f"backend {name!r}"
            raise BackendError(f"{asked} was asked for but cannot run the fused form: {reason}") from reason
        logger.warning("the fused form runs by its definitions in PyTorch (%s: %s)", name, reason)
        return PlainOps()


def _ops_of(name: str, device: torch.device, dtype: torch.dtype, head_width: int, attention: str) -> BlockOps:
    if name == "triton":
        from fssa_fast.generation.flash_ops import flash_ops  # needs triton
        from fssa_fast.generation.triton_ops import TritonOps

        own = TritonOps(device, dtype)
        if attention == "flash-attn":
            return flash_ops(device, dtype, head_width)
        if attention == "auto" and find_spec("flash_attn") is not None:
            try:
                return flash_ops(device, dtype, head_width)
            except BackendError as missing:
                logger.warning("attention runs by our own kernels: %s", missing)
        return own
    if name != "cpu":
        raise BackendError("it has no steps of a block")
    core, reason = load_native()
    if device.type != "cpu":
        reason = f"tensors on {device} are not taken"
    elif dtype not in CODES:
        reason = f"dtype {dtype} is not taken"
    if reason is not None:
        raise BackendError(reason)
    return NativeOps(core)


class NativeOps:
    """The steps by the native core, on the CPU."""

    capturable = False
    cache_block = BLOCK

    def __init__(self, core: Any) -> None:
        self._core = core

    def pack(self, weight: Tensor) -> Packed:
        outputs, width = weight.shape
        count = -(-outputs // PANEL)
        data = weight.new_zeros(count * PANEL, width)
        data[:outputs] = weight.detach()
        return Packed(data.view(count, PANEL, width).transpose(1, 2).contiguous(), outputs, width)

    def linear(self, x: Tensor, weight: Packed, bias: Tensor | None, y: Tensor) -> Step:
        args = (
            CODES[x.dtype], len(x), weight.width, weight.outputs, at(x), weight.data.data_ptr(),
            0 if bias is None else bias.data_ptr(), at(y), torch.get_num_threads(),
        )  # fmt: skip
        return self._call(self._core.cpu_linear, args, x, weight, bias, y)

    def adapt(self, parts: Sequence[Expansion], slots: Tensor) -> Step:
        listed = [
            (
                part.b.width, part.b.outputs, at(part.hidden), at(part.gamma),
                (0, 0) if part.beta is None else at(part.beta), part.gamma.stride(1), part.b.data.data_ptr(),
                at(part.y),
            )
            for part in parts
        ]  # fmt: skip
        code, rows = CODES[parts[0].y.dtype], len(parts[0].y)
        where = slots_of(slots, len(slots), len(parts[0].gamma))
        return self._call(self._core.cpu_adapt, (code, rows, where, listed, torch.get_num_threads()), parts, slots)

    def gate(self, activation: str, gate: Tensor, up: Tensor, y: Tensor) -> Step:
        args = (
            CODES[y.dtype], ACTIVATIONS[activation], *y.shape, at(gate), at(up), at(y), torch.get_num_threads(),
        )  # fmt: skip
        return self._call(self._core.cpu_gate, args, gate, up, y)

    def film_norm(
        self,
        x: Tensor,
        residual: Tensor,
        scale: Tensor,
        shift: Tensor,
        slots: Tensor,
        weight: Tensor,
        eps: float,
        hidden: Tensor,
        normed: Tensor,
    ) -> Step:
        args = (
            CODES[x.dtype], *x.shape, at(x), at(residual), at(scale), at(shift),
            slots_of(slots, len(slots), len(scale)), weight.data_ptr(), eps, at(hidden), at(normed),
            torch.get_num_threads(),
        )  # fmt: skip
        return self._call(self._core.cpu_film_norm, args, x, residual, scale, shift, slots, weight, hidden, normed)

    def attention(
        self,
        settings: AttentionSettings,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        sequences: Tensor,
        cache: BlockCache,
        layer: int,
        out: Tensor,
    ) -> Step:
        s = settings
        keys, values = cache.layer(layer)
        args = (
            CODES[out.dtype], (len(q), s.heads, s.kv_heads, s.head_width), at(q), at(k), at(v),
            0 if s.q_norm is None else s.q_norm.data_ptr(), 0 if s.k_norm is None else s.k_norm.data_ptr(), s.eps,
            s.cos.data_ptr(), s.sin.data_ptr(), len(s.cos), positions.data_ptr(), sequences.data_ptr(),
            cache.table.data_ptr(), *cache.table.shape, keys.data_ptr(), values.data_ptr(), len(keys),
            s.scale, s.softcap, s.window, at(out), torch.get_num_threads(),
        )  # fmt: skip
        return self._call(self._core.cpu_attention, args, s, q, k, v, positions, sequences, cache, out)

    @staticmethod
    def _call(function: Callable[..., None], args: tuple[Any, ...], *tensors: Any) -> Step:
        # The core gets addresses: what lies there lives as long as the step.
        def run(tensors: tuple[Any, ...] = tensors) -> None:
            function(*args)

        return run


class PlainOps:
    """The definitions of the steps, in PyTorch: any device, any dtype."""

    capturable = False
    cache_block = BLOCK

    def pack(self, weight: Tensor) -> Packed:
        return Packed(weight.detach().clone(), *weight.shape)

    def linear(self, x: Tensor, weight: Packed, bias: Tensor | None, y: Tensor) -> Step:
        def run() -> None:
            y.copy_(functional.linear(x, weight.data, bias))

        return run

    def adapt(self, parts: Sequence[Expansion], slots: Tensor) -> Step:
        def run() -> None:
            index = slots.long()
            for part in parts:
                hidden = part.gamma[index] * part.hidden
                if part.beta is not None:
                    hidden = hidden + part.beta[index]
                part.y.add_(functional.linear(hidden, part.b.data))

        return run

    def gate(self, activation: str, gate: Tensor, up: Tensor, y: Tensor) -> Step:
        def run() -> None:
            act = functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
            torch.mul(act, up, out=y)

        return run

    def film_norm(
        self,
        x: Tensor,
        residual: Tensor,
        scale: Tensor,
        shift: Tensor,
        slots: Tensor,
        weight: Tensor,
        eps: float,
        hidden: Tensor,
        normed: Tensor,
    ) -> Step:
        def run() -> None:
            new = film_norm_reference(x, residual, scale, shift, slots, weight, eps)
            hidden.copy_(new[0])
            normed.copy_(new[1])

        return run

    def attention(
        self,
        settings: AttentionSettings,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        sequences: Tensor,
        cache: BlockCache,
        layer: int,
        out: Tensor,
    ) -> Step:
        s = settings
        keys, values = cache.layer(layer)
        work = torch.promote_types(out.dtype, torch.float32)

        def prepared(x: Tensor, heads: int, norm: Tensor | None, where: Tensor) -> Tensor:
            x = x.unflatten(-1, (heads, s.head_width)).to(work)
            if norm is not None:
                x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + s.eps) * norm.to(work)
            low, high = x.chunk(2, -1)
            cos, sin = s.cos[where, None].to(work), s.sin[where, None].to(work)
            return x * cos + torch.cat([-high, low], -1) * sin

        def run() -> None:
            where, rows = positions.long(), sequences.long()
            queries = prepared(q, s.heads, s.q_norm, where)
            block, within = cache.table[rows, where // BLOCK].long(), where % BLOCK
            keys[block, :, :, within] = prepared(k, s.kv_heads, s.k_norm, where).to(keys.dtype)
            values[block, :, within] = v.unflatten(-1, (s.kv_heads, s.head_width))
            group = s.heads // s.kv_heads
            for row in rows.unique():
                own = (rows == row).nonzero()[:, 0]
                length = int(where[own].max()) + 1
                blocks = cache.table[row, : -(-length // BLOCK)].long()
                k_all = keys[blocks].permute(1, 0, 3, 2).flatten(1, 2)[:, :length].to(work)
                v_all = values[blocks].transpose(0, 1).flatten(1, 2)[:, :length].to(work)
                scores = queries[own].transpose(0, 1) @ k_all.repeat_interleave(group, 0).transpose(1, 2) * s.scale
                if s.softcap:
                    scores = s.softcap * torch.tanh(scores / s.softcap)
                back = where[own, None] - torch.arange(length, device=where.device)
                hidden = back < 0 if not s.window else (back < 0) | (back >= s.window)
                scores = scores.masked_fill(hidden, float("-inf")).softmax(-1)
                out[own] = (scores @ v_all.repeat_interleave(group, 0)).transpose(0, 1).flatten(1).to(out.dtype)

        return run
