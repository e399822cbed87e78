"""Training a policy in a run directory: what `fssa train policy` does."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, PrinterCallback

from fssa_fast.data.choices import split_users
from fssa_fast.data.files import Choice, Embed, read_choices
from fssa_fast.data.lines import DataError
from fssa_fast.generation.prompts import has_template, told
from fssa_fast.hub import find_folder, load_model, load_tokenizer
from fssa_fast.nn import NPBTL, ContextEncoder, RewardModel, pack_choices
from fssa_fast.policy.policy import SteerablePolicy
from fssa_fast.records import environment, file_hash
from fssa_fast.steering.config import ConfigError, EncoderConfig, SteeringConfig
from fssa_fast.training.data import OpposedData, Preference, PreferenceData
from fssa_fast.training.policy import NPDPOArguments, NPDPOTrainer, ReferenceCache
from fssa_fast.training.runs import last_checkpoint, write_run
from fssa_fast.training.samples import SAMPLES_NAME, SampleAnswers

if TYPE_CHECKING:
    from fssa_fast.training.config import DataConfig, PolicyRun

EVALUATED = 64  # examples drawn once of the validation users, the same at every evaluation

DEFAULTS: Mapping[str, Any] = {
    "max_steps": 200,
    "per_device_train_batch_size": 4,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "logging_steps": 10,
    "save_steps": 50,
    "save_total_limit": 2,
    "report_to": "none",
    "dataloader_pin_memory": False,
}


def read_preferences(config: DataConfig, embed: Embed, *, chat: bool = False) -> list[dict[str, list[Preference]]]:
    """The choices of training, validation and test users, embedded; choices must be between texts.

    A prompt that is a JSON list is a chat; others are told as one where `chat`. Raises DataError, naming file and line.
    """
    choices = read_choices(config.path)
    for choice in choices:
        if not isinstance(choice.chosen, str):
            raise DataError(f"{config.path}, line {choice.line}: expected texts, for a policy, got features")
    by_user: dict[str, list[Choice]] = {}
    for choice in choices:
        by_user.setdefault(choice.user, []).append(choice)
    names = sorted(by_user)
    parts = split_users(len(names), config.split_seed, config.shares)
    return [preferences({names[i]: by_user[names[i]] for i in part}, embed, chat=chat) for part in parts]


def preferences(
    users: Mapping[str, Sequence[Choice]], embed: Embed, *, chat: bool | None = False
) -> dict[str, list[Preference]]:
    """Users' choices between texts, as the trainer takes them; without a group, a prompt is one.

    chat: whether a prompt that is a text is told as a user's message, as of `SteerablePolicy`.
    """
    found = {}
    for user, own in users.items():
        texts = [(choice.prompt, str(option)) for choice in own for option in (choice.chosen, choice.rejected)]
        pairs = embed(texts).view(len(own), 2, -1)
        found[user] = [
            Preference(
                told(_prompt(c.prompt), chat),
                str(c.chosen),
                str(c.rejected),
                c.prompt if c.group is None else c.group,
                pair,
            )
            for c, pair in zip(own, pairs, strict=True)
        ]
    return found


def _prompt(text: str) -> Any:
    if text.startswith("[{"):
        try:
            return json.loads(text)
        except ValueError:
            pass
    return text


def some_contexts(
    users: Mapping[str, Sequence[Preference]], *, count: int = 5, number: int = 256, seed: int = 0
) -> list[Tensor]:
    """About `number` contexts [K, 2, E] of `count` choices each, as many of every user."""
    draw = torch.Generator().manual_seed(seed)
    contexts = []
    for own in (users[name] for name in sorted(users)):
        for _ in range(max(1, number // len(users))):
            picked = torch.randperm(len(own), generator=draw)[:count].tolist()
            contexts.append(torch.stack([own[i].pair for i in picked]))
    return contexts


@torch.no_grad()
def standardize_latents(encoder: ContextEncoder, contexts: Sequence[Tensor]) -> None:
    """Shifts and scales the latents, in the encoder's last Linear, to mean 0 and mean square 1 over contexts
    [K, 2, E] whose chosen options come first: the size that a policy's fresh modulator expects."""
    latents = encoder.latents(*pack_choices(contexts, [torch.zeros(len(c), dtype=torch.long) for c in contexts]))
    mean = latents.mean(0)
    scale = (latents - mean).square().mean().sqrt()
    width = encoder.latent_width  # a sampled latent's deviation scales with it, but goes through softplus: left alone
    encoder.outer1.bias[:width].sub_(mean).div_(scale)
    encoder.outer1.weight[:width].div_(scale)


