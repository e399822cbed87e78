"""Training reward models on choices, on transformers' Trainer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from fssa_fast.data.choices import ChoiceData, ChoiceExamples, Example, pack_examples
from fssa_fast.nn import BTL, DPL, NPBTL, RewardModel
from fssa_fast.training.finite import NamesNaN
from fssa_fast.training.objectives import Distribution, btl, dpl, np_btl
from fssa_fast.training.scores import model_predictor, score

BOUNDS = ("reference", "neural-process", "variational")


@dataclass
class RewardArguments(TrainingArguments):
    """transformers' TrainingArguments, and what reward models need.

    bound: for sampled latents, where they are drawn from in training and what holds them together.
        "reference": from q(z|context); KL(q(z|context) || q(z|context and targets)).
        "neural-process": from q(z|context and targets); KL(q(z|context and targets) || q(z|context)).
        "variational": from q(z|context); KL(q(z|context) || a standard normal).
    kl_weight: of the divergence, against the likelihood of one target. kl_warmup_ratio: the share of the run in which
        it rises to that from 0. Without a rise latents collapse: nothing is lost by q that does not know users while
        rewards do not use latents yet.
    samples: of each latent.
    embedding_noise: standard deviation, in units of the options' own, of what is added to them in training: it keeps a
        model from learning single options by heart.
    """

    bound: str = "neural-process"
    kl_weight: float = 0.05
    kl_warmup_ratio: float = 0.5
    samples: int = 1
    embedding_noise: float = 0.0

    def __post_init__(self) -> None:
        if self.bound not in BOUNDS:
            raise ValueError(f"bound: expected one of {BOUNDS}, got {self.bound!r}")
        if not 0 <= self.kl_warmup_ratio <= 1:
            raise ValueError(f"kl_warmup_ratio: expected a number in [0, 1], got {self.kl_warmup_ratio}")
        if self.samples < 1 or self.kl_weight < 0 or self.embedding_noise < 0:
            raise ValueError(
                f"samples, kl_weight, embedding_noise: expected >= 1, >= 0 and >= 0, got {self.samples}, "
                f"{self.kl_weight}, {self.embedding_noise}"
            )
        super().__post_init__()
        self.remove_unused_columns = False  # batches are made for reward models, not for a language model


def reward_loss(model: RewardModel, batch: dict[str, Tensor], args: RewardArguments, kl_weight: float) -> Tensor:
    """The loss of a batch as `pack_examples` makes it; every target's chosen option is its first."""
    targets = batch["targets"]
    choices = torch.zeros(targets.shape[:2], dtype=torch.long, device=targets.device)
    if isinstance(model, BTL):
        return btl(model(targets), choices)
    if isinstance(model, DPL):
        return dpl(model(targets), choices)
    assert isinstance(model, NPBTL)
    encoder = model.encoder
    encoded = model.encode(batch["pairs"], batch["choices"], batch["offsets"])
    if not encoder.sampled:
        return np_btl(model.rewards(targets, encoded), choices).loss
    context = encoder.distribution(encoded)
    drawn = context
    if args.bound == "variational":
        target: Distribution = (torch.zeros_like(context[0]), torch.ones_like(context[1]))
    else:
        target = encoder.distribution(model.encode(*with_targets(batch)))
        drawn = target if args.bound == "neural-process" else context
    noise = torch.randn(args.samples, *drawn[0].shape, device=targets.device)
    latents = drawn[0] + drawn[1] * noise
    return np_btl(
        model.rewards(targets, latents),
        choices,
        context=context,
        target=target,
        kl_weight=kl_weight,
        kl="target-context" if args.bound == "neural-process" else "context-target",
    ).loss


