"""Where vLLM keeps the projections of a Hugging Face model: merged with others, and cut between workers.

vLLM joins projections of one input (queries, keys and values; gate and up) into one linear, and gives every worker a
part of the outputs (column parallel) or of the inputs (row parallel). `cut` does to adapters what vLLM does to weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Outputs of one projection: `whole` of them over all workers, of which this one holds `here`."""

    whole: int
    here: slice


@dataclass(frozen=True)
class Linear:
    """One worker's part of a linear.

    segments: the outputs, one after the other. inputs: which inputs are here. adds_shift: whether this worker adds what
    does not depend on the inputs: where outputs are summed over workers, one of them does.
    """

    segments: tuple[Segment, ...]
    inputs: slice
    adds_shift: bool


def describe(linear: Any) -> Linear:
    """How a linear of vLLM is merged and cut. Raises ValueError for a kind that is not known here."""
    kinds = [cls.__name__ for cls in type(linear).__mro__]
    size, rank = linear.tp_size, linear.tp_rank
    inputs = slice(0, linear.input_size)

    def part(whole: int, parts: int, number: int) -> Segment:
        return Segment(whole, slice(whole // parts * number, whole // parts * (number + 1)))

    known = "RowParallelLinear", "QKVParallelLinear", "MergedColumnParallelLinear"
    own = next((kind for kind in kinds if kind in (*known, "ColumnParallelLinear", "ReplicatedLinear")), None)
    if own is None or (kinds[0] != own and kinds[0] not in ("MergedReplicatedLinear",)):
        raise ValueError(f"linear: expected one that is column parallel, row parallel or replicated, got {kinds[0]}")
    if own == "RowParallelLinear":
        inputs = part(linear.input_size, size, rank).here
        return Linear((part(linear.output_size, 1, 0),), inputs, rank == 0)
    if own == "QKVParallelLinear":
        heads, copies = linear.total_num_kv_heads, linear.num_kv_head_replicas
        sizes = (
            (linear.total_num_heads * linear.head_size, 1),
            (heads * linear.head_size, copies),
            (heads * linear.v_head_size, copies),
        )
        return Linear(tuple(part(whole, size // n, rank // n) for whole, n in sizes), inputs, True)
    if own == "ReplicatedLinear":
        size, rank = 1, 0
    wholes = getattr(linear, "output_sizes", None) or [linear.output_size]
    return Linear(tuple(part(whole, size, rank) for whole in wholes), inputs, True)


@dataclass(frozen=True)
class Place:
    """Where an adapter of a Hugging Face projection goes: a module of vLLM, and the segments that are its outputs."""

    path: str
    segments: slice


def find(path: str, modules: Mapping[str, Any], packed: Mapping[str, Sequence[str]]) -> Place | None:
    """The place of the projection at a Hugging Face path, or None: in another pipeline stage, or nowhere.

    Args:
        modules: of the vLLM model, by path. packed: its packed_modules_mapping, merged name -> projections.
    """
    parent, _, name = path.rpartition(".")
    for prefix in ("", "language_model."):  # the text model of one that sees, too
        for merged, names in packed.items():
            target = f"{prefix}{parent}.{merged}"
            if name in names and target in modules:
                return Place(target, slice(names.index(name), names.index(name) + 1))
        if prefix + path in modules:
            return Place(prefix + path, slice(0, None))
    return None


def cut(a: Tensor, b: Tensor, linear: Linear, segments: slice) -> tuple[Tensor, Tensor]:
    """One worker's part of an adapter: A [R, its inputs] and B, transposed, [R, all of the linear's outputs here].

    Outputs of other projections merged with it are zeros in B. Raises ValueError where B's outputs are not those of
    the segments.
    """
    mine = linear.segments[segments]
    if sum(segment.whole for segment in mine) != b.shape[1] or linear.inputs.stop > a.shape[1]:
        raise ValueError(
            f"linear: expected one of {b.shape[1]} outputs and {a.shape[1]} inputs, got "
            f"{[segment.whole for segment in mine]} outputs and inputs up to {linear.inputs.stop}"
        )
    parts = iter(b.split([segment.whole for segment in mine], 1))
    first, last, _ = segments.indices(len(linear.segments))
    columns = [
        next(parts)[:, segment.here]
        if first <= number < last
        else b.new_zeros(b.shape[0], segment.here.stop - segment.here.start)
        for number, segment in enumerate(linear.segments)
    ]
    return a[:, linear.inputs], torch.cat(columns, 1)
