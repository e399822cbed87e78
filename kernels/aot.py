"""Compiles every kernel ahead of time, for chips that need not be there, and tabulates what came out.

    python -m fssa_fast.kernels.aot                   # compile everything, write aot.json beside this file
    python -m fssa_fast.kernels.aot --check PATTERN   # compile what matches, say what is worse than the table
    python -m fssa_fast.kernels.aot --kinds CHIP      # compile one launch of every kernel, say what cannot run

The kernels' own launchers are called with tensors that have shapes and no memory, and their launches recorded: what is
compiled is what a launch would compile. Each is asked for its registers, spilled bytes, shared memory, tensor-core
instruction, and 128-bit loads.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fssa_fast.kernels import block, context, context_backward, film, lora
from fssa_fast.kernels.common import INTERPRETED

TABLE = Path(__file__).with_name("aot.json")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes a program may have
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# ---------------------------------------------------------------- what is launched


def _film(rows: int, width: int, op: str) -> Callable[[torch.dtype], Any]:
    def launch(dtype: torch.dtype) -> None:
        x = _empty(rows, width, dtype=dtype)
        bank = _empty(64, 2 * width, dtype=dtype)
        modulation = (bank[:, :width], bank[:, width:], _empty(rows, dtype=torch.int32))
        if op == "film":
            film.film(x, *modulation)
        elif op == "film_backward":
            film.film_backward(x, x, *modulation)
        elif op == "film_norm":
            film.film_norm(x, x, *modulation, _empty(width, dtype=dtype), 1e-6)
        else:
            film.film_norm_backward(x, x, x, x, *modulation, _empty(width, dtype=dtype), 1e-6)

    return launch


def _lora(
    rows: int, width: int, ranks: list[int], widths: list[int], plain: bool = False, backward: bool = False
) -> Callable[[torch.dtype], Any]:
    def launch(dtype: torch.dtype) -> None:
        rank = sum(ranks)
        x, a = _empty(rows, width, dtype=dtype), _empty(rank, width, dtype=dtype)
        ys = [_empty(rows, w, dtype=dtype) for w in widths]
        bs = [_empty(r, w, dtype=dtype) for r, w in zip(ranks, widths, strict=True)]
        gamma = _empty(64, 1, dtype=dtype).expand(64, rank) if plain else _empty(64, rank, dtype=dtype)
        beta, slots = None if plain else gamma, _empty(rows, dtype=torch.int32)
        if backward:
            lora.lora_backward(ys, x, a, bs, gamma, beta, slots, 1.0)
        else:
            lora.lora_(x, ys, a, bs, gamma, beta, slots, 1.0)

    return launch


def context_case(
    pairs: int, embedding: int, width: int, inner: str, pooling: str, heads: int, sampled: bool = False,
    backward: bool = False, alike: bool = False,
) -> Callable[[torch.dtype], Any]:  # fmt: skip
    """Eight users, who together have so many pairs: how many each has is known at a launch only where all are alike."""

    def launch(dtype: torch.dtype) -> None:
        users = 8

        def linear(out: int, depth: int, used: bool = True) -> list[Tensor | None]:
            return [_empty(out, depth, dtype=dtype), _empty(out, dtype=dtype)] if used else [None, None]

        attention = pooling == "self-attention"
        weights = [
            *linear(width, 2 * embedding), *linear(width, width, inner == "mlp"), *linear(3 * width, width, attention),
            *linear(width, width, attention), *linear(width, width), *linear(width * (1 + sampled), width),
        ]  # fmt: skip
        choices = _empty(pairs, 2, embedding, dtype=dtype), _empty(pairs, dtype=torch.int64)
        offsets = torch.arange(users + 1, dtype=torch.int32) * (pairs // users)
        packed = (*choices, offsets if alike else offsets.to("meta"))
        if backward:
            grad = _empty(users, width, dtype=dtype)
            context_backward.context_backward(grad, *packed, weights, inner, pooling, heads)
            return
        noise = _empty(users, width, dtype=dtype) if sampled else None
        bank, slots = _empty(64, 5 * width, dtype=dtype), _empty(users, dtype=torch.int32)
        modulation, bias = linear(5 * width, width)
        context.context_rows_(
            bank, slots, *packed, weights, modulation, bias, noise, inner, pooling, heads
        )  # fmt: skip

    return launch


def _block(
    rows: int, inner: int, heads: int, kv_heads: int, width: int, rank: int = 16, gemma: bool = False
) -> Callable[[torch.dtype], Any]:
    def launch(dtype: torch.dtype) -> None:
        sizes = [heads * width, kv_heads * width, kv_heads * width, rank, rank]
        q, k, v, *hiddens = _empty(rows, sum(sizes), dtype=dtype).split(sizes, 1)
        bank, index = _empty(64, 4 * rank, dtype=dtype), _empty(rows, dtype=torch.int32)
        angles = _empty(4096, width, dtype=torch.float32)
        rotary = block.Rotary(angles, angles, _empty(width, dtype=dtype) if gemma else None, 1e-6)
        pages = _empty(4096, kv_heads, width, 32, dtype=dtype), _empty(4096, kv_heads, 32, width, dtype=dtype)
        where = index, index, _empty(min(rows, 32), 128, dtype=torch.int32), *pages
        softcap, window = (50.0, 4096) if gemma else (0.0, 0)
        block.attend_(q, rotary, *where, width**-0.5, softcap, window, _empty(rows, heads * width, dtype=dtype))
        if gemma:
            return
        gamma, beta = bank[:, :rank], bank[:, rank : 2 * rank]
        adapted = zip(hiddens, (q, v), strict=True)
        parts = [block.Part(h, gamma, beta, _empty(y.shape[1], rank, dtype=dtype), y) for h, y in adapted]
        block.adapt_(parts, index)
        if rows > 256:
            return
        block.remember_(k, v, rotary, *where)
        rows_of_pages = _empty(512, 256, kv_heads, width, dtype=dtype), _empty(512, 256, kv_heads, width, dtype=dtype)
        turned = _empty(rows, heads, width, dtype=dtype)
        block.turn_(q, k, v, rotary, rotary, *where[:3], turned, *rows_of_pages)
        gates = _empty(rows, 2 * inner, dtype=dtype)
        block.gate_(gates[:, :inner], gates[:, inner:], _empty(rows, inner, dtype=dtype), silu=True)

    return launch


CASES: dict[str, Callable[[torch.dtype], Any]] = {
    "film-576": _film(32, 576, "film"),
    "film-4096": _film(32, 4096, "film"),
    "film-odd": _film(32, 111, "film"),
    "film_norm-576": _film(32, 576, "film_norm"),
    "film_norm-4096": _film(32, 4096, "film_norm"),
    "film_norm-16384": _film(32, 16384, "film_norm"),
    "film_norm-odd": _film(32, 111, "film_norm"),
    "film_backward-4096": _film(2048, 4096, "film_backward"),
    "film_backward-odd": _film(2048, 111, "film_backward"),
    "film_norm_backward-576": _film(2048, 576, "film_norm_backward"),
    "film_norm_backward-4096": _film(2048, 4096, "film_norm_backward"),
    "lora-decode-576": _lora(8, 576, [16, 16, 16], [576, 192, 192]),
    "lora-decode-4096": _lora(32, 4096, [16, 16], [4096, 1024]),
    "lora-decode-rank512": _lora(32, 4096, [512], [4096]),
    "lora-decode-plain": _lora(32, 4096, [64], [11008], plain=True),
    "lora-decode-odd": _lora(5, 111, [3], [33]),
    "lora-prefill-576": _lora(4096, 576, [16, 16, 16], [576, 192, 192]),
    "lora-prefill-4096": _lora(4096, 4096, [16, 16], [4096, 1024]),
    "lora-prefill-rank512": _lora(4096, 4096, [512], [4096]),
    "lora_backward-4096": _lora(4096, 4096, [16, 16], [4096, 1024], backward=True),
    "block-decode-576": _block(32, 1536, 9, 3, 64),
    "block-decode-1536": _block(32, 8960, 12, 2, 128),
    "block-decode-gemma": _block(32, 9216, 8, 4, 256, gemma=True),
    "block-prefill-576": _block(1024, 1536, 9, 3, 64),
    "block-prefill-1536": _block(1024, 8960, 12, 2, 128),
    "context-linear": context_case(80, 384, 256, "linear", "self-attention", 8),
    "context-mlp-sampled": context_case(4096, 384, 256, "mlp", "self-attention", 8, sampled=True),
    "context-one-head": context_case(80, 768, 512, "linear", "self-attention", 1),
    "context-mean": context_case(80, 384, 256, "mlp", "mean", 8),
    "context-odd": context_case(80, 33, 60, "linear", "self-attention", 3),
    "context-few": context_case(64, 384, 256, "linear", "self-attention", 8),
    "context-few-mlp": context_case(64, 384, 256, "mlp", "self-attention", 8),
    "context-many": context_case(4096, 384, 256, "linear", "self-attention", 8, alike=True),
    "context_backward": context_case(4096, 384, 256, "linear", "self-attention", 8, backward=True),
}


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


class Launch(NamedTuple):
    """One launch of a kernel, as its launcher made it."""

    kernel: JITFunction
    args: tuple[Any, ...]
    meta: dict[str, Any]


def launches_of(run: Callable[[], Any]) -> list[Launch]:
    """The launches of Triton kernels that `run` makes; nothing is compiled or run."""
    found: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **meta: Any) -> None:
        found.append(Launch(kernel, args, meta))

    with mock.patch.object(JITFunction, "run", record):
        run()
    return found


@lru_cache(maxsize=1)
def all_launches() -> dict[str, Launch]:
    """Every case's launches in every dtype: "case/dtype/kernel", with a number where a case has more of a kernel."""
    if INTERPRETED.value:
        raise RuntimeError("TRITON_INTERPRET: expected to be unset, since nothing is compiled when it is set")
    named: dict[str, Launch] = {}
    for case, run in CASES.items():
        for dtype_name, dtype in DTYPES.items():
            for launch in launches_of(lambda run=run, dtype=dtype: run(dtype)):
                name = f"{case}/{dtype_name}/{launch.kernel.__name__.removesuffix('_kernel')}"
                repeats = sum(key.split("#")[0] == name for key in named)
                named[f"{name}#{repeats + 1}" if repeats else name] = launch
    return named


