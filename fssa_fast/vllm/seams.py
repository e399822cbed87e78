"""Where the plugin meets vLLM, and how it gets in: each class, and the arguments of its method that it counts on."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

TESTED = ("0.29", "0.32")


@dataclass(frozen=True)
class Seam:
    """A method that the plugin wraps or overrides, and the names of the arguments that it uses."""

    module: str
    cls: str
    method: str
    arguments: tuple[str, ...]


_OPENAI = "vllm.entrypoints.openai"
SEAMS: Mapping[str, Seam] = {
    "loader": Seam(
        "vllm.model_executor.model_loader.base_loader", "BaseModelLoader", "load_model", ("vllm_config", "model_config")
    ),
    "input_processor": Seam("vllm.v1.engine.input_processor", "InputProcessor", "process_inputs", ("prompt", "params")),
    "old_runner": Seam("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "_prepare_inputs", ("scheduler_output",)),
    "state_added": Seam(
        "vllm.v1.worker.gpu.model_states.interface", "ModelState", "add_request", ("req_index", "new_req_data")
    ),
    "state_prepared": Seam(
        "vllm.v1.worker.gpu.model_states.interface", "ModelState", "prepare_inputs", ("input_batch", "req_states")
    ),
    "state_dummy": Seam(
        "vllm.v1.worker.gpu.model_states.interface", "ModelState", "prepare_dummy_inputs", ("num_reqs", "num_tokens")
    ),
    "linear": Seam(
        "vllm.model_executor.layers.linear", "LinearMethodBase", "apply", ("layer", "x", "bias")
    ),
    "chat": Seam(f"{_OPENAI}.chat_completion.protocol", "ChatCompletionRequest", "to_sampling_params", ()),
    "completion": Seam(f"{_OPENAI}.completion.protocol", "CompletionRequest", "to_sampling_params", ()),
    "responses": Seam(f"{_OPENAI}.responses.protocol", "ResponsesRequest", "to_sampling_params", ()),
}


def seam(name: str) -> Any:
    """The class of a seam."""
    where = SEAMS[name]
    return getattr(importlib.import_module(where.module), where.cls)


def request_classes() -> Iterator[Any]:
    """The classes of requests over HTTP."""
    return map(seam, ("chat", "completion", "responses"))


def check_seams() -> None:
    """Raises RuntimeError that names the version of vLLM and the seam that is not as the plugin expects it."""
    for name, where in SEAMS.items():
        found: Any
        try:
            method = getattr(seam(name), where.method)
            found = list(inspect.signature(method).parameters)
            fits = set(where.arguments) <= set(found)
        except (ImportError, AttributeError) as error:
            found, fits = error, False
        if not fits:
            from vllm import __version__

            raise RuntimeError(
                f"vllm: expected {where.module}.{where.cls}.{where.method} with the arguments "
                f"{list(where.arguments)}, got {found}; vLLM {__version__} is too new or too old, tested are "
                f"{' and '.join(TESTED)}"
            )


def wrap(cls: Any, name: str, ours: Callable[..., Any]) -> None:
    """Has `ours(theirs, self, ...)` called in a method's place; called again, does nothing."""
    theirs = getattr(cls, name)
    if getattr(theirs, "fssa", None) is ours:
        return

    @functools.wraps(theirs)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(theirs, self, *args, **kwargs)

    method.fssa = ours  # type: ignore[attr-defined]
    setattr(cls, name, method)
