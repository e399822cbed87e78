"""The kernels for bfloat16 pairs on machines that have none: with the instructions modelled.

With FSSA_PROOF=1 under AddressSanitizer and UBSan.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from emulation import build, cpu

HERE = Path(__file__).resolve().parent
reason = build.missing() or (None if platform.machine() == "x86_64" else "not an x86-64")
EVERY = ("native_linear", "native_attention", "same_logits_as_attached", "rows_do_not_depend")


@pytest.mark.proof
@pytest.mark.skipif(reason is not None, reason=str(reason))
def test_the_fused_form_in_bfloat16():
    """The tests of the fused form hold: parity, rows on their own, over a cache full of NaN."""
    sanitized = os.environ.get("FSSA_PROOF") == "1"
    environment = build.environment() if sanitized else {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"FSSA_CORE": str(cpu.build(sanitized)), "FSSA_CPU_ISA": "avx512_bf16"}
    wanted = f"bfloat16 and ({' or '.join(EVERY)}) and not reference and not scalar"
    options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", wanted]
    command = [sys.executable, "-m", "pytest", *options, str(HERE / "test_fused.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0 and "14 passed" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
