"""The definitions of the steps of a fused block, in PyTorch: what the others are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fssa_fast.generation.block_ops import AttentionInputs, AttentionSettings, Expansion, FilmNorm, Packed, Step
from fssa_fast.generation.cache import BLOCK, BlockCache
from fssa_fast.ops.film import film_norm_reference


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

    def film_norm(self, given: FilmNorm) -> Step:
        def run() -> None:
            g = given
            new = film_norm_reference(g.x, g.residual, g.scale, g.shift, g.slots, g.weight, g.eps)
            g.hidden.copy_(new[0])
            g.normed.copy_(new[1])

        return run

    def attention(
        self, settings: AttentionSettings, given: AttentionInputs, cache: BlockCache, layer: int, out: Tensor
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
            where, rows = given.positions.long(), given.sequences.long()
            queries = prepared(given.q, s.heads, s.q_norm, where)
            block, within = cache.table[rows, where // BLOCK].long(), where % BLOCK
            keys[block, :, :, within] = prepared(given.k, s.kv_heads, s.k_norm, where).to(keys.dtype)
            values[block, :, within] = given.v.unflatten(-1, (s.kv_heads, s.head_width))
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
