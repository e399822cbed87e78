"""Calls whose bytes are counted beside those of bench/gpu_cases.py: the ops' backward, and the steps of a fused block.

A backward takes several kernels, with PyTorch's matrix products and sums between them, which are not counted: its
fewest bytes are those of its kernels, each by itself. Sizes and users are those of gpu_cases; the bank holds the users
of the batch alone, since gradients are of a whole bank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench.gpu_cases import SIZES, Case, context_encoders, normal, size, users_of
from fssa_fast.generation.cache import BLOCK

SINGLE = 4  # bytes of a float32
PAGE = 256  # positions


def film_backward_cases(width: int = 4096) -> Iterator[Case]:
    """film_backward reads and writes everything once; film_norm_backward finds two numbers a row first."""
    for name, rows in SIZES.items():
        users, slots = users_of(rows)
        scale, shift, weight = normal(users, width, scale=0.1), normal(users, width, scale=0.1), normal(width)
        grad, grad_normed, x, residual = (normal(rows, width) for _ in range(4))
        sums = 2 * size(scale)
        fewest = 3 * size(x) + size(scale) + sums
        yield Case(f"{name}, D {width}", "film_backward", (grad, x, scale, shift, slots), fewest, 0)
        args = (grad, grad_normed, x, residual, scale, shift, slots, weight, 1e-5)
        fewest = 3 * size(x) + size(scale, shift, weight, slots) + rows * 2 * SINGLE
        fewest += 5 * size(x) + rows * 2 * SINGLE + size(scale, shift, weight) + sums + users * width * SINGLE
        yield Case(f"{name}, D {width}", "film_norm_backward", args, fewest, 0)


def lora_backward_cases(width: int = 4096) -> Iterator[Case]:
    """The products down to ranks, of x and of every gradient, and what joins them."""
    ranks, outputs = (16, 16), (width, width // 4)
    rank = sum(ranks)
    for name, rows in SIZES.items():
        users, slots = users_of(rows)
        x, grads = normal(rows, width), [normal(rows, out) for out in outputs]
        a, bs = normal(rank, width), [normal(r, out) for r, out in zip(ranks, outputs, strict=True)]
        gamma, beta = normal(users, rank), normal(users, rank)
        hidden = rows * rank
        fewest = size(x, a, *grads, *bs) + 2 * hidden * SINGLE
        fewest += 2 * hidden * SINGLE + size(gamma, beta) + 2 * hidden * x.element_size() + 2 * users * rank * SINGLE
        needed = rows * (width * rank + sum(r * out for r, out in zip(ranks, outputs, strict=True)))
        args = (grads, x, a, bs, gamma, beta, slots, 1.0)
        yield Case(f"{name}, D {width}, R 16 + 16", "lora_backward", args, fewest, needed)


def context_backward_cases(heads: int = 8) -> Iterator[Case]:
    """The forward's kernel again, which leaves three vectors a user, and three for the attention where there is one."""
    for case in context_encoders():
        data, choices, offsets, weights = case.data, case.choices, case.offsets, case.weights
        pairs, users, latent = len(data), len(offsets) - 1, case.latent
        item = data.element_size()
        h, statistics = pairs * latent * item, pairs * heads * SINGLE
        vectors = users * latent * (item + 3 * SINGLE)
        fewest = size(data, choices, offsets, *weights) + vectors  # forward
        fewest += size(offsets) + 2 * h + 3 * statistics  # the softmax, and its mean of the gradient
        fewest += size(offsets) + 2 * h + 3 * statistics + h  # queries
        fewest += size(offsets) + 2 * h + 3 * statistics + users * latent * item + 2 * h  # keys and values
        most = pairs // users
        needed = pairs * latent * (2 * data.shape[2] + 3 * latent) + 3 * users * latent * latent
        needed += pairs * most * latent * (1 + 1 + 2 + 2)
        grad = normal(users, latent)
        args = (grad, data, choices, offsets, weights, "linear", "self-attention", heads)
        yield Case(case.name, "context_backward", args, fewest, needed)
        weights = [*weights[:2], *6 * [None], *weights[8:]]
        fewest = size(data, choices, offsets, *weights) + vectors
        needed = pairs * latent * 2 * data.shape[2] + 2 * users * latent * latent
        args = (grad, data, choices, offsets, weights, "linear", "mean", heads)
        yield Case(f"{case.name}, mean", "context_backward", args, fewest, needed)


