"""Builds the native core with its avx512_bf16 set in terms of avx512.h, to be loaded by FSSA_CORE.

Besides that set it has the scalar one. Of the ops those of decoding are modelled; the others are the scalar set's.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from emulation.build import CACHE, HERE, ROOT, SANITIZERS, run

SOURCES = ROOT / "csrc"
OPS = ("attention", "context", "film", "linear", "lora", "sample")
MODELLED = ("attention", "film", "linear")
FLAGS = [
    "-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
    "-Wno-psabi", f"-I{SOURCES}",
]  # fmt: skip
# dispatch.cpp asks the processor for the rest of AVX-512 first.
DISPATCH = ["-DFSSA_AVX512_BF16", "-Dhas_avx512()=true", "-D__builtin_cpu_supports(name)=true"]
OTHERS = "".join(
    f"void {name}(const fssa_{name}_args &a) {{ scalar::{name}(a); }}\n"
    for name in ("lora", "lora_backward", "context", "context_rows", "context_backward", "sample")
)
STAND_INS = f"""#include "cpu/ops.h"
FSSA_DECLARE_OPS(scalar)
FSSA_DECLARE_OPS(avx512_bf16)
namespace fssa {{ namespace avx512_bf16 {{
{OTHERS}}} }}
"""


def build(sanitized: bool) -> Path:
    """The path of the library; one that is not sanitized is made sooner and needs no environment of its own."""
    checked = ["-O1", *SANITIZERS] if sanitized else ["-O0"]
    scalar = ["-DFSSA_ISA=scalar", *checked]
    model = [
        "-DFSSA_ISA=avx512_bf16", "-mavx2", "-mfma", "-mf16c", "-include", str(HERE / "avx512.h"), *checked,
    ]  # fmt: skip
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one builds, others find what it built
        stand_ins = CACHE / "stand_ins.cpp"
        stand_ins.write_text(STAND_INS)
        jobs = [
            *((SOURCES / "cpu" / f"{name}.cpp", model) for name in MODELLED),
            *((SOURCES / "cpu" / f"{name}.cpp", scalar) for name in OPS),
            (stand_ins, checked),
            (SOURCES / "cpu" / "dispatch.cpp", [*DISPATCH, *checked]),
            (SOURCES / "cpu" / "parallel.cpp", checked),
            (SOURCES / "status.cpp", checked),
        ]
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda job: _object(*job), jobs))
        key = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
        library = CACHE / f"_C-{key}.so"
        if not library.exists():
            part = library.with_suffix(f".{os.getpid()}")
            run("g++", *checked, "-shared", *objects, "-ldl", "-lpthread", "-o", part)
            part.rename(library)
    return library


def _object(source: Path, options: list[str]) -> Path:
    """The source compiled; made once for the same text of all that it may include, and the same options."""
    headers = [*SOURCES.glob("*.h"), *(SOURCES / "cpu").glob("*.h"), HERE / "avx512.h"]
    texts = [path.read_bytes() for path in (source, *sorted(headers))]
    key = hashlib.sha256(b"\0".join([*texts, " ".join([*FLAGS, *options]).encode()])).hexdigest()[:16]
    to = CACHE / f"{source.stem}-{key}.o"
    if not to.exists():
        part = to.with_suffix(f".{os.getpid()}")
        run("g++", *FLAGS, *options, "-c", source, "-o", part)
        part.rename(to)
    return to
