"""One small block by the steps of a GPU beside its definition, before the fused form is trusted to them.

What a release of torch, Triton or flash-attn changes is met here, with its reason, and not at a user's first token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fssa_fast.backends import BackendError
from fssa_fast.generation.block_ops import AttentionInputs, AttentionSettings, BlockOps, Expansion, FilmNorm
from fssa_fast.generation.cache import BlockCache
from fssa_fast.generation.graphs import CudaGraphs
from fssa_fast.generation.plain_ops import PlainOps

DECODE = [(0, 0), (1, 2)]  # of each token: which sequence, and its position
PREFILL = [(1, 0), (1, 1), (0, 0), (1, 2)]
WIDTH, RANK, SLOTS = 64, 16, 3


def try_block(
    ops: BlockOps, device: torch.device, dtype: torch.dtype, head_width: int, graphs: CudaGraphs | None
) -> None:
    """Raises BackendError where a block by these steps fails or is far from its definition.

    The block has an adapter and film; it is tried with a token a sequence, and with several. graphs: tries it captured
    by these, too.
    """
    allowed = 0.05 if dtype.itemsize < 4 else 1e-3
    for tokens in (DECODE, PREFILL):
        try:
            expected = _block(PlainOps(), device, dtype, head_width, tokens)[0]()
            run, keep = _block(ops, device, dtype, head_width, tokens)
            found = {"launched one by one": _copied(run())}
            if graphs is not None:
                replay = graphs.capture(run)
                for tensor in keep:
                    tensor.zero_()
                found["captured"] = _copied(replay())
        except Exception as error:  # anything that a release changes
            raise BackendError(f"a block was tried and failed: {error!r}") from error
        for how, results in found.items():
            for name, result in results.items():
                truth = expected[name].float()
                apart = float((result - truth).abs().max() / truth.abs().max())
                if not apart < allowed:
                    raise BackendError(f"a block was tried, {how}, and its {name} is {apart:.3g} from the definition")


def _copied(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: result.float().clone() for name, result in results.items()}


def _block(
    ops: BlockOps, device: torch.device, dtype: torch.dtype, head_width: int, tokens: list[tuple[int, int]]
) -> tuple[Callable[[], dict[str, Tensor]], list[Tensor]]:
    """The steps as a function that runs them and returns their results by name, and the buffers that they write."""
    n, heads = len(tokens), 2 * head_width
    count = 0

    def number(*shape: int) -> Tensor:
        nonlocal count
        count += 1
        size = torch.Size(shape).numel()
        values = torch.arange(size, dtype=torch.float64).mul_(0.7 + 0.01 * count).add_(count).sin_()
        return (values.view(shape) * shape[-1] ** -0.5).to(device, dtype)

    def new(columns: int) -> Tensor:
        return torch.zeros(n, columns, dtype=dtype, device=device)

    x, start = number(n, WIDTH) * 8, number(n, WIDTH) * 8
    bank, nothing = number(SLOTS, 2 * WIDTH + 2 * RANK), torch.zeros(SLOTS, WIDTH, dtype=dtype, device=device)
    slots = torch.arange(n, dtype=torch.int32, device=device) % SLOTS
    sequences, positions = torch.tensor(tokens, dtype=torch.int32, device=device).T.contiguous()
    weight = 1 + number(WIDTH)
    columns = [heads, head_width, head_width, RANK]
    qkv, gates, hidden, normed = new(sum(columns)), new(2 * WIDTH), new(WIDTH), new(WIDTH)
    attended, gated, out = new(heads), new(WIDTH), new(WIDTH)
    q, k, v, low = qkv.split(columns, 1)
    gamma, beta = bank[:, :RANK], bank[:, RANK : 2 * RANK]
    film = bank[:, 2 * RANK : 2 * RANK + WIDTH], bank[:, 2 * RANK + WIDTH :]
    turn = torch.arange(4 * head_width, device=device).view(4, head_width) * 0.1
    settings = AttentionSettings(2, 1, head_width, None, None, 0.0, turn.cos(), turn.sin(), head_width**-0.5, 0.0, 0)
    cache = BlockCache(1, 1, head_width, sequences=2, max_length=4, block=ops.cache_block, dtype=dtype, device=device)
    cache.table.copy_(torch.tensor([[1], [2]]))
    shapes = [(sum(columns), WIDTH), (WIDTH, heads), (2 * WIDTH, WIDTH), (WIDTH, WIDTH)]
    into_qkv, from_heads, into_gates, down = (ops.pack(number(*shape)) for shape in shapes)
    steps = [
        ops.film_norm(FilmNorm(x, start, nothing, nothing, slots, weight, 1e-6, hidden, normed)),
        ops.linear(normed, into_qkv, None, qkv),
        ops.adapt([Expansion(low, gamma, beta, ops.pack(number(heads, RANK)), q)], slots),
        ops.attention(settings, AttentionInputs(q, k, v, positions, sequences), cache, 0, attended),
        ops.linear(attended, from_heads, None, out),
        ops.film_norm(FilmNorm(out, hidden, nothing, nothing, slots, weight, 1e-6, hidden, normed)),
        ops.linear(normed, into_gates, None, gates),
        ops.gate("silu", gates[:, :WIDTH], gates[:, WIDTH:], gated),
        ops.linear(gated, down, None, out),
        ops.film_norm(FilmNorm(out, hidden, *film, slots, weight, 1e-6, hidden, normed)),
    ]

    def run() -> dict[str, Tensor]:
        for step in steps:
            step()
        return {"adapted queries": q, "attention": attended, "gate": gated, "film": hidden, "norm": normed}

    return run, [qkv, attended, gated, hidden, normed]