def kinds() -> list[str]:
    """A launch of every kernel, the first in bfloat16, as `all_launches` names it."""
    found: dict[str, str] = {}
    for name, launch in all_launches().items():
        if "/bfloat16/" in name:
            found.setdefault(launch.kernel.__name__, name)
    return list(found.values())


# ---------------------------------------------------------------- what comes out


def bind(launch: Launch, target: GPUTarget) -> tuple[dict[str, Any], list[Any], dict[str, Any]]:
    """The launch's arguments by name, for each what of it is compiled in, and the launch's options."""
    kernel, meta = launch.kernel, dict(launch.meta)
    if "EARLY" in meta:  # which a launch asks the GPU it is for
        meta["EARLY"] = target.backend == "cuda" and target.arch >= 90
    return create_function_from_signature(kernel.signature, kernel.params, make_backend(target))(*launch.args, **meta)


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """The kernel compiled for the target as this launch would have it."""
    kernel = launch.kernel
    backend = make_backend(target)
    bound, specialization, options = bind(launch, target)
    parsed, signature, constexprs, attrs = kernel._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=target, options=parsed.__dict__)


def _nvidia(compiled: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    products = [i for i in ("mma.sync", "wgmma.mma_async", "tcgen05.mma") if i in ptx]
    wide = len(re.findall(r"ld\.global\S*\.(?:v4\.[bfu]32|v2\.[bfu]64|v8\.[bfu]16)", ptx))
    wide += len(re.findall(r"cp\.async\.\S+ \[.*\], \[.*\], (?:0x10|16)\b", ptx))
    return {
        "registers": numbers["REG"],
        "spills": numbers["STACK"] + numbers["LOCAL"],
        "shared": compiled.metadata.shared,
        "products": "+".join(products),
        "loads128": wide,
    }


def _amd(compiled: Any) -> dict[str, Any]:
    asm = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", asm)[1])

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count") + number("private_segment_fixed_size"),  # sgprs spill into vgprs
        "shared": compiled.metadata.shared,
        "products": "v_mfma" if "v_mfma" in asm else "",
        "loads128": len(re.findall(r"(?:global|buffer)_load_(?:dwordx4|b128)", asm)),
    }


