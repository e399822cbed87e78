"""Fitting a reward model in a run directory: what `fssa train reward` and the reproductions do."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PrinterCallback

from fssa_fast.data.choices import ChoiceData, ChoiceExamples, held_out_examples
from fssa_fast.nn import BTL, DPL, NPBTL, EncoderConfig, RewardModel
from fssa_fast.records import environment
from fssa_fast.training.reward import RewardArguments, RewardTrainer, scale_first_layers
from fssa_fast.training.runs import last_checkpoint, write_run


@dataclass(frozen=True)
class RewardConfig:
    """A reward model: its kind, its widths and, for np-btl, its context encoder as `NPBTL` has it."""

    kind: Literal["np-btl", "btl", "dpl"] = "np-btl"
    latent_width: int = EncoderConfig.latent_width
    inner: Literal["linear", "mlp"] = EncoderConfig.inner
    pooling: Literal["self-attention", "mean", "sum"] = EncoderConfig.pooling
    heads: int = EncoderConfig.heads
    dropout: float = EncoderConfig.dropout
    sampled: bool = EncoderConfig.sampled

    def build(self, embedding_width: int) -> RewardModel:
        """A fresh model."""
        if self.kind != "np-btl":
            return (BTL if self.kind == "btl" else DPL)(embedding_width, self.latent_width)
        options = {k: v for k, v in asdict(self).items() if k not in ("kind", "latent_width")}
        return NPBTL(embedding_width, self.latent_width, **options)


@dataclass(frozen=True)
class ExamplesConfig:
    """The examples drawn for training: contexts of 0 to max_context choices, and `targets` to predict."""

    max_context: int = 10
    targets: int = 8


DEFAULTS: Mapping[str, Any] = {
    "max_steps": 1000,
    "per_device_train_batch_size": 64,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 50,
    "weight_decay": 0.0,
    "logging_steps": 100,
    "report_to": "none",
    "save_strategy": "no",
    "dataloader_pin_memory": False,
}


def fit_reward(
    config: RewardConfig,
    train: ChoiceData,
    validation: ChoiceData | None,
    directory: str | os.PathLike[str],
    *,
    training: Mapping[str, Any] | None = None,
    examples: ExamplesConfig | None = None,
    seed: int = 0,
    resume: bool = False,
    features: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> RewardModel:
    """Trains a reward model and leaves it, in evaluation mode, in `directory`, with run.json beside it.

    Args:
        config: what. training: `RewardArguments` by name, over `DEFAULTS`; with eval_steps and a validation part, the
            weights kept are those of the evaluation with the lowest eval_nll; with
            disable_tqdm nothing is printed.
        examples: how examples are drawn. seed: of weights, examples and noise.
        resume: goes on from the directory's last whole checkpoint, where there is one.
        features: whether options are features, each on a scale of its own, not embeddings: they are standardized by
            the training users', and the statistics saved with the model.
        provenance: what else run.json should say.
    """
    drawn, settings = examples or ExamplesConfig(), {**DEFAULTS, **(training or {})}
    if validation is not None and "eval_steps" in settings:
        every = {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": settings["eval_steps"]}
        best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_nll", "greater_is_better": False}
        settings = {**every, **best, "save_total_limit": 2, **settings}
        settings["save_strategy"] = "steps"
    args = RewardArguments(output_dir=str(directory), seed=seed, **settings)
    torch.manual_seed(seed)
    model = config.build(train.width)
    if features:
        model.standardize(train.used_options())
    else:
        scale_first_layers(model, train.options)
    length = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    data = ChoiceExamples(train, length=length, max_context=drawn.max_context, targets=drawn.targets, seed=seed)
    held = None
    if validation is not None and "eval_steps" in settings:
        repeats = max(1, 200 // len(validation.users))
        held = validation, held_out_examples(validation, max_context=drawn.max_context, repeats=repeats, seed=seed)
    record = {
        "what": "reward",
        "model": asdict(config),
        "examples": asdict(drawn),
        "training": {name: value for name, value in settings.items()},
        "seed": seed,
        "environment": environment(),
        **(provenance or {}),
    }
    write_run(directory, {**record, "status": "running"})
    trainer = RewardTrainer(model, args, data, validation=held)
    if args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    begin = time.perf_counter()
    checkpoint = last_checkpoint(directory) if resume else None
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.perf_counter() - begin
    model.eval().save_pretrained(Path(directory))
    finished = {"status": "finished", "seconds": round(seconds, 1), "steps": trainer.state.global_step}
    write_run(directory, {**record, **finished, "log": trainer.state.log_history})
    return model
