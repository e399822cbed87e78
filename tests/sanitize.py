"""The CPU core under sanitizers: python tests/sanitize.py. Returns 1 where one found something.

AddressSanitizer and UndefinedBehaviorSanitizer: the native core is built with both, beside the usual one, and the
tests of the ops, of malformed calls, of the fused form and of the engine run with it. AVX-512's sets are left out where
the machine has them not: test_avx512.py runs a model of them under both.

ThreadSanitizer: the pool of threads runs in a C++ program of its own. Not the engine's tests: they run in a Python, a
torch and a libgomp that were not built for it, whose locks and barriers it does not see, so that it would call every
hand-over between their threads a race.

First each sanitizer has to find a planted fault.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from fssa_fast.backends.cpu import supported_isas

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # cmake and ninja of this environment first
BOTH, THREAD = "-fsanitize=address,undefined", "-fsanitize=thread"

# Of the tests of each file those that run native code, in one run so that torch is loaded by two processes and no more.
CHOSEN = {
    ("film", "lora", "context"): "cpu and (definition or gradients or nan_among or no_rows or three_dimensions)",
    ("malformed_calls",): "test",
    ("fused",): "native or rows_do_not or bad_steps or (same_logits and cpu)",
    ("engine",): "greedy or little_memory or many_threads or blocks_are",
}
FILES = [f"tests/test_{name}.py" for names in CHOSEN for name in names]
TESTS = " or ".join(f"(({' or '.join(f'test_{n}.py' for n in names)}) and ({of}))" for names, of in CHOSEN.items())


def run(*command: str | Path, environment: dict[str, str] | None = None, quiet: bool = False) -> tuple[int, str]:
    """Runs a command in the checkout: its exit status, and with `quiet` what it said."""
    print("$", *command, flush=True)
    output = subprocess.PIPE if quiet else None
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "PATH": PATH, **(environment or {})},
        stdout=output,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
        errors="replace",
    )
    return done.returncode, done.stdout or ""


def program(name: str, sanitizer: str) -> list[str | Path]:
    """Builds a program of tests/sanitizers; the command that runs it."""
    path = BUILD / f"{name}-{sanitizer.rpartition('=')[2]}"
    sources = [ROOT / "tests/sanitizers" / f"{name}.cpp", ROOT / "csrc/cpu/parallel.cpp"]
    code, _ = run(CXX, "-std=c++17", *FLAGS, sanitizer, "-I", ROOT / "csrc", *sources, "-o", path, "-pthread", "-ldl")
    if code:
        raise RuntimeError(f"{CXX} did not build {name} with {sanitizer}")
    # ThreadSanitizer's runtimes of some years cannot live with as much address randomisation as kernels now do.
    return ["setarch", platform.machine(), "-R", path] if sanitizer == THREAD else [path]


def planted_faults_found() -> bool:
    """Whether each sanitizer finds its planted fault, and nothing where none is planted."""
    both, thread = program("planted", BOTH), program("planted", THREAD)
    said = {
        "AddressSanitizer: heap-use-after-free": run(*both, "address", quiet=True)[1],
        "runtime error: signed integer overflow": run(*both, "undefined", quiet=True)[1],
        "ThreadSanitizer: data race": run(*thread, "thread", quiet=True)[1],
    }
    missed = [fault for fault, output in said.items() if fault not in output]
    print("planted faults not found:", missed or "none", flush=True)
    return not missed and run(*both)[0] == 0 and run(*thread)[0] == 0


def build() -> None:
    """The native core with AddressSanitizer and UndefinedBehaviorSanitizer, in BUILD."""
    for command in (
        ["cmake", "-S", ROOT, "-B", BUILD / "cmake", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=None",
         f"-DCMAKE_CXX_FLAGS={' '.join([*FLAGS, BOTH])}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={BUILD}",
         f"-DFSSA_AVX512={'ON' if 'avx512' in supported_isas() else 'OFF'}"],
        ["cmake", "--build", BUILD / "cmake", "--parallel", str(os.cpu_count() or 1)],
    ):  # fmt: skip
        if run(*command, environment={"CXX": CXX})[0]:
            raise RuntimeError("the sanitized core was not built")


def tests_pass() -> bool:
    """Runs the tests with the sanitized core."""
    asan = subprocess.run([CXX, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    stdcxx = subprocess.run([CXX, "-print-file-name=libstdc++.so"], capture_output=True, text=True, check=True)
    environment = {
        # libstdc++ too, or AddressSanitizer does not see the throw that comes first in a library loaded later.
        "LD_PRELOAD": f"{asan.stdout.strip()} {stdcxx.stdout.strip()}",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",  # Python gives back little at its end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "FSSA_CORE": str(BUILD / "_C.so"),
        "OMP_NUM_THREADS": "1",
    }
    check = "from fssa_fast._native import load_native; print(load_native()[0].path)"
    if run(sys.executable, "-c", check, environment=environment)[0]:
        return False
    pytest = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal", *FILES, "-k", TESTS]
    return not run(*pytest, environment=environment)[0]


def main() -> int:
    """Everything, whatever became of what came before."""
    BUILD.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    outcomes = {"planted faults": planted_faults_found()}
    outcomes["pool under ThreadSanitizer"] = run(*program("pool", THREAD))[0] == 0
    build()
    outcomes["tests under AddressSanitizer and UndefinedBehaviorSanitizer"] = tests_pass()
    for name, passed in outcomes.items():
        print("passed" if passed else "FAILED", name)
    print(f"in {time.monotonic() - begin:.0f} s")
    return int(not all(outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