def measure(launch: Launch, chip: str) -> dict[str, Any]:
    """A row of the table."""
    compiled = compile_launch(launch, TARGETS[chip])
    return _amd(compiled) if TARGETS[chip].backend == "hip" else _nvidia(compiled)


def worse(key: str, row: dict[str, Any], known: dict[str, Any] | None) -> list[str]:
    """What is wrong with a row, by itself and against the table's row of the same key ("chip/case/dtype/kernel")."""
    limit = SHARED_LIMIT[key.split("/")[0]]
    found = []
    if row["spills"]:
        found.append(f"{key}: {row['spills']} bytes of registers spilled")
    if row["shared"] > limit:
        found.append(f"{key}: {row['shared']} bytes of shared memory, the chip has {limit}")
    if known is None:
        return [*found, f"{key}: not in the table"]
    if known["products"] and not row["products"]:
        found.append(f"{key}: no longer uses tensor cores ({known['products']} in the table)")
    if known["loads128"] and not row["loads128"]:
        found.append(f"{key}: no longer loads 128 bits at a time")
    return found


def table() -> dict[str, dict[str, Any]]:
    """The committed table."""
    return json.loads(TABLE.read_text())["kernels"]


def _measure(key: str) -> tuple[str, dict[str, Any]]:
    chip, name = key.split("/", 1)
    return key, measure(all_launches()[name], chip)


