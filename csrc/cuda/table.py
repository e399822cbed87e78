"""Compiles csrc/cuda with nvcc for chips that need not be there, and tabulates what came out.

    python csrc/cuda/table.py            # write table.json beside this file
    python csrc/cuda/table.py --check    # say what is worse than the table; returns 1 where something is

A kernel of a chip is asked for its registers, spilled bytes, tensor-core instructions, and loads of 128 bits. What is
shared memory at a launch is bounded where the kernels are written (MOST_SHARED, most_shared_memory) and at every launch
of the emulation.
Needs nvcc, and the cuobjdump that triton has.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TABLE = HERE / "table.json"
CHIPS = ("sm_80", "sm_90", "sm_100")
SOURCES = ("film", "lora", "context")
FLAGS = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-warn-spills,-warn-lmem-usage,-Werror"]
REGISTERS_MORE = 8  # registers a kernel may use above the table's: compilers differ


def missing() -> str | None:
    """Why nothing can be compiled and read here, or None."""
    if shutil.which("nvcc") is None:
        return "nvcc is not on the PATH"
    listed = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    lacking = [chip for chip in CHIPS if chip not in listed]
    if lacking:
        return f"nvcc does not know {', '.join(lacking)}"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed, and with it cuobjdump"
    return None


def _cuobjdump(*options: str) -> str:
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, *options]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def compile_source(source: Path, to: Path) -> None:
    """Compiles for all chips; raises RuntimeError with nvcc's words where it warns or spills."""
    codes = [part for chip in CHIPS for part in ("-gencode", f"arch={chip.replace('sm', 'compute')},code={chip}")]
    command = ["nvcc", *FLAGS, *codes, "--threads", "2", f"-I{HERE.parent}", "-c", str(source), "-o", str(to)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name}: {done.stdout}{done.stderr}")


def _names(mangled: list[str]) -> dict[str, str]:
    """Short names: film_kernel<float>."""
    plain = subprocess.run(["c++filt", *mangled], check=True, capture_output=True, text=True).stdout.splitlines()
    short = {}
    for name, text in zip(mangled, plain, strict=True):
        text = re.sub(r"fssa::cuda::|\(anonymous namespace\)::|^void ", "", text).split(">(")[0] + ">"
        text = text.replace("__nv_bfloat16", "bfloat16").replace("__half", "float16").replace("(int)", "")
        short[name] = text
    return short


def rows_of(compiled: Path) -> dict[str, dict[str, Any]]:
    """The rows of the table, chip/kernel, of one compiled source."""
    rows = {}
    for chip in CHIPS:
        usage = _cuobjdump("--dump-resource-usage", "-arch", chip, str(compiled))
        found = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
        listing = _cuobjdump("-sass", "-arch", chip, str(compiled))
        code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", listing, re.S))
        names = _names([name for name, *_ in found])
        for name, registers, stack, local in found:
            rows[f"{chip}/{names[name]}"] = {
                "registers": int(registers),
                "spills": int(stack) + int(local),
                "products": len(re.findall(r"\bHMMA\.", code[name])),
                "loads128": len(re.findall(r"\bLDG\.\S*128|\bLDGSTS\.\S*128", code[name])),
            }
    return rows


def worse(key: str, row: dict[str, Any], known: dict[str, Any] | None) -> list[str]:
    """What is wrong with a row, by itself and against the table's."""
    found = []
    if row["spills"]:
        found.append(f"{key}: {row['spills']} bytes of registers spilled")
    if known is None:
        return [*found, f"{key}: not in the table"]
    if row["registers"] > known["registers"] + REGISTERS_MORE:
        found.append(f"{key}: {row['registers']} registers, {known['registers']} in the table")
    if known["products"] and not row["products"]:
        found.append(f"{key}: no longer uses tensor cores")
    if known["loads128"] and not row["loads128"]:
        found.append(f"{key}: no longer loads 128 bits at a time")
    return found


def table() -> dict[str, dict[str, Any]]:
    """The committed table."""
    return json.loads(TABLE.read_text())["kernels"]


def measured(sources: tuple[str, ...] = SOURCES) -> dict[str, dict[str, Any]]:
    """The rows of these sources, compiled now."""
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in sources:
            to = Path(folder) / f"{name}.o"
            compile_source(HERE / f"{name}.cu", to)
            rows |= rows_of(to)
    return rows


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compile csrc/cuda for every chip.")
    parser.add_argument("--check", action="store_true", help="compare with the table")
    checking = parser.parse_args().check
    reason = missing()
    if reason:
        print(f"skipped: {reason}")
        return 0
    rows = measured()
    known = table() if checking else rows
    faults = [fault for key, row in rows.items() for fault in worse(key, row, known.get(key))]
    faults += [f"{key}: in the table, not compiled" for key in known.keys() - rows.keys()]
    for key, row in rows.items():
        print(key, *(f"{name} {value}" for name, value in row.items()))
    for fault in faults:
        print(fault, file=sys.stderr)
    if not checking:
        about = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
        version = re.search(r"release ([\d.]+)", about)
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items())
        TABLE.write_text(f'{{"nvcc": "{version[1] if version else ""}", "kernels": {{\n{lines}\n}}}}\n')
    print(f"{len(rows)} compiled, {len(faults)} faults")
    return min(len(faults), 1)


if __name__ == "__main__":
    sys.exit(main())
