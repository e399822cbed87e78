"""The Triton kernels with the Tritons that older releases of torch bring: python tests/older_tritons.py.

Each is installed once, by itself, into the user's cache, and put before the environment's own on the path: a launch of
every kernel is compiled with each, and the fused form's kernels are interpreted with the oldest. Returns 1 where one
failed. Where nothing can be installed that is said, and the proof counts as skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "fssa_fast"
# With the numpy that the interpreter needs: that of 3.6 converts arrays of one element, which numpy 2.4 refuses.
TRITONS = {
    "3.6.0": ["triton==3.6.0", "numpy==2.3.5"],  # torch 2.11
    "3.7.0": ["triton==3.7.0"],  # torch 2.12
    "3.8.0": ["triton==3.8.0"],
}
OLDEST = "3.6.0"
COMPILE = ["-m", "fssa_fast.kernels.aot", "--kinds", "sm_90"]
INTERPRET = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "tests/test_block_ops.py", "-k", "not fused"]


def installed(version: str) -> Path | None:
    """The folder that holds this Triton alone; None where it is not there and cannot be had."""
    folder = CACHE / f"triton-{version}"
    done = folder / "complete"
    if not done.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", str(folder)]
        if subprocess.run([*command, *TRITONS[version]]).returncode:
            return None
        done.touch()
    return folder


def main() -> int:
    """Compiles with each, interprets with the oldest; a line each."""
    failed = 0
    for version in TRITONS:
        folder = installed(version)
        if folder is None:
            print(f"skipped: triton {version} is not in {CACHE} and cannot be installed")
            return failed
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        environment.pop("TRITON_INTERPRET", None)
        for command in [COMPILE, *([INTERPRET] if version == OLDEST else [])]:
            done = subprocess.run(
                [sys.executable, *command], cwd=ROOT, env=environment, text=True, capture_output=True
            )  # fmt: skip
            said = done.stdout.strip().rpartition("\n")[2]
            if done.returncode:
                failed, said = 1, f"FAILED\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            print(f"triton {version}: {said}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