def fit_policy(config: PolicyRun, *, resume: bool = False, quiet: bool = False) -> SteerablePolicy:
    """Trains a policy as configured; it, its checkpoints and run.json are in the output directory afterwards.

    Args:
        resume: goes on from the last whole checkpoint, where there is one. quiet: prints nothing.
    """
    from transformers import AutoModelForCausalLM

    if config.examples.opposed and config.examples.targets != 1:
        raise ConfigError(f"examples.targets: expected 1 for opposed examples, got {config.examples.targets}")
    embedder = config.data.load_embedder()
    if embedder is None:
        raise ConfigError("data.embedder: expected the path of a text encoder, got none")
    folder = find_folder("base", config.base, ask_hub=True)
    tokenizer = load_tokenizer(folder)
    chat = has_template(tokenizer) if config.chat == "auto" else config.chat
    train, validation, _ = read_preferences(config.data, embedder.encode, chat=chat)
    encoder = None
    if config.reward is not None:
        reward = RewardModel.from_pretrained(config.reward)
        if not isinstance(reward, NPBTL):
            raise ConfigError(f"reward: expected an np-btl model, got {reward.kind} in {config.reward}")
        if reward.features is not None:
            raise ConfigError(f"reward: expected one that was trained on texts, got one on features in {config.reward}")
        encoder = reward.encoder
    steering = SteeringConfig(
        EncoderConfig(embedder.width, config.latent_width)
        if encoder is None
        else EncoderConfig(**encoder.config),  # type: ignore[arg-type]
        config.film,
        config.loras,
    )
    torch.manual_seed(config.seed)
    base = load_model(AutoModelForCausalLM, folder, dtype=getattr(torch, config.dtype))
    policy = SteerablePolicy(
        base,
        steering,
        tokenizer=tokenizer,
        embedder=embedder,
        chat=chat,
        modulation_std=config.modulation_std,
        modulation_mean=config.modulation_mean,
    )
    if encoder is not None:
        policy.encoder.load_state_dict(encoder.state_dict())
        standardize_latents(policy.encoder, some_contexts(train, seed=config.seed))
        policy.encoder.requires_grad_(False)
    drawn = config.examples
    settings = {**DEFAULTS, "disable_tqdm": quiet}
    if validation:  # the weights kept are those of the lowest loss on users not trained on
        settings |= {"eval_strategy": "steps", "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
        settings |= {"greater_is_better": False, "per_device_eval_batch_size": 4}
    elif config.patience is not None:
        raise ConfigError("patience: expected None, since data.shares leaves no validation users")
    settings |= config.training
    if validation:
        settings.setdefault("eval_steps", settings["save_steps"])  # what is evaluated can be kept
    if drawn.opposed:  # the two sides of a pair stay in one batch; the order is drawn by the examples
        settings = {"train_sampling_strategy": "sequential", **settings}
    args = NPDPOArguments(output_dir=config.output, seed=config.seed, **settings)
    length = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    options: dict[str, Any] = {name: value for name, value in asdict(drawn).items() if name != "opposed"}
    if drawn.opposed:
        del options["targets"]  # one
    kind = OpposedData if drawn.opposed else PreferenceData
    data = kind(train, policy.tokenizer, length=length, seed=config.seed, **options)
    held_out = PreferenceData(
        validation, policy.tokenizer, length=EVALUATED, max_context=drawn.max_context, targets=1,
        max_tokens=drawn.max_tokens, seed=config.seed,
    ) if validation else None  # fmt: skip
    record = {
        "what": "policy",
        "config": asdict(config),
        "data": {"path": config.data.path, "sha256": file_hash(config.data.path), "training users": sorted(train),
                 "validation users": sorted(validation)},
        "chat": chat,
        "training": settings,
        "environment": environment(),
    }
    reference = ReferenceCache(Path(config.output) / "reference.jsonl")
    trainer = NPDPOTrainer(policy, args, data, reference=reference, eval_dataset=held_out)
    if config.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(config.patience))
    if validation and config.samples:
        path = Path(config.output) / SAMPLES_NAME
        trainer.add_callback(SampleAnswers(policy, validation, config.samples, path, drawn.max_tokens, quiet))
    if quiet:
        trainer.remove_callback(PrinterCallback)
    main = trainer.is_world_process_zero()
    if main:
        write_run(config.output, {**record, "status": "running"})
    checkpoint = last_checkpoint(config.output) if resume else None
    begin = time.perf_counter()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    policy.users.refresh()
    if main:
        policy.save_pretrained(config.output)
        finished: dict[str, Any] = {"status": "finished", "seconds": round(time.perf_counter() - begin, 1)}
        if trainer.state.best_model_checkpoint is not None:
            finished["kept"] = {"step": trainer.state.best_global_step, "eval_loss": trainer.state.best_metric}
        log = trainer.state.log_history
        write_run(config.output, {**record, **finished, "steps": trainer.state.global_step, "log": log})
    return policy
