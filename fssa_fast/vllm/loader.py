"""The load format `fssa`: loads a base model as vLLM does, and steers it by a saved policy."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from fssa_fast import __version__
from fssa_fast.policy.storage import CONFIG_NAME
from fssa_fast.steering.sites import LoraSite
from fssa_fast.users.embedder import fingerprint_of_rows, fingerprinted_rows, same_fingerprint
from fssa_fast.vllm.options import Options, base_load_config, read_options
from fssa_fast.vllm.places import cut, describe, find
from fssa_fast.vllm.refusals import refuse
from fssa_fast.vllm.rows import Columns, WorkerRows
from fssa_fast.vllm.runners import prepare_inputs, serve_by_state
from fssa_fast.vllm.saved import PolicyFiles, read_policy
from fssa_fast.vllm.seams import check_seams, seam, wrap
from fssa_fast.vllm.steering import LoraChild, steer_block, steer_linear

logger = logging.getLogger("fssa_fast")

TESTED = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM")


class FssaLoader(BaseModelLoader):
    """Loads with the format that the options name, then attaches the policy; a draft model is left as it is."""

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        options = read_options(load_config)
        assert options is not None  # registered under that format alone
        check_seams()
        wrap(seam("old_runner"), "_prepare_inputs", prepare_inputs)
        self.options = options
        self.base = get_model_loader(base_load_config(load_config, options))

    def download_model(self, model_config: Any) -> None:
        self.base.download_model(model_config)

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        self.base.load_weights(model, model_config)

    def load_model(self, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> nn.Module:
        model = self.base.load_model(vllm_config, model_config, *args, **kwargs)
        if model_config is vllm_config.model_config:
            refuse(vllm_config)
            steer_model(model, vllm_config, self.options)
        return model


@torch.no_grad()
def steer_model(model: Any, vllm_config: Any, options: Options) -> None:
    """Attaches a policy to this worker's part of a model.

    Raises ValueError for a policy of another base model, or an architecture with blocks or linears that cannot be
    steered here; CheckpointError, ConfigError for a damaged policy.
    """
    policy = read_policy(options.policy, vllm_config.model_config)
    layout, tensors = policy.layout, policy.tensors
    _check_weights(model, policy)
    modules = {name: module for name, module in model.named_modules() if type(module).__name__ != "PPMissingLayer"}
    dtype, device = vllm_config.model_config.dtype, vllm_config.device_config.device
    device = next(model.parameters()).device if device is None else torch.device(device)
    columns = Columns(*policy.modulator())

    blocks = []
    for film in layout.films:
        place = find(film.path, modules, {})
        if place is not None:
            scale, shift = (columns.add(part, part.stop - part.start) for part in (film.scale, film.shift))
            blocks.append((modules[place.path], slice(scale.start, shift.stop)))
    linears = []
    for path, adapters in _by_linear(layout.loras, tensors, modules, model).items():
        linear = modules[path]
        shards = describe(linear)
        parts = [cut(a, site.scaling * b, shards, segments) for site, a, b, segments in adapters]
        sites = [site for site, *_ in adapters]
        gammas = [columns.add(site.gamma, site.rank) for site in sites]
        beta = None
        if shards.adds_shift and any(site.beta is not None for site in sites):
            betas = [
                columns.add_zeros(site.rank) if site.beta is None else columns.add(site.beta, site.rank)
                for site in sites
            ]
            beta = slice(betas[0].start, betas[-1].stop)
        a, b = (torch.cat(part).to(device, dtype).contiguous() for part in zip(*parts, strict=True))
        linears.append((linear, a, b, slice(gammas[0].start, gammas[-1].stop), beta))

    scheduler = vllm_config.scheduler_config
    rows = WorkerRows(
        *columns.gathered(),
        requests=scheduler.max_num_seqs,
        tokens=max(scheduler.max_num_batched_tokens, vllm_config.compilation_config.max_cudagraph_capture_size or 0),
        dtype=dtype,
        device=device,
    )
    for block, where in blocks:
        steer_block(block, rows, where)
    for linear, a, b, gamma, beta in linears:
        steer_linear(linear, LoraChild(rows, a, b, gamma, beta))
    model.add_module("fssa", rows)
    serve_by_state(model, vllm_config)
    _tell_compiler(vllm_config, Path(options.policy))
    logger.info("steered %d blocks and %d linears of this worker by %s", len(blocks), len(linears), options.policy)


def _check_weights(model: Any, policy: PolicyFiles) -> None:
    """Raises ValueError unless the model has the weights a policy was made for, however they are cut."""
    architecture = type(policy.planned).__name__
    if architecture not in TESTED:
        logger.warning("%s is not among the architectures tested with steering: %s", architecture, ", ".join(TESTED))
    tables = [
        module
        for module in model.modules()
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    ]
    if tables:  # in the first pipeline stage; its forward gathers the rows of all tensor parallel workers
        size = len(policy.planned.get_input_embeddings().weight)
        rows = tables[0](fingerprinted_rows(size).to(next(tables[0].parameters()).device))
        if not same_fingerprint(fingerprint_of_rows(rows), policy.saved.base.fingerprint):
            raise ValueError(
                f"policy: expected one of this base, got one of "
                f"{policy.saved.base.name_or_path or 'an unnamed model'!r}, whose weights are others of the same shapes"
            )


Adapter = tuple[LoraSite, Tensor, Tensor, slice]


def _by_linear(
    sites: tuple[LoraSite, ...], tensors: Mapping[str, Tensor], modules: Mapping[str, Any], model: Any
) -> dict[str, list[Adapter]]:
    """The adapters of every linear that is here: (site, A, B, segments), in float32."""
    packed = getattr(model, "packed_modules_mapping", {})
    found: dict[str, list[Adapter]] = {}
    numbers: dict[str, int] = {}
    missing = []
    for site in sites:
        number = numbers[site.path] = numbers.get(site.path, -1) + 1
        place = find(site.path, modules, packed)
        if place is None:
            if any(name.endswith(_block_of(site.path)) for name in modules):
                missing.append(site.path)
            continue
        if not isinstance(modules[place.path], LinearBase):
            raise ValueError(f"{place.path}: expected a linear, got {type(modules[place.path]).__name__}")
        a, b = (tensors[f"model.{site.path}.fssa.{name}.{number}"].float() for name in "ab")
        found.setdefault(place.path, []).append((site, a, b, place.segments))
    if missing:
        raise ValueError(f"policy: expected projections that {type(model).__name__} of vLLM has, got {missing[0]!r}")
    return found


def _block_of(path: str) -> str:
    """The path of the block that a projection is in."""
    parts = path.split(".")
    number = next(i for i, part in enumerate(parts) if part.isdecimal())
    return ".".join(parts[: number + 1])


def _tell_compiler(vllm_config: Any, folder: Path) -> None:
    """Keeps compiled graphs of one policy's layout from being taken for another's, or for the plain model's."""
    digest = hashlib.blake2b((folder / CONFIG_NAME).read_bytes() + __version__.encode(), digest_size=16).hexdigest()
    if not isinstance(vllm_config.additional_config, dict):
        raise ValueError(f"additional_config: expected an object, got {type(vllm_config.additional_config).__name__}")
    vllm_config.additional_config["fssa"] = digest
