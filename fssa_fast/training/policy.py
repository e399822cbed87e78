"""Training a policy by NP-DPO, on transformers' Trainer."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from fssa_fast.policy.policy import SteerablePolicy
from fssa_fast.policy.storage import load_adapter
from fssa_fast.training.data import collate
from fssa_fast.training.finite import NamesNaN
from fssa_fast.training.objectives import NPDPOLoss, np_dpo, response_log_probs
from fssa_fast.training.shared import can_share, share_prompts
from fssa_fast.users.embedder import weight_fingerprint


@dataclass
class NPDPOArguments(TrainingArguments):
    """transformers' TrainingArguments and NP-DPO's own.

    beta: of DPO. likelihood_weight: of minus the chosen answer's log-likelihood a token.
    film_learning_rate_ratio: the modulator's FiLM columns learn at this share of the learning rate: FiLM multiplies
        through all blocks, and the adapters' step is too large for it.
    chunk: response tokens whose logits exist at one time.
    """

    beta: float = 0.1
    likelihood_weight: float = 1.0
    film_learning_rate_ratio: float = 0.05
    chunk: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        self.remove_unused_columns = False  # the batch is made for the steering, not for the model's forward


def policy_log_probs(
    policy: SteerablePolicy, batch: dict[str, Any], rows: Tensor | None, slots: Tensor | None, chunk: int = 256
) -> Tensor:
    """Log-probability [B] of each row's response; rows and slots as for `SteerablePolicy.hidden`, None: the base.

    Rows 2i and 2i + 1 that begin with one prompt, for one user, are computed together where that saves work.
    """
    ids, start, end = batch["input_ids"], batch["response_start"], batch["response_end"]
    shared = None
    if slots is not None and torch.equal(slots[0::2], slots[1::2]) and can_share(policy.model, ids.shape[1]):
        shared = share_prompts(ids, start, end, policy.model.dtype)
    if shared is None or slots is None:
        hidden = policy.hidden(ids, batch["attention_mask"], rows=rows, slots=slots)
    else:
        together = policy.hidden(
            shared.input_ids, shared.attention_mask, rows=rows, slots=slots[0::2], position_ids=shared.position_ids
        )
        hidden = shared.apart(together)
    return response_log_probs(hidden, policy.logits, ids, start, end, chunk=chunk)


class ReferenceCache:
    """The base model's log-probability of each answer, computed once: from the same weights, with the users off.

    path: a file of JSON lines that keeps them for later runs, of this base model or of others; None keeps them in
        memory only. Several processes may write to it; a line that a killed run left unfinished is not used.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self._known: dict[str, float] = {}
        self._path, self._base = None if path is None else Path(path), ""
        if self._path is not None and self._path.exists():
            for line in self._path.read_bytes().splitlines():
                try:
                    key, value = json.loads(line)
                    self._known[str(key)] = float(value)
                except (ValueError, TypeError):
                    continue

    def _key(self, policy: SteerablePolicy, text: str) -> str:
        if not self._base:
            self._base = f"{weight_fingerprint(policy.model)} {policy.model.dtype}"
        return hashlib.sha256(f"{self._base}\x00{text}".encode()).hexdigest()

    def _keep(self, key: str, value: float) -> None:
        self._known[key] = value
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # A new line first, too: the line before may be unfinished.
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"\n{json.dumps([key, value])}\n")

    @torch.no_grad()
    def log_probs(self, policy: SteerablePolicy, batch: dict[str, Any], chunk: int = 256) -> Tensor:
        """[B]; runs the base model, in evaluation mode, on the rows not seen before.

        Each row by itself, without padding: a resumed run, whose batches meet other rows first, gets the same numbers.
        """
        keys = [self._key(policy, key) for key in batch["keys"]]
        training = policy.model.training
        policy.model.eval()
        try:
            for i, key in enumerate(keys):
                if key not in self._known:
                    length = int(batch["response_end"][i])
                    row = {name: batch[name][i : i + 1] for name in ("response_start", "response_end")}
                    row |= {name: batch[name][i : i + 1, :length] for name in ("input_ids", "attention_mask")}
                    self._keep(key, float(policy_log_probs(policy, row, None, None, chunk)))
        finally:
            policy.model.train(training)
        return torch.tensor([self._known[key] for key in keys], device=batch["input_ids"].device)


class Objective(nn.Module):
    """A policy and its loss as one module, whose forward is a training step's: what several processes share."""

    def __init__(self, policy: SteerablePolicy, reference: ReferenceCache, args: NPDPOArguments) -> None:
        super().__init__()
        self.policy, self.reference, self.args = policy, reference, args

    def forward(self, batch: dict[str, Any]) -> NPDPOLoss:
        """The loss of a batch."""
        return np_dpo_loss(self.policy, batch, self.reference, self.args)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As the policy's."""
        self.policy.gradient_checkpointing_enable(*args, **kwargs)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As the policy's."""
        self.policy.activation_checkpointing_enable(*args, **kwargs)


