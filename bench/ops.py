"""The ops on the CPU against what PyTorch alone would take: `python -m bench.ops [--json FILE]`.

Every op is timed against its definition, run eagerly. `context` also against the formulation that a PyTorch program
would batch users with: all padded to the longest, one masked attention over the batch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.timing import compare, machine, pretty
from fssa_fast import ops
from fssa_fast.arguments import ContextWeights
from fssa_fast.backends import chosen_backend
from fssa_fast.ops.context import context_reference
from fssa_fast.ops.film import film_norm_reference, film_reference
from fssa_fast.ops.lora import lora_reference_

Sides = dict[str, Callable[[], Any]]
Case = tuple[str, str, Sides]  # op, case, what is compared: "op" first

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROWS = (1, 8, 32, 256, 2048)
SLOTS = 64


def film_cases(dtype: torch.dtype) -> Iterator[Case]:
    """film and film_norm, every row another user's as far as slots reach."""
    for width in (576, 2048, 4096):
        for rows in ROWS:
            x, residual = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)
            bank = (0.1 * torch.randn(SLOTS, 2 * width)).to(dtype)
            scale, shift = bank[:, :width], bank[:, width:]
            slots, weight = torch.randint(SLOTS, (rows,), dtype=torch.int32), torch.ones(width, dtype=dtype)
            name = f"{rows} rows, D {width}"
            modulation = {"scale": scale, "shift": shift, "slots": slots}
            yield "film", name, _pair(ops.film, film_reference, x, **modulation)
            normed = modulation | {"weight": weight, "eps": 1e-5}
            yield "film_norm", name, _pair(ops.film_norm, film_norm_reference, x, residual, **normed)


def lora_cases(dtype: torch.dtype) -> Iterator[Case]:
    """lora_ on one projection, gamma and beta a user."""
    for width, outputs in ((576, (192, 576)), (2048, (512, 2048)), (4096, (1024, 4096))):
        for out in outputs:
            for rank in (16, 128):
                for rows in ROWS:
                    x, y = torch.randn(rows, width).to(dtype), torch.randn(rows, out).to(dtype)
                    a = (torch.randn(rank, width) * width**-0.5).to(dtype)
                    b = (torch.randn(rank, out) * 1e-3).to(dtype)
                    gamma, beta = torch.ones(SLOTS, rank, dtype=dtype), torch.zeros(SLOTS, rank, dtype=dtype)
                    slots = torch.randint(SLOTS, (rows,), dtype=torch.int32)
                    adapter = {"a": a, "bs": [b], "gamma": gamma, "beta": beta, "slots": slots, "scaling": 1.0}
                    sides = _pair(ops.lora_, lora_reference_, x, [y], **adapter)
                    yield "lora_", f"{rows} rows, D {width}, O {out}, R {rank}", sides


def _pair(op: Callable[..., Any], reference: Callable[..., Any], *args: Any, **rest: Any) -> Sides:
    return {"op": lambda: op(*args, **rest), "definition": lambda: reference(*args, **rest)}


