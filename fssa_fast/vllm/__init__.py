"""Steering users inside vLLM, as a plugin: one flag loads a policy, and a request names its user.

    python -m vllm.entrypoints.openai.api_server --model BASE --load-format fssa \\
        --model-loader-extra-config '{"fssa": {"policy": "DIR"}}'

A request carries its user's latent to the workers, so that no worker needs to know a user. Nothing changes in a vLLM
that does not load with the format `fssa`.
"""

from __future__ import annotations

from fssa_fast.vllm.latents import BASE, PRIOR
from fssa_fast.vllm.offline import steered_llm, steered_params

__all__ = ["BASE", "PRIOR", "steered_llm", "steered_params"]
