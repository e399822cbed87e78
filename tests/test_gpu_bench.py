"""The round on a GPU, as far as it goes without one: its steps with an interpreter of straw, its report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu_report import figures, markdown

ROOT = Path(__file__).resolve().parents[1]

# Takes every command of the round but cmake's, and runs the report's with the interpreter that is named in REAL.
STRAW = """#!/bin/bash
case "$*" in
  *get_device_name*) echo Straw-1 ;;
  *get_path*) echo /nowhere ;;
  *xdist*) exit 1 ;;
  *bench.gpu_report*) exec "$REAL" "$@" ;;
  *bench.gpu*) echo "$RESULTS" >"${@: -1}" ;;
  *test_trial*) exit 1 ;;
  "-m pytest"*) grep -q "a toy block" "$FOLDER"/*.md && echo "1 failed" && exit 1 ;;
esac
"""


def row(op: str, case: str, by: str, median: float, share: float | None = None) -> dict[str, Any]:
    found = {"op": op, "case": case, "by": by, "median": median, "low": median, "high": median}
    return found if share is None else {**found, "of copy bandwidth": share}


FOUND: dict[str, Any] = {
    "machine": {"gpu": "Straw-1", "empty captured launch, us": 1.5},
    "results": [
        row("film", "decode, 1 row", "cuda", 3.4, 0.01),
        row("film", "decode, 1 row", "triton", 4.0, 0.01),
        row("film", "decode, 1 row", "definition", 20.0),
        row("lora_", "decode, 64 rows", "triton", 9.0, 0.79),
        row("lora_", "prefill, 256 rows", "triton", 10.0, 0.9),
        row("lora_", "prefill, 256 rows", "products", 8.0),
        row("context_rows_", "1 user of 10, E 4096", "cuda", 50.0, 0.3),
        row("context_rows_", "1 user of 10, E 4096", "definition", 510.0),
        row("lora_", "64 users, D 4096", "gathered", 20.0),
        row("lora_", "64 users, D 4096", "cuda", 10.0),
    ],
}


def round_on_a_gpu(folder: Path, nvcc: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    tools = folder / "tools"
    tools.mkdir()
    nothing = "#!/bin/sh\n"
    for name, text in (("nvcc", f"{nothing}echo Build straw\n"), ("cmake", nothing), ("straw", STRAW))[not nvcc :]:
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    path = f"{tools}:/usr/bin:/bin"
    return subprocess.run(
        ["bash", ROOT / "bench" / "gpu_round.sh", folder / "results"], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PATH": path, "REAL": sys.executable, "FOLDER": str(folder / "results"),
             **environment},
    )  # fmt: skip


@pytest.mark.parametrize("nvcc", [True, False], ids=["nvcc", "no nvcc"])
def test_a_round_writes_what_it_found_as_it_goes(nvcc: bool, tmp_path: Path) -> None:
    """A part that fails is in the results when the next one begins, and stops none of them."""
    straw = str(tmp_path / "tools" / "straw")
    done = round_on_a_gpu(tmp_path, nvcc, PYTHON=straw, RESULTS=json.dumps(FOUND), COMMIT="abc")
    assert done.returncode == 1, done.stderr  # a part failed
    page, results, log = sorted((tmp_path / "results").iterdir(), key=lambda path: ".md .json .log".find(path.suffix))
    assert all(path.name.startswith("gpu-Straw-1-") for path in (page, results, log))
    found = json.loads(results.read_text())
    assert found["results"] == FOUND["results"] and found["about"]["commit"] == "abc"
    assert found["about"]["nvcc"] == ("Build straw" if nvcc else "not installed")
    outcomes = {step["step"]: step["outcome"] for step in found["steps"]}
    names = list(outcomes)
    assert names.index("tests: a toy block") < names.index("tests: kernels") < names.index("fused step, 1 rows")
    assert outcomes["tests: kernels"] == "failed (1)"  # not 2: the page already told of the toy block
    assert outcomes["build"] == outcomes["benchmarks"] == outcomes["peft, 8 adapters"] == "passed"
    assert outcomes["CUDA build"] == ("passed" if nvcc else "nvcc is not installed")
    assert "1 failed" in log.read_text() and ("tests: CUDA kernels" in outcomes) == nvcc
    text = page.read_text()
    assert "| tests: kernels | failed (1) |" in text and "| film | decode, 1 row | cuda | 3.40" in text


def test_figures_and_their_bars() -> None:
    found = {f.what.split(":")[0] + (" definition" if "definition" in f.what else ""): f for f in figures(FOUND)}
    met = {what: figure.met for what, figure in found.items()}
    assert met == {
        "film, decode, 1 row": True,  # 1.9 us over an empty launch, by the faster
        "lora_, decode, 64 rows": False,
        "lora_, prefill, 256 rows": True,
        "context_rows_, 1 user of 10, E 4096": False,
        "context_rows_, 1 user of 10, E 4096 definition": True,
        "lora_, 64 users, D 4096": False,
    }
    assert found["lora_, prefill, 256 rows"].found == "0.80 times"


def test_a_round_that_measured_nothing() -> None:
    steps = [{"step": "build", "outcome": "failed (2)", "time": "3 s"}]
    page = markdown("gpu-Straw-1", {"machine": {}, "results": [], "about": {}, "steps": steps})
    assert "| build | failed (2) | 3 s |" in page and "No measurements." in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_begins(tmp_path: Path) -> None:
    done = round_on_a_gpu(tmp_path, PYTHON=sys.executable)
    assert (done.returncode, done.stdout.strip()) == (1, "torch finds no GPU")
    assert not list((tmp_path / "results").iterdir())
    command = [sys.executable, "-m", "bench.gpu", "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "no GPU was found" in done.stderr
