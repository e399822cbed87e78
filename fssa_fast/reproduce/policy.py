"""NP-DPO on conflicting pairs: one policy, two criteria, told apart by a user's choices alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fssa_fast.data.choices import ChoiceData
from fssa_fast.data.lines import json_lines
from fssa_fast.data.people import helpful_harmless
from fssa_fast.evaluation.policies import HeldOut, each_held_out, implicit_margins
from fssa_fast.evaluation.tables import Cell, Table
from fssa_fast.hub import load_model, load_tokenizer
from fssa_fast.nn import NPBTL
from fssa_fast.policy import SteerablePolicy
from fssa_fast.reproduce.people import TASKS
from fssa_fast.steering import EncoderConfig, LoraConfig, SteeringConfig
from fssa_fast.training.data import OpposedData, Preference
from fssa_fast.training.fit import ExamplesConfig, RewardConfig, fit_reward
from fssa_fast.training.fit_policy import some_contexts, standardize_latents
from fssa_fast.training.policy import NPDPOArguments, NPDPOTrainer, ReferenceCache
from fssa_fast.training.runs import last_checkpoint
from fssa_fast.training.scores import Floats, interval

COUNTS = (0, 1, 3, 5, 10)
MAX_TOKENS = 192
# Of the modulations, after training. By its end a user's answer is 6 nats further from the other, but every answer has
# lost about 0.3 nats a token, whoever asks, and the longer of two loses by as much. What is gained grows as the
# strength, what is lost as its square.
STRENGTH = 0.5
TRAINING: dict[str, Any] = {
    "max_steps": 160,
    "per_device_train_batch_size": 8,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 15,
    "logging_steps": 10,
    "save_steps": 50,
    "save_total_limit": 2,
    "beta": 0.1,
    "likelihood_weight": 0.0,
    "train_sampling_strategy": "sequential",  # opposite sides stay in one batch; the order is drawn by the examples
}


def conflicting(part: ChoiceData, lines: Sequence[dict[str, Any]], tokens: Any) -> dict[str, list[Preference]]:
    """Each criterion's choices between texts, of the pairs on which both criteria have one, and of which prompt and
    answers are short enough."""
    pairs = [{tuple(sorted(pair)) for pair in own.tolist()} for own in part.choices]
    both = pairs[0] & pairs[1]
    found: dict[str, list[Preference]] = {}
    for user, own in zip(part.users, part.choices, strict=True):
        found[user] = []
        for chosen, rejected in own.tolist():
            line = lines[chosen // 2]
            prompt = line["prompt"] + "\n\nAssistant: "
            answers = (line["response_a"], line["response_b"])
            longest = len(tokens(prompt)["input_ids"]) + max(len(tokens(a)["input_ids"]) for a in answers)
            if tuple(sorted((chosen, rejected))) not in both or longest > MAX_TOKENS - 1 or not all(answers):
                continue
            found[user].append(
                Preference(
                    prompt,
                    answers[chosen % 2],
                    answers[rejected % 2],
                    line["prompt"],
                    part.options[[chosen, rejected]],
                )
            )
    return found


def reproduce(
    *,
    base: str | os.PathLike[str],
    data: str | os.PathLike[str],
    seeds: Sequence[int],
    runs: str | os.PathLike[str] | None = None,
    steps: int | None = None,
) -> dict[str, Any]:
    """Trains a policy with every seed, which also draws the split of prompts; measures implicit rewards on prompts held
    out.

    Args:
        base: the base model's directory. data: that of the relabelled pairs.
        runs: where run directories go, and are gone on from; None keeps none. steps: of training the policy.
    """
    lines = [line for _, line in json_lines(Path(data) / "pairs.jsonl")]
    shares: dict[str, dict[int, list[Floats]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in seeds:
            folder = Path(runs or scratch) / f"policy-{seed}"
            for user, by_count in _one(Path(base), Path(data), lines, folder, seed, steps).items():
                for count, values in by_count.items():
                    shares.setdefault(user, {}).setdefault(count, []).append(values)
    title = "NP-DPO, conflicting pairs held out: implicit reward prefers the chosen answer, %, by choices given"
    table = Table(title, [str(k) for k in COUNTS], first="criterion")
    checks = []
    for user, found in shares.items():
        table.rows[user] = [Cell(*interval(found[count])) for count in COUNTS]
        first, last = table.rows[user][0], table.rows[user][-1]
        above = "above" if last.low is not None and last.low > 0.5 else "NOT above"
        rising = "rising" if last.mean > first.mean else "NOT rising"
        checks.append(f"{user}: {rising} with choices; the interval at {COUNTS[-1]} choices is {above} 50 %")
    return {"tables": [table], "checks": checks, "training": {**TRAINING, "strength": STRENGTH}}


def _one(
    base: Path, data: Path, lines: Sequence[dict[str, Any]], folder: Path, seed: int, steps: int | None
) -> dict[str, dict[int, Floats]]:
    from transformers import AutoModelForCausalLM

    train, validation, test = helpful_harmless(data, seed=seed)
    task = TASKS["hh"][0]
    rewards = {**task.training, "disable_tqdm": True}
    if steps is not None:
        rewards |= {"max_steps": steps, "eval_steps": steps, "warmup_steps": 0}
    reward = fit_reward(
        RewardConfig(latent_width=task.latent_width, pooling=task.pooling), train, validation, folder / "reward",
        training=rewards, examples=ExamplesConfig(max(COUNTS), 8), seed=seed,
    )  # fmt: skip
    assert isinstance(reward, NPBTL)
    tokenizer = load_tokenizer(base)
    users, unseen = (conflicting(part, lines, tokenizer) for part in (train, test))
    torch.manual_seed(seed)
    config = SteeringConfig(
        EncoderConfig(**reward.encoder.config),  # type: ignore[arg-type]
        film=True,
        loras=(LoraConfig(("q_proj", "v_proj"), 16),),
    )
    model = load_model(AutoModelForCausalLM, base, dtype=torch.bfloat16)
    policy = SteerablePolicy(
        model, config, tokenizer=tokenizer, modulation_std=config.encoder.latent_width**-0.5, modulation_mean=0.0
    )
    policy.encoder.load_state_dict(reward.encoder.state_dict())
    standardize_latents(policy.encoder, some_contexts(users, seed=seed))
    policy.encoder.requires_grad_(False)  # it knows users already; what is left to learn is how to answer them
    settings = TRAINING | ({} if steps is None else {"max_steps": steps, "warmup_steps": 0})
    args = NPDPOArguments(output_dir=str(folder), seed=seed, report_to="none", dataloader_pin_memory=False, **settings)
    examples = OpposedData(
        users, tokenizer, length=args.max_steps * args.train_batch_size, min_context=max(COUNTS),
        max_context=2 * max(COUNTS), max_tokens=MAX_TOKENS, seed=seed,
    )  # fmt: skip
    reference = ReferenceCache(folder / "reference.jsonl")
    trainer = NPDPOTrainer(policy, args, examples, reference=reference)
    checkpoint = last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    policy.strengthen(STRENGTH)
    policy.save_pretrained(folder)

    def right(examples: list[HeldOut], count: int) -> Floats:
        margins = implicit_margins(policy, examples, count, reference=reference, max_tokens=MAX_TOKENS)
        return (np.concatenate(margins) > 0).astype(float)

    divided = each_held_out(unseen, max_context=max(COUNTS), seed=seed)
    return {user: {count: right(own, count) for count in COUNTS} for user, own in divided.items()}
