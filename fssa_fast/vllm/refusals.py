"""What cannot be served together with steering, each with its reason."""

from __future__ import annotations

from typing import Any

SALTED_CONNECTORS = ("OffloadingConnector", "SimpleCPUOffloadConnector", "LMCacheMPConnector", "NixlConnector")
"""Connectors that know a block by vLLM's own hash, or by request; others may hash the tokens alone."""


def refuse(vllm_config: Any) -> None:
    """Raises ValueError for a configuration under which a user could be answered as somebody else."""
    if vllm_config.parallel_config.use_ubatching:
        raise ValueError(
            "dual-batch overlap: expected off, got on; it splits a step's tokens between two threads, and the slots "
            "are those of the whole step"
        )
    transfer = vllm_config.kv_transfer_config
    if transfer is not None and transfer.kv_connector not in SALTED_CONNECTORS:
        raise ValueError(
            f"kv_connector: expected none, or one of {', '.join(SALTED_CONNECTORS)}, got {transfer.kv_connector!r}, "
            "which may know a block by its tokens alone and give one user's to another"
        )
    if vllm_config.model_config.runner_type != "generate":
        raise ValueError(f"runner: expected generate, got {vllm_config.model_config.runner_type!r}")
