"""The kernels compiled ahead of time for GPUs that are not here, against the committed table."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fssa_fast.kernels import aot  # noqa: E402  (needs triton)

# One kernel of every kind, and every chip and dtype.
SUBSET = [
    "sm_80/film_norm-4096/bfloat16/*",
    "sm_90/lora-decode-4096/bfloat16/*",
    "sm_100/lora-prefill-576/float16/*",
    "gfx942/lora-decode-576/bfloat16/*",
    "sm_80/context-linear/float16/*",
    "sm_90/context-odd/bfloat16/context_encode",
    "gfx942/film_backward-4096/float32/*",
    "sm_100/context_backward/bfloat16/context_keys",
    "sm_90/block-decode-1536/bfloat16/*",
]

SPILLS = """
import torch, triton, triton.language as tl
from fssa_fast.kernels import aot

@triton.jit
def planted_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, tl.dot(x, x, input_precision="ieee"))

x = torch.empty(64, 64, device="meta")
[launch] = aot.launches_of(lambda: planted_kernel[(1,)](x, x, 64, num_warps=1))
print(aot.measure(launch, "sm_80"))
"""


EARLY = """
from fssa_fast.kernels import aot

for kernel in ("shrink", "expand"):
    launch = aot.all_launches()[f"lora-decode-odd/bfloat16/lora_{kernel}"]
    compiled = [aot.compile_launch(launch, aot.TARGETS[chip]) for chip in ("sm_80", "sm_90")]
    print(*(c.asm["ptx"].count("griddepcontrol") for c in compiled))
"""

CONTEXTS = """
from fssa_fast.kernels import aot

for dtype in aot.DTYPES.values():
    for width, heads in ((60, 3), (256, 8), (1024, 8)):
        for inner, pooling in (("linear", "self-attention"), ("mlp", "mean")):
            for pairs in (64, 80, 4096):
                case = aot.context_case(pairs, 384, width, inner, pooling, heads)
                print(*(launch.kernel.__name__ for launch in aot.launches_of(lambda: case(dtype))))
"""


SIZES = """
import torch
from fssa_fast.kernels import aot, film, lora

def few_tokens(rows):
    x, slots = aot._empty(2, rows, 4096, dtype=torch.bfloat16), aot._empty(2, dtype=torch.int32)
    bank = aot._empty(64, 4096, dtype=torch.bfloat16)
    film.film(x, bank, bank, slots)
    a, b = aot._empty(16, 4096, dtype=torch.bfloat16), aot._empty(16, 4096, dtype=torch.bfloat16)
    lora.lora_(x, [x], a, [b], bank[:, :16], None, slots, 1.0)

CASES = {
    "film": lambda rows: aot._film(rows, 4096, "film")(torch.bfloat16),
    "film_norm": lambda rows: aot._film(rows, 576, "film_norm")(torch.bfloat16),
    "lora": lambda rows: aot._lora(rows, 4096, [16, 16], [4096, 1024])(torch.bfloat16),
    "block": lambda rows: aot._block(rows, 1536, 9, 3, 64)(torch.bfloat16),
    "context": lambda pairs: aot.context_case(1000 + pairs, 384, 256, "mlp", "mean", 8)(torch.bfloat16),
    "tokens": few_tokens,
}
for name, run in CASES.items():
    found = {}
    for size in (5, 16, 17, 30) if name == "tokens" else (1, 5, 16, 32, 33):
        for launch in aot.launches_of(lambda: run(size)):
            _, compiled_in, _ = aot.bind(launch, aot.TARGETS["sm_90"])
            found.setdefault(launch.kernel.__name__, set()).add(repr(compiled_in))
    print(name, *(f"{kernel}: {len(keys)}" for kernel, keys in found.items() if len(keys) > 1))
"""


def compiling(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs Python where Triton compiles, which it does not in a process that interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.mark.proof
def test_a_subset_is_as_good_as_the_table() -> None:
    done = compiling("-m", "fssa_fast.kernels.aot", "--check", *SUBSET)
    assert done.returncode == 0, done.stderr
    for pattern in SUBSET:
        assert pattern.removesuffix("*") in done.stdout


AHEAD = """
import re, torch
from fssa_fast.kernels import aot, configs
launch = aot.all_launches()["block-decode-1536/bfloat16/attend"]
tile = configs.attend_tile(128, torch.bfloat16)
compiled = aot.compile_launch(launch, aot.TARGETS["sm_80"])
ptx = compiled.asm["ptx"]
loop = ptx[ptx.index("mma.sync"):]
print(len(re.findall(r"cp\\.async\\.c[ag]\\.", loop)), compiled.metadata.shared // (2 * tile.step * 128 * 2))
"""


@pytest.mark.proof
def test_attention_loads_ahead_of_its_products() -> None:
    """Keys and values of further steps are on their way while one is multiplied, into memory for two or more."""
    copies, steps = map(int, compiling("-c", AHEAD).stdout.split())
    assert copies > 0 and steps >= 2


def test_expand_is_launched_early_where_the_chip_can() -> None:
    """Shrink lets it begin, expand waits; on older chips neither."""
    done = compiling("-c", EARLY)
    assert done.stdout.splitlines() == ["0 1", "0 1"], done.stderr


def test_choices_become_rows_in_two_launches() -> None:
    """However many, in every dtype and at every width."""
    done = compiling("-c", CONTEXTS)
    assert done.stdout.splitlines() == ["context_encode_kernel context_rows_kernel"] * 54, done.stderr


def test_a_batch_of_another_size_compiles_nothing() -> None:
    """Which would hold its users up for seconds: rows, users, pairs and tokens choose tiles, and nothing else."""
    done = compiling("-c", SIZES)
    assert done.stdout.split() == ["film", "film_norm", "lora", "block", "context", "tokens"], done.stdout + done.stderr


def test_the_whole_table_can_run() -> None:
    """No row of it is a fault by itself, and tensor cores do every product of 16-bit numbers."""
    table = aot.table()
    without = {"lora_ranks", "remember", "turn", "gate", "join"}
    for key, row in table.items():
        assert not aot.worse(key, row, row)
        chip, _, dtype, kernel = key.split("/")
        multiplies = "film" not in kernel and kernel not in without
        if multiplies and dtype != "float32":
            assert row["products"], key
    assert {key.split("/")[0] for key in table} == set(aot.TARGETS)


def test_a_kernel_that_spills_is_caught(tmp_path: Path) -> None:
    script = tmp_path / "spills.py"
    script.write_text(SPILLS)
    done = compiling(str(script))
    assert done.returncode == 0, done.stderr
    row = ast.literal_eval(done.stdout)
    assert row["spills"] > 100
    assert "spilled" in aot.worse("sm_80/case/float32/planted", row, row)[0]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"spills": 4}, "spilled"),
        ({"shared": 65537}, "shared memory"),
        ({"products": ""}, "tensor cores"),
        ({"loads128": 0}, "128 bits"),
    ],
    ids=["spills", "shared", "products", "loads"],
)
def test_a_worse_row_is_caught(change: dict[str, object], complaint: str) -> None:
    key = "gfx942/lora-decode-4096/bfloat16/lora_shrink"
    known = aot.table()[key]
    assert aot.worse(key, known, known) == []
    [found] = aot.worse(key, known | change, known)
    assert key in found and complaint in found


def test_a_row_that_is_missing_is_caught() -> None:
    key = "sm_80/lora-decode-4096/bfloat16/lora_shrink"
    assert aot.worse(key, aot.table()[key], None) == [f"{key}: not in the table"]
