"""The CUDA kernels without a GPU: run by the emulation, and the backend's answers where it cannot run.

The emulation's are run by make proof.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from emulation import build
from emulation.emulated import CASES

from fssa_fast.backends import BackendError, cuda, gpus, load_backend, use_backend
from fssa_fast.ops import film

reason = build.missing()
emulated = pytest.mark.skipif(reason is not None, reason=f"the emulation cannot be built: {reason}")


class Outcome(NamedTuple):
    passed: list[str]
    failed: dict[str, str]
    stopped: str  # what a sanitizer or the emulation said


def outcome(module: object, cases: list[str]) -> Outcome:
    """Runs cases in a process of their own, as the sanitizers need it."""
    command = [sys.executable, "-m", "emulation.emulated", str(module), *cases]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)) if module == "device" else build.environment()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    results = dict(json.loads(line) for line in done.stdout.splitlines())
    failed = {name: error for name, error in results.items() if error}
    ended = len(results) == len(cases) and done.returncode in (0, 1)
    return Outcome([name for name in results if name not in failed], failed, "" if ended else done.stderr or "silently")


def of_kernel(prefix: str) -> list[str]:
    return [name for name in CASES if name.split(" ")[0] in prefix.split("|")]


@pytest.mark.proof
@emulated
@pytest.mark.parametrize("kernels", ["film|film_norm|nothing", "lora", "context|context_rows"])
def test_emulated(kernels: str) -> None:
    """Within the rule of accuracy, the same bits for every order of threads, nothing read or written out of bounds."""
    cases = of_kernel(kernels)
    found = outcome(build.build(), cases)
    assert not found.stopped, found.stopped
    assert not found.failed, "\n".join(found.failed.values())
    assert found.passed == cases


class Bug(NamedTuple):
    file: str
    old: str
    new: str
    only: str  # the source that is compiled with it
    cases: list[str]
    sign: str  # in what is said of it


WRITES = "if (lane == 0) sums[warp] = value;"
NORMS = "if (lane == 0) store(b.norms + head * b.head_stride + i, highest + log2f(total));"
LORA = ["lora three float32", "lora three bfloat16", "lora dense float16"]
BUGS = {
    "missing barrier": Bug(
        "film.cu", f"{WRITES}\n  __syncthreads();", WRITES, "film",
        ["film_norm 520 dense float32", "film_norm 520 dense bfloat16"], "allowed",
    ),
    "index past the end": Bug(
        "film.cu", "const int64_t left = a.width - d;\n  if (left <= 0) return;", "const int64_t left = PIECE<T>;",
        "film", ["film 1030 float32"], "AddressSanitizer: heap-",
    ),
    "fragment layout": Bug(
        "product.h", "lane % 8 + lane / 16 * 8) * b_pitch + lane / 8 % 2 * 8", "lane % 16) * b_pitch + lane / 16 * 8",
        "lora", LORA[1:], "allowed",
    ),
    "missing barrier in a pipeline": Bug(
        "product.h", "__syncthreads();  // the step is here", "// the step is here", "lora", LORA, "allowed"
    ),
    "missing wait for copies": Bug(
        "product.h", "copy_wait<STAGES - 2>()", "copy_wait<STAGES - 1>()", "lora", LORA, "allowed"
    ),
    "barrier that some threads miss": Bug(
        "film.cu", f"{WRITES}\n  __syncthreads();",
        "if (lane == 0) {\n  sums[warp] = value;\n  __syncthreads();\n}", "film", ["film_norm 130 float32"],
        "wait for others that never come",
    ),
    "row past the end": Bug(
        "lora.cu", "if (row + m < s.rows && rank", "if (row + m <= s.rows && rank", "lora", ["lora dense float32"],
        "AddressSanitizer: heap-",
    ),
    "row of results swapped": Bug(
        "product.h", "(16 * i + 8 * half + g) * COLUMNS", "(16 * i + 2 * g + half) * COLUMNS", "lora", LORA,
        "allowed",
    ),
    "transposed fragment": Bug(
        "lora.cu", "load_matrices_transposed(weights,", "load_matrices(weights,", "lora", LORA[1:], "allowed"
    ),
    "missing wait for the launch before": Bug(
        "lora.cu", "wait_for_launch_before();", "", "lora", LORA, "has not waited for it"
    ),
    "last block too early": Bug(
        "context.cu", "static_cast<int32_t>(blocks - 1)", "static_cast<int32_t>(blocks - 2)", "context",
        ["context sampled float32"], "allowed",
    ),
    "missing barrier between phases": Bug(
        "context.cu", f"{NORMS}\n  }}\n  __syncthreads();", f"{NORMS}\n  }}", "context",
        ["context few float32"], "allowed",
    ),
}  # fmt: skip


@pytest.mark.proof
@emulated
@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name: str) -> None:
    bug = BUGS[name]
    found = outcome(build.build({bug.file: (bug.old, bug.new)}, (bug.only,)), bug.cases)
    said = found.stopped + "\n".join(found.failed.values())
    assert bug.sign in said or "the bits depend on the order of threads" in said, said or "nothing was said"


# ---------------------------------------------------------------- on a GPU

if load_backend("cuda")[0] is not None:

    def test_on_the_device() -> None:
        """All cases, all dtypes, by the module that was built for this machine."""
        found = outcome("device", list(CASES))
        assert not found.stopped, found.stopped
        assert not found.failed, "\n".join(found.failed.values())

    def test_captured_in_a_graph() -> None:
        """A call can be captured, and replayed on new contents of its tensors."""
        x, scale, shift = (torch.randn(4, 512, device="cuda") for _ in range(3))
        slots = torch.arange(4, dtype=torch.int32, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = cuda.film(x, scale, shift, slots)
        x.normal_()
        graph.replay()
        torch.testing.assert_close(y, x * (1 + scale) + shift)


# ---------------------------------------------------------------- the backend

here = pytest.mark.skipif(load_backend("cuda")[0] is not None, reason="the CUDA backend runs on this machine")


@here
def test_why_it_is_not_there() -> None:
    _, why = load_backend("cuda")
    assert why is not None
    assert any(part in why for part in ("has no CUDA", "no GPU", "compute capability", "fssa_fast/_cuda.so"))
    x = torch.zeros(2, 4)
    with use_backend("cuda"), pytest.raises(BackendError, match="'cuda' was asked for but cannot run film: "):
        film(x, scale=x, shift=x, slots=torch.zeros(2, dtype=torch.int32))


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[int, int]]:
    """A machine that seems to have two GPUs: their compute capabilities, which can be changed."""
    capability = {0: (9, 0), 1: (8, 6)}

    def index(device: torch.device | int) -> int | None:
        return device if isinstance(device, int) else device.index

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[index(device)])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"chip {index(device)}")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return capability


def test_a_gpu_too_old_a_module_not_built(
    monkeypatch: pytest.MonkeyPatch, two_gpus: dict[int, tuple[int, int]]
) -> None:
    monkeypatch.setattr(gpus, "tried", lambda film: None)
    monkeypatch.setattr(cuda, "_reason", "not built")
    two_gpus |= {0: (7, 5), 1: (7, 0)}
    assert cuda.unavailable() == "a GPU of compute capability 8.0 or newer is needed, this one has 7.5"
    two_gpus[1] = (9, 0)
    assert cuda.unavailable() == "not built"
    monkeypatch.setattr(cuda, "_reason", None)
    assert cuda.unavailable() is None
    old = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda", 0))
    assert "this one has 7.5" in str(cuda.refuses("film", old))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.unavailable() == "no GPU was found"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda.unavailable() == "this build of torch has no CUDA"


def test_an_old_driver_is_found_by_a_trial(
    monkeypatch: pytest.MonkeyPatch, two_gpus: dict[int, tuple[int, int]]
) -> None:
    """Run on the newest GPU, here on the CPU in its place; what no driver is to blame for is not taken for one."""
    zeros, asked = torch.zeros, []
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **kind: asked.append(device) or zeros(*shape, **kind))
    monkeypatch.setattr(cuda, "_reason", None)

    def raising(error: Exception) -> None:
        def film(*args: object) -> None:
            raise error

        monkeypatch.setattr(cuda, "film", film)

    raising(RuntimeError("film: CUDA driver version is insufficient for CUDA runtime version"))
    assert cuda.unavailable() == (
        "a trial on chip 0 failed: RuntimeError: film: CUDA driver version is insufficient for CUDA runtime version"
    )
    assert {str(device) for device in asked} == {"cuda:0"}
    raising(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        cuda.unavailable()
    monkeypatch.setattr(cuda, "film", lambda *args: None)
    assert cuda.unavailable() is None


def test_work_goes_to_the_stream_of_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever device is the current one."""
    current = [0]

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        before, current[0] = current[0], wanted.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=100 + current[0]))
    with cuda._stream_of(SimpleNamespace(device=torch.device("cuda", 1))) as stream:
        assert stream == 101
    assert current == [0]


def test_what_it_refuses() -> None:
    assert "no CUDA kernel" in str(cuda.refuses("film_backward", torch.zeros(1)))
    assert "float64" in str(cuda.refuses("film", torch.zeros(1, dtype=torch.float64)))
    assert "tensors on cpu" in str(cuda.refuses("film", torch.zeros(1)))


def test_it_is_never_chosen_by_itself() -> None:
    assert not cuda.DEVICES and not any(cuda.prefers(op, ()) for op in cuda.IMPLEMENTATIONS)
