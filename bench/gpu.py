"""The GPU kernels, timed: python -m bench.gpu --json FILE

Every call is captured in a graph with so many copies of its arguments that together they exceed the chip's cache, so
that a replay reads memory and not the cache; a time is that of a call within a replay. Beside every op stand the
machine's measured copy bandwidth and an empty captured launch.

    definition   the op's plain PyTorch definition, launched one by one
    gathered     a kernel that gathers an adapter a row (bench/gpu_baseline.py), for rows of different users
    products     the same two products through torch's matmul, which is cuBLAS
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.gpu_baseline import gathered_lora_
from bench.gpu_cases import CASES, DTYPE, Case
from bench.timing import machine
from fssa_fast.backends import _references, load_backend

ROUNDS = 21
COPIES = 32  # of a call's arguments, at most


class Time(NamedTuple):
    """Microseconds a call: median, 20th and 80th percentile of the rounds."""

    median: float
    low: float
    high: float


def _rounds(run: Callable[[], Any], calls: int) -> Time:
    times = []
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / calls)
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Time(statistics.median(times), fifths[0], fifths[3])


def captured(calls: Sequence[Callable[[], Any]]) -> Time:
    """A call's time within a replay of all of them, ten replays a round."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:  # compiles, and warms the allocator up
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()

    def replays() -> None:
        for _ in range(10):
            graph.replay()

    return _rounds(replays, 10 * len(calls))


def eager(call: Callable[[], Any]) -> Time:
    """A call's time, launched one by one."""
    for _ in range(5):
        call()
    torch.cuda.synchronize()

    def calls() -> None:
        for _ in range(10):
            call()

    return _rounds(calls, 10)


def _copy_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)
    return type(value)(map(_copy_of, value)) if isinstance(value, (list, tuple)) else value


def copies_of(args: tuple[Any, ...], size: int) -> list[tuple[Any, ...]]:
    """The arguments, as often as exceeds the cache twice."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return [args, *(_copy_of(args) for _ in range(min(COPIES, math.ceil(2 * cache / max(size, 1))) - 1))]


@triton.jit
def _empty_kernel(x_ptr, BLOCK: tl.constexpr):
    pass


def copy_bandwidth() -> float:
    """Bytes a second of a device-to-device copy of 1 GiB, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-6 * captured([lambda: target.copy_(source)]).median)


def empty_launch() -> float:
    """Microseconds of a launch that does nothing, in a graph of 32."""
    x = torch.empty(1)
    return captured([lambda: _empty_kernel[(1,)](x, BLOCK=1)] * 32).median


def implementations(op: str) -> dict[str, Callable[..., Any]]:
    """The kernels that can run here."""
    found = {}
    for name in ("cuda", "triton"):
        module, reason = load_backend(name)
        if module is None:
            print(f"{name} is left out: {reason}")
        elif op in module.IMPLEMENTATIONS:
            found[name] = module.IMPLEMENTATIONS[op]
    return found


def op_rows(case: Case, bandwidth: float) -> list[dict[str, Any]]:
    """The op by every implementation."""
    rows = []
    sets = copies_of(case.args, case.fewest)
    for name, run in implementations(case.op).items():
        time = captured([partial(run, *args) for args in sets])
        share = case.fewest / (1e-6 * time.median) / bandwidth
        rows.append({"op": case.op, "case": case.name, "by": name, **time._asdict(), "of copy bandwidth": share})
    time = eager(lambda: _references[case.op](*case.args))
    rows.append({"op": case.op, "case": case.name, "by": "definition", **time._asdict()})
    return rows


def gathered_rows(width: int = 4096, rank: int = 16, users: int = 64) -> list[dict[str, Any]]:
    """lora_ with as many users as rows, against an adapter a user."""
    x, y = torch.randn(users, width).to(DTYPE), torch.randn(users, width).to(DTYPE)
    a, b = torch.randn(users, rank, width).to(DTYPE), torch.randn(users, rank, width).to(DTYPE)
    slots = torch.arange(users, dtype=torch.int32)
    size = sum(t.numel() * t.element_size() for t in (x, y, a, b))
    calls = [partial(gathered_lora_, *args) for args in copies_of((x, y, a, b, slots, 1.0), size)]
    name = f"{users} users, D {width}, R {rank}"
    rows = [{"op": "lora_", "case": name, "by": "gathered", **captured(calls)._asdict()}]
    shared = (x, [y], a[0].contiguous(), [b[0].contiguous()], torch.ones(users, rank, dtype=DTYPE), None, slots, 1.0)
    sets = copies_of(shared, 2 * (x.numel() + y.numel() + 2 * rank * width))
    for by, run in implementations("lora_").items():
        time = captured([partial(run, *args) for args in sets])
        rows.append({"op": "lora_", "case": name, "by": by, **time._asdict()})
    return rows


def product_rows(case: Case) -> list[dict[str, Any]]:
    """The products of a lora_ case through cuBLAS."""
    x, ys, a, bs = case.args[:4]

    def products(x: Tensor, ys: list[Tensor], a: Tensor, bs: list[Tensor]) -> None:
        hidden = x @ a.T
        for y, part, b in zip(ys, hidden.split([b.shape[0] for b in bs], 1), bs, strict=True):
            torch.addmm(y, part, b, out=y)

    time = captured([partial(products, *args) for args in copies_of((x, ys, a, bs), case.fewest)])
    return [{"op": "lora_", "case": case.name, "by": "products", **time._asdict()}]


def all_rows(bandwidth: float) -> Iterator[dict[str, Any]]:
    """Every time, as it is measured."""
    for cases in CASES.values():
        for case in cases():
            yield from op_rows(case, bandwidth)
            if case.op == "lora_" and case.name.startswith("prefill"):
                yield from product_rows(case)
    yield from gathered_rows()


def main() -> None:
    """Times everything; the file holds what was measured so far."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Time the GPU kernels.")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU was found")
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    bandwidth, launch = copy_bandwidth(), empty_launch()
    driver = torch.cuda.get_device_properties(0)
    about = machine() | {
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "compute capability": f"{driver.major}.{driver.minor}",
        "copy bandwidth, GB/s": bandwidth / 1e9,
        "empty captured launch, us": launch,
    }
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for row in all_rows(bandwidth):
            rows.append(row)
            args.json.write_text(json.dumps({"machine": about, "results": rows}, indent=1) + "\n")
            print(row, flush=True)


if __name__ == "__main__":
    main()
