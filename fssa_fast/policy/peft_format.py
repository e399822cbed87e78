"""Plain LoRA in PEFT's adapter format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from fssa_fast.files import CheckpointError, read_json, write_files
from fssa_fast.policy.policy import SteerablePolicy
from fssa_fast.policy.storage import read_adapter
from fssa_fast.steering.config import LoraConfig
from fssa_fast.steering.sites import LoraSite

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"

# What changes the computation, with the values, beside those that say nothing, that leave plain LoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (),
    "use_rslora": (),
    "use_qalora": (),
    "use_bdlora": (),
    "bias": ("none",),
    "lora_bias": (),
    "modules_to_save": (),
    "rank_pattern": (),
    "alpha_pattern": (),
    "layers_to_transform": (),
    "layer_replication": (),
    "target_parameters": (),
    "trainable_token_indices": (),
    "alora_invocation_tokens": (),
    "arrow_config": (),
    "kasa_config": (),
    "monteclora_config": (),
    "velora_config": (),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),  # others change the base's weights too
}


def plain_adapter(policy: SteerablePolicy) -> int:
    """The place of a policy's one plain adapter in its configuration. Raises ValueError where there is not just one."""
    plain = [i for i, lora in enumerate(policy.steering.loras) if lora.modulation == "none"]
    if len(plain) != 1:
        raise ValueError(f"policy: expected one plain adapter (modulation 'none'), got {len(plain)}")
    return plain[0]


def read_peft_config(directory: str | os.PathLike[str]) -> LoraConfig:
    """The adapter's configuration as ours. Raises CheckpointError for what is not plain LoRA on named projections."""
    path = Path(directory) / CONFIG_NAME
    data = read_json(path)
    if not isinstance(data, dict) or data.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: expected a LoRA adapter of PEFT")
    for key, plain in _PLAIN.items():
        if data.get(key) and data[key] not in plain:
            raise CheckpointError(f"{path}: {key}: expected plain LoRA's, got {data[key]!r}")
    targets, rank, alpha = data.get("target_modules"), data.get("r"), data.get("lora_alpha")
    if not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
        raise CheckpointError(f"{path}: target_modules: expected a list of names, got {targets!r}")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= 1 << 16:
        raise CheckpointError(f"{path}: r: expected a positive integer, got {rank!r}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise CheckpointError(f"{path}: lora_alpha: expected a number, got {alpha!r}")
    return LoraConfig(tuple(sorted(targets)), rank, float(alpha), "none")


def load_peft(policy: SteerablePolicy, directory: str | os.PathLike[str]) -> None:
    """Fills the policy's plain adapter from PEFT's files. Raises CheckpointError, changing nothing, if they differ."""
    number = plain_adapter(policy)
    have, found = policy.steering.loras[number], read_peft_config(directory)
    if (have.rank, have.alpha) != (found.rank, found.alpha):
        raise CheckpointError(
            f"{directory}: expected rank {have.rank} and alpha {have.alpha}, as the policy's plain adapter has, "
            f"got {found.rank} and {found.alpha}"
        )
    places = {_peft_name(site, matrix): t for site, *ab in policy.attachment.adapter(number)
              for matrix, t in zip("AB", ab, strict=True)}  # fmt: skip
    expected = {name: (t.T if name.endswith("lora_B.weight") else t).to("meta") for name, t in places.items()}
    tensors = read_adapter(Path(directory) / WEIGHTS_NAME, expected)
    with torch.no_grad():
        for name, tensor in tensors.items():
            places[name].copy_(tensor.T if name.endswith("lora_B.weight") else tensor)


def save_peft(policy: SteerablePolicy, directory: str | os.PathLike[str]) -> None:
    """Writes the policy's plain adapter as PEFT's `PeftModel.from_pretrained` reads it."""
    lora = policy.steering.loras[plain_adapter(policy)]
    tensors: dict[str, torch.Tensor] = {}
    for site, a, b in policy.attachment.adapter(plain_adapter(policy)):
        tensors[_peft_name(site, "A")] = a
        tensors[_peft_name(site, "B")] = b.T
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(policy.model.config.name_or_path),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": _transposed(policy),
        "inference_mode": True,
    }
    folder = Path(directory)
    write_files(folder / CONFIG_NAME, config, folder / WEIGHTS_NAME, tensors)


def _peft_name(site: LoraSite, matrix: str) -> str:
    return f"base_model.model.{site.path}.lora_{matrix}.weight"


def _transposed(policy: SteerablePolicy) -> bool:
    # PEFT has to be told of projections that hold their weight as [inputs, outputs].
    sites = policy.attachment.adapter(plain_adapter(policy))
    return any(isinstance(policy.model.get_submodule(site.path), Conv1D) for site, _, _ in sites)
