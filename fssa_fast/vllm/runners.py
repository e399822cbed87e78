"""Before every step: a row for each new request, and the slot of every token, on both of vLLM's model runners."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from fssa_fast.vllm.latents import KEY
from fssa_fast.vllm.rows import WorkerRows


def steering_of(params: Any) -> str | None:
    """The text of a request's steering; None is the base model, as of requests that vLLM makes to warm up."""
    return ((params.extra_args or {}) if params is not None else {}).get(KEY)


class RequestSlots:
    """Slots of the requests in a batch, by name: for the runner that names its requests at every step."""

    def __init__(self, rows: WorkerRows) -> None:
        self._rows = rows
        self._free = list(range(len(rows.rows) - 1, 0, -1))
        self._held: dict[str, tuple[int, str]] = {}

    def update(self, batch: dict[str, tuple[str | None, int]]) -> None:
        """Points every token at its request's row.

        batch: of every request, in order: the text of its steering, and how many tokens it has in this step.
        """
        for name in [name for name, (_, text) in self._held.items() if name not in batch or batch[name][0] != text]:
            self._free.append(self._held.pop(name)[0])
        slots = []
        for name, (text, _) in batch.items():
            if text is None:
                slots.append(0)
                continue
            if name not in self._held:
                slot = self._free.pop()
                self._rows.fill(slot, text)
                self._held[name] = slot, text
            slots.append(self._held[name][0])
        tokens = np.zeros(len(self._rows.slots), np.int32)  # beyond the last token: the base
        spread = np.repeat(np.array(slots, np.int32), [count for _, count in batch.values()])
        tokens[: len(spread)] = spread
        self._rows.slots.copy_(torch.from_numpy(tokens))


def prepare_inputs(theirs: Callable[..., Any], runner: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
    """`GPUModelRunner._prepare_inputs`: then, the slots of the step."""
    prepared = theirs(runner, scheduler_output, *args, **kwargs)
    rows = getattr(runner.get_model(), KEY, None)
    if isinstance(rows, WorkerRows):
        slots = runner.__dict__.setdefault("fssa_slots", None) or RequestSlots(rows)
        runner.fssa_slots = slots
        counts = scheduler_output.num_scheduled_tokens
        names = runner.input_batch.req_ids
        slots.update({name: (steering_of(runner.requests[name].sampling_params), counts[name]) for name in names})
    return prepared


def serve_by_state(model: nn.Module, vllm_config: Any) -> None:
    """Has the second model runner keep this model's rows, through the state that a model may bring."""
    from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

    def steered() -> type:
        del model.get_model_state_cls  # the model's own answer, or vLLM's
        try:
            return steered_state(resolve_model_state_cls(vllm_config, model))
        finally:
            model.get_model_state_cls = steered  # type: ignore[assignment]

    model.get_model_state_cls = steered  # type: ignore[assignment]


def steered_state(theirs: Any) -> type:
    """A model state that keeps the rows: of class `theirs`, with a row for every request of the runner's table."""

    class SteeredState(theirs):
        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            self.model.fssa.fill(req_index + 1, steering_of(new_req_data.sampling_params))

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
            count = input_batch.num_reqs
            self.model.fssa.point(input_batch.query_start_loc[: count + 1], input_batch.idx_mapping[:count])
            return super().prepare_inputs(input_batch, req_states)

        def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> Any:
            self.model.fssa.slots.zero_()
            return super().prepare_dummy_inputs(num_reqs, num_tokens)

    return SteeredState