class NPDPOTrainer(NamesNaN, Trainer):
    """Trains encoder, modulator and adapters of a policy; the base model stays as it is and is its own reference.

    Checkpoints hold the adapter only, as `SteerablePolicy.save_pretrained` writes it. With several processes every
    example must have as many targets, as those of `PreferenceData` have: then they compute what one would.

    Evaluation, where there is an eval_dataset, gives eval_loss, and eval_accuracy: how often the implicit reward
    prefers the answer that was chosen.

    reference: the base model's log-probabilities; None keeps them in memory.
    """

    args: NPDPOArguments

    def __init__(
        self,
        policy: SteerablePolicy,
        args: NPDPOArguments,
        train_dataset: Any,
        *,
        reference: ReferenceCache | None = None,
        **options: Any,
    ) -> None:
        if policy.tokenizer is None:
            raise ValueError("policy: expected one with a tokenizer, got one without")
        pad = policy.tokenizer.pad_token_id
        options.setdefault("data_collator", partial(collate, pad=policy.tokenizer.eos_token_id if pad is None else pad))
        objective = Objective(policy, reference or ReferenceCache(), args)
        super().__init__(model=objective, args=args, train_dataset=train_dataset, **options)
        self.model_accepts_loss_kwargs = False  # the loss is a mean: accumulation has to divide it
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._held_out: list[Tensor] = []  # of an evaluation under way: which pairs were predicted rightly

    @property
    def policy(self) -> SteerablePolicy:
        """The policy in training."""
        return self.accelerator.unwrap_model(self.model).policy

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        out = model(inputs)
        if not model.training:
            self._held_out.append((out.margin > 0).to(out.margin).flatten())
            return (out.loss, {"margin": out.margin}) if return_outputs else out.loss
        self._note(accuracy=out.accuracy, margin=out.margin.mean(), likelihood=out.likelihood)
        return (out.loss, {"margin": out.margin}) if return_outputs else out.loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():  # transformers' own calls a model that takes a batch's parts as arguments
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        self._held_out = []
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        right = self.accelerator.gather(torch.cat(self._held_out))
        accuracy = {f"{metric_key_prefix}_accuracy": round(float(right.mean()), 4)}
        self.log(accuracy)
        return {**metrics, **accuracy}

    def _note(self, **values: Tensor | None) -> None:
        self._count += 1
        for name, value in values.items():
            if value is not None:
                self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value.detach()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._count:
            for name, total in self._sums.items():
                logs[name] = round(float(self.accelerator.gather(total.reshape(1)).mean()) / self._count, 4)
            self._sums, self._count = {}, 0
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.optimizer is not None:  # made before, its steps scaled already
            return super().create_optimizer(*args, **kwargs)
        optimizer = super().create_optimizer(*args, **kwargs)
        policy = self.policy
        ratio = torch.ones(policy.layout.modulated)
        for site in policy.layout.films:
            ratio[site.scale] = ratio[site.shift] = self.args.film_learning_rate_ratio
        for parameter in (policy.modulator.weight, policy.modulator.bias):
            scale_steps(optimizer, parameter, ratio.to(parameter.device))
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:  # transformers calls this in every process
            self.policy.save_pretrained(str(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter(self.policy, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def np_dpo_loss(
    policy: SteerablePolicy, batch: dict[str, Any], reference: ReferenceCache, args: NPDPOArguments
) -> NPDPOLoss:
    """NP-DPO of a collated batch: contexts to latents to rows, and the answers' log-probabilities under them."""
    noise = None
    if policy.encoder.sampled:
        noise = torch.randn(len(batch["offsets"]) - 1, policy.encoder.latent_width, device=batch["pairs"].device)
    latents = policy.encoder.latents(batch["pairs"], batch["choices"], batch["offsets"], noise)
    ours = policy_log_probs(policy, batch, policy.rows(latents), batch["slots"], args.chunk)
    base = reference.log_probs(policy, batch, args.chunk)
    tokens = (batch["response_end"] - batch["response_start"]).view(-1, 2)[:, 0]
    return np_dpo(
        ours.view(-1, 2),
        base.view(-1, 2).to(ours),
        beta=args.beta,
        likelihood_weight=args.likelihood_weight,
        chosen_tokens=tokens,
    )


def scale_steps(optimizer: torch.optim.Optimizer, parameter: Tensor, ratio: Tensor) -> None:
    """Scales every step of `parameter` by `ratio`, one number a row: a learning rate for each row.

    Adam's steps do not depend on the scale of the gradient, and rows of one tensor cannot be in different groups.
    """
    before: dict[str, Tensor] = {}
    ratio = ratio.view(-1, *[1] * (parameter.dim() - 1))

    def remember(*_: Any) -> None:
        before["value"] = parameter.detach().clone()

    def scale(*_: Any) -> None:
        with torch.no_grad():
            parameter.copy_(before["value"].lerp(parameter, ratio.expand_as(parameter)))

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(scale)