def with_targets(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """pairs, choices, offsets of contexts and targets together."""
    users, count = batch["targets"].shape[:2]
    sizes = batch["offsets"].diff()
    contexts = batch["pairs"].split(sizes.tolist())
    pairs = torch.cat([part for both in zip(contexts, batch["targets"], strict=True) for part in both])
    offsets = torch.cat([sizes.new_zeros(1), (sizes + count).cumsum(0)])
    return pairs, torch.zeros(len(pairs), dtype=torch.long, device=pairs.device), offsets


@torch.no_grad()
def scale_first_layers(model: RewardModel, options: Tensor) -> None:
    """Makes the first layers of a fresh model see `options` [n, E] as of mean 0 and of numbers of size 1.

    Layers begin as for such inputs. Embeddings of length 1 have numbers of size 1 / sqrt(E), and a model that begins
    so learns nothing for thousands of steps.
    """
    mean = options.mean(0)
    spread = float((options - mean).square().mean().sqrt())
    if not spread > 0:
        raise ValueError("options: expected different ones, got all the same")
    layers = [(model.target0, mean)]
    if isinstance(model, NPBTL):
        layers.append((model.encoder.inner0, mean.repeat(2)))
    for layer, centre in layers:
        layer.weight.div_(spread)
        layer.bias.sub_(layer.weight @ centre.to(layer.weight))


class Objective(nn.Module):
    """A reward model and its loss as one module, whose forward is a training step's: what several processes share."""

    def __init__(self, reward: RewardModel, args: RewardArguments) -> None:
        super().__init__()
        self.reward, self.args = reward, args

    def forward(self, batch: dict[str, Tensor], kl_weight: float) -> Tensor:
        """The loss of a batch."""
        return reward_loss(self.reward, batch, self.args, kl_weight)


class RewardTrainer(NamesNaN, Trainer):
    """Trains a reward model; a checkpoint of it loads with `RewardModel.from_pretrained`.

    Args:
        model: a reward model. args: how. train_dataset: examples. validation: examples to measure on, held out; where
            there are some, evaluation gives eval_nll and eval_accuracy, over contexts of every length in turn.
    """

    args: RewardArguments

    def __init__(
        self,
        model: RewardModel,
        args: RewardArguments,
        train_dataset: ChoiceExamples,
        *,
        validation: tuple[ChoiceData, list[Example]] | None = None,
        **options: Any,
    ) -> None:
        data = train_dataset.data
        # Of features each has its own, of an embedding's numbers all have one.
        self._spread = data.options.std() if model.features is None else model.features.spread
        self._validation = None if validation is None else (validation[0], vary_contexts(validation[1]))
        super().__init__(
            model=Objective(model, args),
            args=args,
            train_dataset=train_dataset,
            data_collator=partial(pack_examples, data),
            eval_dataset=None if validation is None else validation[1],
            **options,
        )
        self.model_accepts_loss_kwargs = False  # the loss is a mean: accumulation has to divide it

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.args.embedding_noise:
            size = self.args.embedding_noise * self._spread.to(inputs["pairs"])
            inputs = inputs | {n: inputs[n] + size * torch.randn_like(inputs[n]) for n in ("pairs", "targets")}
        warmup = self.args.kl_warmup_ratio * self.state.max_steps
        weight = self.args.kl_weight * (min(1.0, self.state.global_step / warmup) if warmup else 1.0)
        return model(inputs, weight)

    @property
    def reward(self) -> RewardModel:
        """The model in training."""
        return self.accelerator.unwrap_model(self.model).reward

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        if self._validation is None:
            raise ValueError("validation: expected examples to evaluate on, got None")
        scores = score(model_predictor(self.reward, samples=16), *self._validation)
        metrics = {f"{metric_key_prefix}_nll": scores.nll, f"{metric_key_prefix}_accuracy": scores.accuracy}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:  # transformers calls this in every process
            self.reward.save_pretrained(str(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.reward.load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def vary_contexts(examples: list[Example]) -> list[Example]:
    """Each example with a part of its context: none of it, one more, ..., all of it, and none again."""
    found, size = [], 0
    for example in examples:
        size = 0 if size > len(example.context) else size
        found.append(replace(example, context=example.context[:size]))
        size += 1
    return found