def block_cases(heads: int = 8, group: int = 4, width: int = 128) -> Iterator[Case]:
    """The steps of a fused block: the second half of adapters, the gate, attention over the cache, and what precedes
    attention where another kernel does it."""
    model, inner = heads * group * width, 14336
    for name, rows in SIZES.items():
        users, slots = users_of(rows)
        product = normal(rows, model + model // 4 + 32)
        ys = product[:, :model], product[:, model : model + model // 4]
        hiddens = product[:, -32:-16], product[:, -16:]
        bank, bs = normal(users, 64), [normal(y.shape[1], 16) for y in ys]
        gammas, betas = bank[:, :32].split(16, 1), bank[:, 32:].split(16, 1)
        parts = list(zip(hiddens, gammas, betas, bs, ys, strict=True))
        fewest = size(bank, slots, *bs, *hiddens) + 2 * size(*ys)
        yield Case(name, "adapt_", (parts, slots), fewest, rows * 16 * sum(y.shape[1] for y in ys))
        gate = normal(rows, 2 * inner)
        gated = torch.empty(rows, inner, dtype=gate.dtype)
        yield Case(f"{name}, F {inner}", "gate_", (gate[:, :inner], gate[:, inner:], gated, True), 3 * size(gated), 0)
        q, k, v = normal(rows, model), normal(rows, heads * width), normal(rows, heads * width)
        cos, sin = torch.randn(rows, width), torch.randn(rows, width)
        positions, owners = torch.arange(rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
        table = torch.arange(-(-rows // PAGE), dtype=torch.int32)[None]
        keys, values = normal(2, table.numel(), PAGE, heads, width)
        args = (q, k, v, cos, sin, positions, owners, table, torch.empty_like(q).view(rows, -1, width), keys, values)
        fewest = 2 * size(q, k, v) + size(cos, sin, positions, owners, table)
        yield Case(name, "turn_", args, fewest, 0)
    for name, sequences, new, length in (
        ("1 sequence of 1000", 1, 1, 1000),
        ("4 sequences of 500", 4, 1, 500),
        ("8 sequences of 200", 8, 1, 200),
        ("prefill, 1 prompt of 128", 1, 128, 128),
        ("prefill, 2 prompts of 64", 2, 64, 64),
    ):
        pages = -(-length // BLOCK)
        tokens = sequences * new
        keys, values = (
            normal(1 + sequences * pages, heads, width, BLOCK),
            normal(1 + sequences * pages, heads, BLOCK, width),
        )
        table = 1 + torch.arange(sequences * pages, dtype=torch.int32).view(sequences, pages)
        positions = (torch.arange(new, dtype=torch.int32) + length - new).repeat(sequences)
        owners = torch.arange(sequences, dtype=torch.int32).repeat_interleave(new)
        cos, sin = torch.randn(length, width), torch.randn(length, width)
        q, k, v = normal(tokens, model), normal(tokens, heads * width), normal(tokens, heads * width)
        args = (q, k, v, cos, sin, positions, owners, table, keys, values, torch.empty_like(q))
        met = 2 * new * width * SINGLE  # of cos and sin
        fewest = size(q, q, k, v, positions, owners, table) + met
        fewest += 2 * (sequences * length + tokens) * heads * width * q.element_size()
        needed = 2 * sequences * heads * group * width * sum(range(length - new + 1, length + 1))
        yield Case(name, "attention", args, fewest, needed)


MORE_CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "film, backward": film_backward_cases,
    "lora, backward": lora_backward_cases,
    "context, backward": context_backward_cases,
    "fused block": block_cases,
}
