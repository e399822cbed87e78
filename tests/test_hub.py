"""The kernel repository that `make hub` writes, loaded as the hub's are, beside the installed package."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

PROGRAM = """
import pathlib, sys
import torch
from kernels import get_local_kernel

import fssa_fast
import fssa_fast.ops as ours

hub = get_local_kernel(pathlib.Path(sys.argv[1]), backend="cpu")
assert pathlib.Path(hub.__file__).is_relative_to(sys.argv[1]) and hub.film is not ours.film
x, scale, slots = torch.randn(3, 8), torch.randn(2, 8, requires_grad=True), torch.tensor([1, 0, 1])
a, b, gamma = torch.randn(4, 8), torch.randn(4, 8), torch.randn(2, 4)
found = []
for ops in (hub, ours):
    with ops.use_backend("reference") if ops is hub else fssa_fast.use_backend("reference"):
        y = ops.film(x, scale=scale, shift=scale, slots=slots)
        (z,) = ops.lora(x, [y], a=a, bs=[b], gamma=gamma, beta=None, slots=slots, scaling=0.5)
    found.append((z, *torch.autograd.grad(z.sum(), scale)))
assert all(torch.equal(one, other) for one, other in zip(*found))
try:
    hub.film(x, scale=scale, shift=scale, slots=slots + 7)
except IndexError as error:
    print(error)
loaded = {name for name in sys.modules if name.startswith(hub.__name__ + ".")}
print(sorted(name.rpartition(".")[2] for name in loaded))
"""


def test_loads_beside_the_installed_package(tmp_path):
    asked = [sys.executable, "-c", "import kernels.load"]  # not here: the checkout has a folder of that name
    if subprocess.run(asked, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("Hugging Face's kernels is not installed")
    subprocess.run([sys.executable, "-m", "fssa_fast.kernels.hub", tmp_path / "hub"], check=True, cwd=tmp_path)
    command = [sys.executable, "-c", PROGRAM, tmp_path / "hub"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "slots: expected values in [0, 2)" in done.stdout and "film" in done.stdout


def test_every_backend_has_what_the_hub_asks_for(tmp_path):
    from fssa_fast.kernels.hub import BACKENDS, write

    write(tmp_path)
    ids = set()
    for backend in BACKENDS:
        folder = tmp_path / "build" / f"torch-{backend}"
        metadata = json.loads((folder / "metadata.json").read_text())
        ids.add(metadata["id"])
        assert metadata["name"] == "fssa-fast" and metadata["backend"] == {"type": backend}
        for path in folder.rglob("*.py"):
            text = path.read_text()
            assert "import fssa_fast" not in text and "from fssa_fast" not in text, path
            assert not re.search(r"ops\.fssa\b|\bfssa::|Library\(.fssa\b", text), path
        assert {"film.py", "lora.py", "context.py"} <= {path.name for path in (folder / "kernels").iterdir()}
    assert len(ids) == len(BACKENDS)
