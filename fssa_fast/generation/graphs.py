"""Work on a GPU, captured once as a CUDA graph and replayed: one launch from the host instead of hundreds."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

SIZES = (1, 2, 4, *range(8, 64, 8), *range(64, 257, 16))
"""Numbers of rows that are captured; a step of fewer rows is filled up with rows that are nobody's."""


def padded(rows: int) -> int:
    """The smallest of SIZES that holds so many rows."""
    return next(size for size in SIZES if size >= rows)


class CudaGraphs:
    """Captures work on one device; the graphs share one pool of memory, and so run one after the other only."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._captured: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def capture(self, work: Callable[[], T]) -> Callable[[], T]:
        """What does the same work again, on the same memory, and returns what `work` returned when it was captured.

        work: waits for nothing and reads nothing from the GPU; it is called twice, first to compile what it launches.
        """
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)
        if not self._captured:  # a pool ends with the last graph in it
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on allocating memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = work()
        self._captured.add(graph)

        def replay() -> T:
            graph.replay()
            return result

        return replay
