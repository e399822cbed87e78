"""Builds csrc/cuda for the emulation: a library like fssa_fast/_cuda.so, under AddressSanitizer and UBSan."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CUDA, HERE = ROOT / "csrc" / "cuda", Path(__file__).resolve().parent
CACHE = ROOT / "build" / "emulation"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
FLAGS = [
    "-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror",
    "-Wno-unknown-pragmas", "-DFSSA_EMULATION",
]  # fmt: skip


def missing() -> str | None:
    """Why nothing can be built here, or None."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    with tempfile.TemporaryDirectory() as folder:
        program = [*SANITIZERS, "-x", "c++", "-", "-o", f"{folder}/try"]
        tried = subprocess.run(["g++", *program], input="int main() {}", capture_output=True, text=True)
    return None if tried.returncode == 0 else f"g++ has no sanitizers: {tried.stderr.strip()}"


def run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")


def _object(source: Path, folder: Path, cuda: Path, options: list[str]) -> Path:
    """The source compiled; made once for the same text of all that it may include, and the same options."""
    texts = [source.read_bytes(), *(path.read_bytes() for path in sorted(cuda.glob("*.h")))]
    texts += [path.read_bytes() for path in (HERE / "emulation.h", *sorted((ROOT / "csrc").glob("*.h")))]
    key = hashlib.sha256(b"\0".join([*texts, " ".join(options).encode()])).hexdigest()[:16]
    to = folder / f"{source.stem}-{key}.o"
    if not to.exists():
        part = to.with_suffix(f".{os.getpid()}")
        run("g++", *FLAGS, *options, f"-I{HERE}", f"-I{ROOT / 'csrc'}", "-x", "c++", "-c", source, "-o", part)
        part.rename(to)
    return to


def build(
    planted: Mapping[str, tuple[str, str]] | None = None, only: tuple[str, ...] = (), sanitized: bool = True
) -> Path:
    """The path of the library. `planted` changes the text of a file of csrc/cuda: {name: (old, new)}, old once in it.

    With `only`, the change is compiled into these sources alone and the others stay what they are. A library that is
    not `sanitized` needs no environment of its own.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary, open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one builds, others find what it built
        changed = CUDA
        if planted:
            changed = Path(temporary) / "csrc" / "cuda"
            shutil.copytree(CUDA, changed)
            for path in (ROOT / "csrc").glob("*.h"):  # included as "../"
                shutil.copy(path, changed.parent)
            for name, (old, new) in planted.items():
                text = (changed / name).read_text()
                if text.count(old) != 1:
                    raise ValueError(f"{name}: expected {old!r} once, found it {text.count(old)} times")
                (changed / name).write_text(text.replace(old, new))
        checked = ["-O1", *SANITIZERS] if sanitized else ["-O2"]
        folders = {name: changed if not only or name in only else CUDA for name in ("film", "lora", "context")}
        jobs = [
            *((folder / f"{name}.cu", folder, checked) for name, folder in folders.items()),
            (HERE / "emulation.cpp", CUDA, checked),
            (ROOT / "csrc" / "status.cpp", CUDA, checked),
        ]
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda job: _object(job[0], CACHE, *job[1:]), jobs))
        key = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
        library = CACHE / f"_cuda-{key}.so"
        if not library.exists():
            part = library.with_suffix(f".{os.getpid()}")
            run("g++", *(SANITIZERS if sanitized else ()), "-shared", *objects, "-o", part)
            part.rename(library)
    return library


def environment() -> dict[str, str]:
    """What a process needs in which the library is loaded: the sanitizers first, fresh memory full of NaNs."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    options = "detect_leaks=0:detect_stack_use_after_return=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {
        **os.environ, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": options, "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": paths, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
