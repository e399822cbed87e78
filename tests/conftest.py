"""What has to be set before the first test: how triton runs, and how many threads."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy
import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton: its kernels run in the interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The tests' tensors are small, and pytest-xdist has a process for every core.
torch.set_num_threads(1)


def product(_builder: Any, a: Any, b: Any, total: Any, *_: Any) -> Any:
    """`tl.dot` in Triton's interpreter, by a sum along K in order, an element like another.

    Its own is numpy's `matmul`: there BLAS chooses a kernel by the machine and the tile's shape, and a row's last bit
    may follow the number of rows.
    """
    from triton.runtime.interpreter import TensorHandle

    factors = [numpy.ascontiguousarray(x.data, dtype=total.data.dtype) for x in (a, b)]
    return TensorHandle(numpy.einsum("mk,kn->mn", *factors) + total.data, total.dtype.scalar)


if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
    from triton.runtime.interpreter import InterpreterBuilder

    InterpreterBuilder.create_dot = product


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves to `make proof` what takes minutes without a GPU: emulations and the interpreter's longest."""
    if os.environ.get("FSSA_PROOF") == "1" or torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("proof") is not None:
            item.add_marker(pytest.mark.skip(reason="long without a GPU: run by make proof, or with FSSA_PROOF=1"))


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    """A PostgreSQL server for the tests of one process; they are skipped where none is installed."""
    from databases import Server

    try:
        server = Server()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    yield server
    server.stop()