def measured(keys: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of these keys, by two processes."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_measure, keys)


def main() -> int:
    """The command line; returns 1 where something is worse than the table, not in it, or cannot run on a chip."""
    parser = argparse.ArgumentParser(description="Compile every kernel ahead of time, for every chip.")
    parser.add_argument(
        "--check", metavar="PATTERN", nargs="+", help="compare with the table, as chip/case/dtype/kernel"
    )
    parser.add_argument("--kinds", metavar="CHIP", choices=TARGETS, help="one launch of every kernel, for one chip")
    arguments = parser.parse_args()
    patterns = arguments.check
    if arguments.kinds:
        keys = [f"{arguments.kinds}/{name}" for name in kinds()]
    else:
        keys = [f"{chip}/{name}" for chip in TARGETS for name in all_launches()]
    known = table() if patterns else {}
    faults = [f"{key}: in the table or launched, not both" for key in known.keys() ^ set(keys)] if patterns else []
    if patterns:
        keys = [key for key in keys if any(fnmatch.fnmatch(key, pattern) for pattern in patterns)]
        if not keys:
            parser.error(f"no kernel matches {' '.join(patterns)}")
    rows = {}
    for key, row in measured(keys):
        rows[key] = row
        faults += worse(key, row, known.get(key) if patterns else row)
        print(key, *(f"{name} {value}" for name, value in row.items()), flush=True)
    for fault in faults:
        print(fault, file=sys.stderr)
    if not patterns and not arguments.kinds:
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items())
        TABLE.write_text(f'{{"triton": "{triton.__version__}", "kernels": {{\n{lines}\n}}}}\n')
    print(f"{len(rows)} compiled, {len(faults)} faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
