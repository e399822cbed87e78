"""What the GPU kernels read, write and multiply, counted and not timed: python -m bench.traffic [--json FILE]

Needs no GPU: the CUDA kernels run in the emulation of tests/emulation, the Triton kernels in Triton's interpreter, and
every load, store and product is counted on the way, in bfloat16, at three decode and two prefill sizes.

    moved    distinct 32-byte sectors that a kernel reads, and those it writes; summed over an op's kernels, so that
             what one leaves for the next counts twice. What a kernel reads again is taken to come from the cache.
    asked    the same with repeats: what the loads and stores ask of the caches
    fewest   every byte of the inputs that matter read once and of the outputs written once
    products multiply-adds of the tensor cores, and how many of them the op needs

Returns 1 where a kernel moves more than 1.15 of the fewest bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import numpy  # noqa: E402
import torch  # noqa: E402
from emulation import build, emulated  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.gpu_cases import CASES, Case  # noqa: E402
from bench.more_cases import MORE_CASES  # noqa: E402
from bench.timing import machine  # noqa: E402
from fssa_fast.backends import cuda, load_backend  # noqa: E402

ALLOWED = 1.15
SECTOR = 32


class Count(NamedTuple):
    """What the kernels of a call did."""

    moved: int
    asked: int
    products: int


def count_cuda(emulation: emulated.Emulation, case: Case) -> Count | None:
    """By the CUDA kernels; None where none of them is made for this case."""
    if case.op not in cuda.IMPLEMENTATIONS:
        return None
    if case.op == "context_rows_" and case.args[4].diff().max() > 64:  # right, but one block does all attention
        return None
    with emulation.counting() as kernels:
        cuda.IMPLEMENTATIONS[case.op](*case.args)
    rows = list(kernels.values())
    return Count(sum(r[3] + r[4] for r in rows), sum(r[1] + r[2] for r in rows), sum(r[5] for r in rows))


@contextmanager
def _interpreter_counts() -> Iterator[dict[str, int]]:
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, dot, launch = (
        builder.create_masked_load, builder.create_masked_store, builder.create_dot, executor.__call__
    )  # fmt: skip
    counts = {"moved": 0, "asked": 0, "products": 0}
    sectors: dict[str, set[int]] = {"read": set(), "written": set()}

    def touch(kind: str, pointers: Any, mask: Any) -> None:
        addresses = pointers.data[mask.data]
        counts["asked"] += addresses.size * pointers.get_element_ty().primitive_bitwidth // 8
        sectors[kind].update(numpy.unique(addresses.astype("uint64") // SECTOR).tolist())

    def counted_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        touch("read", ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        touch("written", ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def counted_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        counts["products"] += a.data.shape[-2] * a.data.shape[-1] * b.data.shape[-1]
        return dot(self, a, b, *rest)

    def counted_launch(self: Any, *args: Any, **kwargs: Any) -> None:
        launch(self, *args, **kwargs)
        counts["moved"] += SECTOR * sum(len(found) for found in sectors.values())
        for found in sectors.values():
            found.clear()

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    builder.create_dot, executor.__call__ = counted_dot, counted_launch
    try:
        yield counts
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        builder.create_dot, executor.__call__ = dot, launch


def _attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> None:
    """Attention of new tokens over the cache, as a fused block's step does it."""
    from fssa_fast.kernels import block

    positions, sequences, table, keys, values, out = rest
    rotary = block.Rotary(cos, sin, None, 0.0)
    block.remember_(k, v, rotary, positions, sequences, table, keys, values)
    block.attend_(q, rotary, positions, sequences, table, keys, values, q.shape[1] ** -0.5, 0.0, 0, out)


def count_triton(module: Any, case: Case) -> Count:
    """By the Triton kernels."""
    from fssa_fast.kernels import block

    def adapt_(parts: Any, slots: Tensor) -> None:
        block.adapt_([block.Part(*part) for part in parts], slots)

    def turn_(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> None:
        rotary = block.Rotary(cos, sin, None, 0.0)
        block.turn_(q, k, v, rotary, rotary, *rest)

    steps = {"adapt_": adapt_, "gate_": block.gate_, "attention": _attention, "turn_": turn_}
    with _interpreter_counts() as counts:
        (module.IMPLEMENTATIONS | steps)[case.op](*case.args)
    return Count(**counts)


def main() -> int:
    """Prints a table an op, and writes everything as JSON where a file is given."""
    groups = CASES | MORE_CASES
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description="Bytes and products, counted.")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--only", choices=groups, help="only these")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    counters: dict[str, Callable[[Case], Count | None]] = {}
    reason = build.missing()
    if reason is None:
        emulation = emulated.load(str(build.build(sanitized=False)))
        counters["cuda"] = lambda case: count_cuda(emulation, case)
    triton, why = load_backend("triton")
    if triton is not None:
        counters["triton"] = lambda case: count_triton(triton, case)
    for name, missing in (("cuda", reason), ("triton", why)):
        if missing:
            print(f"{name} is left out: {missing}")
    results, console = [], Console(width=150)
    for title, cases in groups.items():
        if arguments.only not in (None, title):
            continue
        names = ("op", "case", "kernels", "fewest", "moved", "ratio", "asked", "ratio", "products", "needed")
        table = Table(*names, title=title)
        for case in cases():
            for name, count in counters.items():
                found = count(case)
                if found is None:
                    continue
                row = {"op": case.op, "case": case.name, "kernels": name, "fewest": case.fewest, **found._asdict()}
                results.append({**row, "needed": case.needed})
                ratios = (found.moved / case.fewest, found.asked / case.fewest)
                table.add_row(
                    case.op, case.name, name, f"{case.fewest:,}", f"{found.moved:,}", f"{ratios[0]:.3f}",
                    f"{found.asked:,}", f"{ratios[1]:.2f}", f"{found.products:,}", f"{case.needed:,}",
                )  # fmt: skip
        console.print(table)
    over = [row for row in results if row["moved"] > ALLOWED * row["fewest"]]
    for row in over:
        print(f"{row['op']}, {row['case']}, {row['kernels']}: {row['moved'] / row['fewest']:.2f} of the fewest bytes")
    if arguments.json:
        about = {name: machine()[name] for name in ("date", "commit", "fssa_fast", "torch")}
        arguments.json.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")
    return min(len(over), 1)


if __name__ == "__main__":
    sys.exit(main())
