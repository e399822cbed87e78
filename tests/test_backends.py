"""Which backend runs: by name it runs or raises, left to itself it falls back and says so once."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import cpu_backends, film_args, in_order, lora_args, running

from fssa_fast import backends, ops
from fssa_fast._native import load_native
from fssa_fast.backends import BackendError, chosen_backend, load_backend, use_backend
from fssa_fast.ops.film import film_reference

film, lora, lora_ = in_order(ops.film), in_order(ops.lora), in_order(ops.lora_)

native = pytest.mark.skipif(load_native()[0] is None, reason=str(load_native()[1]))


@pytest.fixture
def calls(monkeypatch):
    """The names of the backends that ran film, in order."""
    ran = []

    def spy(name, function):
        return lambda *args: ran.append(name) or function(*args)

    monkeypatch.setitem(backends._references, "film", spy("reference", film_reference))
    cpu, _ = load_backend("cpu")
    if cpu is not None:
        monkeypatch.setitem(cpu.IMPLEMENTATIONS, "film", spy("cpu", cpu.film))
    return ran


@native
def test_automatic_takes_the_native_backend(calls, monkeypatch):
    monkeypatch.delenv("FSSA_BACKEND", raising=False)
    assert chosen_backend() == "auto"
    film(*film_args(3, 8, torch.float32))
    assert calls == ["cpu"]


@native
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_named_by_environment_or_block(calls, monkeypatch, name):
    monkeypatch.setenv("FSSA_BACKEND", name)
    film(*film_args(3, 8, torch.float32))
    other = {"cpu": "reference", "reference": "cpu"}[name]
    with use_backend(other):
        assert chosen_backend() == other
        film(*film_args(3, 8, torch.float32))
    assert chosen_backend() == name
    assert calls == [name, other]


def test_automatic_falls_back_and_says_so_once(caplog):
    backends._say_once.cache_clear()
    args = film_args(3, 8, torch.float64)
    with caplog.at_level(logging.WARNING, "fssa_fast"):
        with use_backend("auto"):
            assert torch.equal(film(*args), film_reference(*args))
            film(*args)
    assert len(caplog.records) == 1
    assert "film runs by its plain PyTorch definition" in caplog.text
    assert "torch.float64" in caplog.text or "could not be loaded" in caplog.text


@native
def test_named_raises_where_it_cannot_run():
    with use_backend("cpu"), pytest.raises(BackendError, match="'cpu' was asked for but cannot run film: .*float64"):
        film(*film_args(3, 8, torch.float64))


def test_named_raises_where_it_is_not_there(monkeypatch):
    monkeypatch.setattr(backends, "load_backend", lambda name: (None, "its module is not built"))
    with use_backend("cpu"), pytest.raises(BackendError, match="'cpu' was asked for.*its module is not built"):
        film(*film_args(3, 8, torch.float32))


def test_unknown_names(monkeypatch):
    with pytest.raises(BackendError, match="name: expected one of auto, reference, .*'fpga'"):
        with use_backend("fpga"):
            pass
    monkeypatch.setenv("FSSA_BACKEND", "fpga")
    with pytest.raises(BackendError, match="FSSA_BACKEND: expected one of .*'fpga'"):
        film(*film_args(3, 8, torch.float32))


@native
def test_every_op_has_an_implementation():
    assert set(load_backend("cpu")[0].IMPLEMENTATIONS) == set(backends._references)


def test_a_missing_native_module_is_explained(monkeypatch):
    """As in a checkout that was not built: there is no library."""
    program = (
        "import torch\n"
        "from fssa_fast.backends import load_backend\n"
        "from fssa_fast.ops import film\n"
        "print(load_backend('cpu')[1])\n"
        "x = torch.zeros(1, 4)\n"
        "film(x, scale=x, shift=x, slots=torch.zeros(1, dtype=torch.int32))\n"
    )
    for name, code in (("auto", 0), ("cpu", 1)):
        environment = {**os.environ, "FSSA_BACKEND": name, "FSSA_CORE": "/nowhere/_C.so"}
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        assert run.returncode == code, run.stderr
        assert "pip install" in run.stdout and "fssa_fast/_C.so" in run.stdout
        assert ("BackendError" in run.stderr) == (code == 1)


# ---------------------------------------------------------------- instruction sets and threads


@native
def test_instruction_sets():
    cpu, _ = load_backend("cpu")
    before = cpu.isa()
    assert "scalar" in cpu.supported_isas() and before in cpu.supported_isas()
    try:
        for name in cpu.supported_isas():
            cpu.set_isa(name)
            assert cpu.isa() == name
    finally:
        cpu.set_isa(before)
    with pytest.raises(ValueError, match="name: expected scalar.*, got sse9"):
        cpu.set_isa("sse9")
    assert cpu.isa() == before


@native
@pytest.mark.parametrize("name", ["scalar", "sse9"])
def test_instruction_set_from_the_environment(name):
    program = (
        "import torch\n"
        "from fssa_fast.ops import film\n"
        "from fssa_fast.backends import cpu\n"
        "x = torch.zeros(1, 4)\n"
        "film(x, scale=x, shift=x, slots=torch.zeros(1, dtype=torch.int32))\n"
        "print(cpu.isa())\n"
    )
    environment = {**os.environ, "FSSA_CPU_ISA": name, "FSSA_BACKEND": "cpu"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    if name == "scalar":
        assert run.stdout.strip() == "scalar", run.stderr
    else:
        assert run.returncode == 1 and "FSSA_CPU_ISA: expected scalar" in run.stderr and "sse9" in run.stderr


@native
def test_instruction_sets_agree():
    args = lora_args(40, 333, ((16, 111),), torch.float32)
    found = []
    for backend in cpu_backends():
        with running(backend):
            found.append(lora(*args)[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)


@native
def test_threads_share_the_pool():
    """Calls from several Python threads at once, each with threads of its own to ask for."""
    args = lora_args(256, 700, ((64, 300),), torch.float32)
    torch.set_num_threads(3)
    try:
        with running(cpu_backends()[-1]):
            want = lora(*args)[0]

            def call(_):
                with use_backend("cpu"):
                    return all(torch.equal(lora(*args)[0], want) for _ in range(20))

            with ThreadPoolExecutor(6) as pool:
                assert all(pool.map(call, range(12)))
    finally:
        torch.set_num_threads(1)


@native
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted as Linux shows them")
def test_threads_are_those_of_torch():
    """A second set of them would share the cores with torch's, which wait for more work in a loop."""
    program = (
        "import os, torch\n"
        "from fssa_fast.backends import cpu\n"
        "torch.set_num_threads(3)\n"
        "x, a, b, y = torch.randn(300, 700), torch.randn(64, 700), torch.randn(64, 300), torch.zeros(300, 300)\n"
        "torch.randn(300, 300).exp() @ x.new_ones(300, 700)\n"
        "torch.ones(10**6).exp()\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "cpu.lora(x, [y], a, [b], torch.ones(1, 64), None, torch.zeros(300, dtype=torch.int32), 1.0)\n"
        "print(before, len(os.listdir('/proc/self/task')))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120)
    before, after = map(int, run.stdout.split())
    assert before == after >= 3


@native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_works_after_fork():
    """In a process of its own, and too small for torch to start OpenMP threads, which do not survive a fork."""
    program = (
        "import os, torch\n"
        "from fssa_fast.backends import cpu\n"
        "torch.manual_seed(0); torch.set_num_threads(3)\n"
        "x, a, b, y = torch.randn(100, 700), torch.randn(64, 700), torch.randn(64, 300), torch.zeros(100, 300)\n"
        "args = (x, [y], a, [b], torch.ones(1, 64), None, torch.zeros(100, dtype=torch.int32), 1.0)\n"
        "want = cpu.lora(*args)[0]\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if all(torch.equal(cpu.lora(*args)[0], want) for _ in range(50)) else 3)\n"
        "assert torch.equal(cpu.lora(*args)[0], want)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@native
def test_in_place_needs_no_gradients_recorded():
    x, ys, *rest = lora_args(4, 9, ((2, 3),), torch.float32)
    with use_backend("cpu"), torch.no_grad():
        want = lora(x, ys, *rest)[0]
        lora_(x.requires_grad_(), ys, *rest)
    assert torch.equal(ys[0], want)