def context_weights(embedding: int, latent: int, inner: str, pooling: str, dtype: torch.dtype) -> ContextWeights:
    """Random weights of an encoder, Z = H."""

    def linear(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        return (torch.randn(rows, columns) * columns**-0.5).to(dtype), (0.1 * torch.randn(rows)).to(dtype)

    nothing = (None, None)
    tensors: list[Any] = [
        *linear(latent, 2 * embedding),
        *(linear(latent, latent) if inner == "mlp" else nothing),
        *(linear(3 * latent, latent) if pooling == "self-attention" else nothing),
        *(linear(latent, latent) if pooling == "self-attention" else nothing),
        *linear(latent, latent),
        *linear(latent, latent),
    ]
    return ContextWeights(*tensors)


def context_padded(
    pairs: Tensor, choices: Tensor, counts: Tensor, w: ContextWeights, pooling: str, heads: int
) -> Tensor:
    """The encoder over a padded batch: pairs [U, K, 2, E], choices [U, K], of which counts [U] are real."""
    users, longest, _, width = pairs.shape
    which = choices.long()[..., None, None].expand(-1, -1, 1, width)
    h = torch.cat([pairs.gather(2, which).squeeze(2), pairs.gather(2, 1 - which).squeeze(2)], -1)
    h = F.linear(h, w.inner0, w.inner0_bias)
    if w.inner1 is not None:
        h = F.linear(h.relu(), w.inner1, w.inner1_bias)
    real = torch.arange(longest) < counts[:, None]
    if w.qkv is not None and w.out is not None:
        q, k, v = F.linear(h, w.qkv, w.qkv_bias).view(users, longest, 3, heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :])
        h = F.linear(attended.transpose(1, 2).reshape(users, longest, -1), w.out, w.out_bias)
    pooled = (h * real[..., None]).sum(1)
    if pooling == "mean":
        pooled = pooled / counts[:, None]
    return F.linear(F.linear(pooled, w.outer0, w.outer0_bias).relu(), w.outer1, w.outer1_bias)


def context_cases(dtype: torch.dtype) -> Iterator[Case]:
    """context at H = 256, 8 heads, for users with as many pairs each (so that padding costs nothing)."""
    latent, heads = 256, 8
    for embedding in (384, 4096):
        for inner in ("linear", "mlp"):
            for pooling in ("self-attention", "mean"):
                for users, count in ((1, 10), (32, 10), (8, 100)):
                    if pooling == "mean" and (users, count) != (32, 10):
                        continue
                    w = context_weights(embedding, latent, inner, pooling, dtype)
                    pairs = torch.randn(users * count, 2, embedding).to(dtype)
                    choices = torch.randint(2, (users * count,))
                    offsets = torch.arange(users + 1) * count
                    yield (
                        "context",
                        f"{users} users of {count}, E {embedding}, {inner}, {pooling}",
                        _context_sides(pairs, choices, offsets, w, inner, pooling, heads),
                    )


def _context_sides(
    pairs: Tensor, choices: Tensor, offsets: Tensor, w: ContextWeights, inner: str, pooling: str, heads: int
) -> Sides:
    users, kind = offsets.shape[0] - 1, (inner, pooling, heads)
    batch = pairs.view(users, -1, *pairs.shape[1:])
    which, counts = choices.view(users, -1), offsets.diff()
    return {
        "op": lambda: ops.context(pairs, choices, offsets, w, inner=inner, pooling=pooling, heads=heads),
        "definition": lambda: context_reference(pairs, choices, offsets, w, *kind),
        "padded": lambda: context_padded(batch, which, counts, w, *kind[1:]),
    }


CASES = {"context": context_cases, "lora": lora_cases, "film": film_cases}


def main() -> None:
    """Prints a table a dtype, and writes everything as JSON where a file is given."""
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--only", choices=CASES, help="only this op")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="float32 and bfloat16 if not given")
    parser.add_argument("--seconds", type=float, default=0.3, help="at most so long for a side of a case (0.3)")
    args = parser.parse_args()
    torch.manual_seed(0)
    console = Console()
    about = machine()
    console.print(", ".join(f"{name} {value}" for name, value in about.items()), f"backend {chosen_backend()}")
    results = []
    for dtype in args.dtype or DTYPES:
        table = Table("op", "case", "time", "definition", "ratio", "padded batch", "ratio", title=dtype)
        for name, cases in CASES.items():
            if args.only not in (None, name):
                continue
            for op, case, sides in cases(DTYPES[dtype]):
                with torch.no_grad():
                    times = compare(sides, seconds=args.seconds)
                mine, rows = times["op"].median, [op, case, pretty(times["op"].median)]
                for side in ("definition", "padded"):
                    if side in times:
                        rows += [pretty(times[side].median), f"{times[side].median / mine:.2f}x"]
                table.add_row(*rows)
                seconds = {side: timing._asdict() for side, timing in times.items()}
                results.append({"op": op, "case": case, "dtype": dtype, "seconds": seconds})
        console.print(table)
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
