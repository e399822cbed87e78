"""The five proofs of the kernels on a machine without what they are for, each timed: python tests/proof.py.

Returns 1 where one failed. What a proof needs and does not find is said, and the proof counts as skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = ["-m", "pytest", "-q", "-rs", "-n", "auto", "--dist", "worksteal"]
PROOFS: dict[str, list[list[str]]] = {
    "interpreter: the Triton kernels against the definitions": [
        [*PYTEST, "tests/test_kernels.py", "tests/test_golden.py", "tests/test_flash_ops.py"]
    ],
    "ahead of time: the Triton kernels compiled for every chip": [
        ["-m", "fssa_fast.kernels.aot", "--check", "*"],
        [*PYTEST, "tests/test_aot.py"],
    ],
    "older Tritons: every kernel compiled, the fused form's interpreted": [["tests/older_tritons.py"]],
    "nvcc: the CUDA kernels compiled for every chip": [
        ["csrc/cuda/table.py", "--check"],
        [*PYTEST, "tests/test_nvcc.py"],
    ],
    "emulation: the CUDA kernels, and AVX-512 with bfloat16 pairs, against the definitions": [
        [*PYTEST, "tests/test_cuda.py", "tests/test_avx512.py"]
    ],
}


def main() -> int:
    """Runs all proofs, whatever became of those before."""
    environment = {**os.environ, "FSSA_PROOF": "1", "OMP_NUM_THREADS": "1"}
    summary = []
    for name, commands in PROOFS.items():
        print(f"== {name}", flush=True)
        begin, outcome = time.monotonic(), "passed"
        for command in commands:
            # Of those with a line a kernel only the last is shown.
            quiet = command[1:2] == ["fssa_fast.kernels.aot"] or command[0].endswith(("table.py", "tritons.py"))
            output = subprocess.PIPE if quiet else None
            done = subprocess.run(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=output, text=True
            )  # fmt: skip
            if quiet:
                said = done.stdout.strip()
                said = said if command[0].endswith("tritons.py") else said.rpartition("\n")[2]
                print(said, flush=True)
                if "skipped: " in said:
                    outcome = "skipped"
            if done.returncode:
                outcome = "FAILED"
        summary.append(f"{outcome} in {time.monotonic() - begin:4.0f} s  {name}")
    print("\n".join(["", *summary]))
    return int(any(line.startswith("FAILED") for line in summary))


if __name__ == "__main__":
    sys.exit(main())
