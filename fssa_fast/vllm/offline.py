"""vLLM in this process, steered, in one line each."""

from __future__ import annotations

from typing import Any

from fssa_fast.vllm.options import FORMAT


def steered_llm(model: str, policy: str, *, users: str | None = None, load_format: str = "auto", **options: Any) -> Any:
    """A `vllm.LLM` that a saved policy steers.

    Args:
        model: the base model, as vLLM takes it. policy: a directory. users: the store; None takes FSSA_USERS.
        load_format: of the base model's own weights. options: vLLM's own.
    """
    from vllm import LLM

    own = {"policy": str(policy), "load_format": load_format} | ({} if users is None else {"users": str(users)})
    extra = {**options.pop("model_loader_extra_config", {}), FORMAT: own}
    return LLM(model, load_format=FORMAT, model_loader_extra_config=extra, **options)


def steered_params(user: str | None = None, *, strength: float | None = None, **options: Any) -> Any:
    """A `vllm.SamplingParams` for a user, BASE or PRIOR (None); options: vLLM's own."""
    from vllm import SamplingParams

    own = {"fssa_user": user, "fssa_strength": strength}
    extra = {**(options.pop("extra_args", None) or {}), **{key: v for key, v in own.items() if v is not None}}
    return SamplingParams(extra_args=extra, **options)
