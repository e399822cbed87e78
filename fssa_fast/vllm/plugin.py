"""The entry point of the group `vllm.general_plugins`: vLLM calls it in the front end, the core and every worker."""

from __future__ import annotations

from fssa_fast.vllm.options import FORMAT


def register() -> None:
    """Registers the load format, and has the front end look for it; called again, does nothing.

    All else is put into vLLM's seams once a vLLM loads with that format.
    """
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader
    from vllm.v1.engine.input_processor import InputProcessor

    from fssa_fast.vllm.requests import start
    from fssa_fast.vllm.seams import wrap

    if FORMAT not in _LOAD_FORMAT_TO_MODEL_LOADER:
        from fssa_fast.vllm.loader import FssaLoader

        register_model_loader(FORMAT)(FssaLoader)
        wrap(InputProcessor, "__init__", start)
