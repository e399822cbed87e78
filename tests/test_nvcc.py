"""What nvcc makes of csrc/cuda, against the committed table; `make proof` compiles all of it anew."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_table", CUDA / "table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nvcc = _load()
reason = nvcc.missing()
compiling = pytest.mark.skipif(reason is not None, reason=str(reason))

SPILLS = """
__global__ void __launch_bounds__(1024) planted(float *x) {
  float kept[128];
#pragma unroll
  for (int i = 0; i < 128; i++) kept[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 128; i++) x[(127 - i) * 1024 + threadIdx.x] = kept[i] * kept[(i + 1) % 128];
}
"""
WARNS = "__global__ void planted(float *x) { int never_used; *x = 1.0f; }"


def test_the_table_is_whole_and_without_a_fault() -> None:
    table = nvcc.table()
    kernels = {re.search(r"/(\w+)<", key)[1] for key in table}
    written = {name for path in CUDA.glob("*.cu") for name in re.findall(r"\b(\w+_kernel)\(", path.read_text())}
    assert kernels == written
    for chip in nvcc.CHIPS:
        for kernel in kernels:
            found = [key for key in table if key.startswith(f"{chip}/{kernel}<")]
            assert all(any(f"<{dtype}" in key for key in found) for dtype in ("float", "bfloat16", "float16")), kernel
    for key, row in table.items():
        assert nvcc.worse(key, row, row) == []
        assert row["loads128"] > 0, key
        if not re.search(r"/film|<float\b", key):
            assert row["products"] > 0, key


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"spills": 8}, "spilled"),
        ({"registers": 255}, "in the table"),
        ({"products": 0}, "tensor"),
        ({"loads128": 0}, "128"),
    ],
    ids=["spills", "registers", "products", "loads"],
)
def test_a_worse_row_is_caught(change: dict[str, int], complaint: str) -> None:
    key = next(key for key in nvcc.table() if key.startswith("sm_80/expand_kernel<bfloat16"))
    known = nvcc.table()[key]
    [found] = nvcc.worse(key, known | change, known)
    assert key in found and complaint in found
    assert nvcc.worse(key, known, None) == [f"{key}: not in the table"]


@compiling
@pytest.mark.parametrize(("source", "complaint"), [(SPILLS, "spill"), (WARNS, "never")], ids=["spills", "warns"])
def test_a_kernel_that_spills_or_warns_is_caught(tmp_path: Path, source: str, complaint: str) -> None:
    path = tmp_path / "planted.cu"
    path.write_text(source)
    with pytest.raises(RuntimeError, match=complaint):
        nvcc.compile_source(path, tmp_path / "planted.o")
