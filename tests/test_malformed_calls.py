"""Calls past the public functions never end the process: malformed ones raise, and slots may change during a call."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fssa_fast._native import load_native

native = pytest.mark.skipif(load_native()[0] is None, reason=str(load_native()[1]))

CHANGING = """
import threading, time, torch
from cases import context_args, film_args, film_norm_args, lora_args, normal
from fssa_fast.backends import load_backend
from fssa_fast.generation.block_ops import Expansion
from fssa_fast.generation.native_draw import NativeDraw
from fssa_fast.generation.native_ops import NativeOps
from fssa_fast.generation.sampling import Knobs

torch.manual_seed(0)
ops, rows = torch.ops.fssa, 4096
film, norm, lora = (
    film_args(rows, 16, torch.float32),
    film_norm_args(rows, 16, torch.float32),
    lora_args(rows, 16, ((4, 16),), torch.float32),
)
grads = normal(rows, 16), normal(rows, 16)
native = NativeOps(load_backend("cpu")[0].core())
index = torch.zeros(rows, dtype=torch.int32)
b = native.pack(normal(16, 4))
part = Expansion(normal(rows, 4), normal(5, 4), normal(5, 4), b, normal(rows, 16))
encoder = context_args((1,) * rows, 4, 8, 1, "linear", "sum", torch.float32)
drawn = torch.arange(rows, dtype=torch.int32)
knobs, sampled = Knobs.new(rows, torch.device("cpu")), NativeDraw(load_backend("cpu")[0].core())
written = (normal(rows, 6), torch.arange(rows), *encoder[:4], normal(6, 8), normal(6), None, *encoder[4:])
calls = {
    film[3]: [lambda: ops.film(*film), lambda: ops.film_backward(grads[0], *film)],
    norm[4]: [lambda: ops.film_norm(*norm), lambda: ops.film_norm_backward(*grads, *norm)],
    lora[6]: [
        lambda: ops.lora(*lora), lambda: ops.lora_(*lora), lambda: ops.lora_backward(lora[1], lora[0], *lora[2:]),
    ],
    index: [native.adapt([part], index)],
    drawn: [lambda: sampled(normal(rows, 16), knobs, drawn, drawn)],
    written[1]: [lambda: ops.context_rows_(*written)],
    encoder[1]: [lambda: ops.context(*encoder), lambda: ops.context_backward(normal(rows, 8), *encoder)],
    encoder[2]: [lambda: ops.context(*encoder)],
}
for integers, listed in calls.items():
    right, wrong = integers.clone(), integers + 2**30
    stop = threading.Event()

    def rewrite():
        while not stop.is_set():
            integers.copy_(wrong)
            integers.copy_(right)

    writer = threading.Thread(target=rewrite)
    writer.start()
    for call in listed:
        raised = returned = 0
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            try:
                call()
                returned += 1
            except (IndexError, ValueError):
                raised += 1
        print(returned, raised, flush=True)
    stop.set()
    writer.join()
    integers.copy_(right)
"""


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120
    )


@native
def test_malformed_calls_raise():
    done = _run("malformed_calls.py")
    assert done.returncode == 0, (done.returncode, done.stdout[-500:], done.stderr[-500:])


@native
def test_integers_that_another_thread_rewrites_during_a_call():
    done = _run("-c", CHANGING)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-500:])
    assert len(done.stdout.splitlines()) == 13
