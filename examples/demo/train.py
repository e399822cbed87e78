"""Trains the demo adapter: NP-DPO on answers sampled from the model itself, for users of every kind.

``python -m examples.demo.train samples.jsonl OUT`` reads what ``examples.demo.sample`` wrote and writes a policy that
``SteerablePolicy.from_pretrained`` loads; ``make_adapter.sh`` shows the five rounds. Interrupted runs go on
from their last checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fssa_fast import EncoderConfig, LoraConfig, SteerablePolicy, SteeringConfig, TextEmbedder
from fssa_fast.training import NPDPOArguments, NPDPOTrainer, PreferenceData

from .base import load_base, load_embedder
from .choices import better_pairs, pairs_of, pictures_pairs, preferences, with_both
from .criteria import AXES
from .encoder import accuracy, fit_reward, standardize
from .sample import read_samples

RANK, LATENT, EMBEDDING = 16, 64, 384


def new_policy(records: Sequence[Mapping[str, Any]], *, seed: int, cache_dir: str | None) -> SteerablePolicy:
    """A policy whose encoder tells users apart, as part of a reward model, and whose adapter has learnt nothing yet."""
    torch.manual_seed(seed)
    model, tokenizer = load_base(cache_dir)
    config = SteeringConfig(
        EncoderConfig(EMBEDDING, LATENT, inner="mlp", dropout=0.0),
        film=True,
        loras=(LoraConfig(("q_proj", "v_proj"), RANK),),
    )
    embedder = TextEmbedder(*load_embedder())
    users = preferences(pairs_of(records, "train", seed=seed), embedder)
    unseen = preferences(pairs_of(records, "test", seed=seed), embedder)
    reward = fit_reward(users, LATENT, seed=seed)
    for count in (1, 3, 5, 10):
        for axis, other in zip(AXES, AXES[::-1], strict=True):
            right, beside = (100 * accuracy(reward, unseen, axis.low, kind, count) for kind in (axis.low, other.low))
            print(f"reward model, {count} choices on {axis.name}: {right:.1f} % right on {axis.name}, "
                  f"{beside:.1f} % on {other.name} (50 is right)")  # fmt: skip
    standardize(reward.encoder, users)
    # The base is frozen: bfloat16 halves its cost, the adapter is trained in float32.
    policy = SteerablePolicy(
        model.to(torch.bfloat16), config, tokenizer=tokenizer, embedder=embedder, modulation_std=0.1
    )
    policy.encoder.load_state_dict(reward.encoder.state_dict())
    return policy


def read_policy(adapter: str, *, cache_dir: str | None) -> SteerablePolicy:
    """A policy trained in an earlier round."""
    model, tokenizer = load_base(cache_dir)
    embedder = TextEmbedder(*load_embedder())
    return SteerablePolicy.from_pretrained(adapter, model.to(torch.bfloat16), tokenizer=tokenizer, embedder=embedder)


def train(
    samples: str,
    out: str,
    *,
    adapter: str | None = None,
    fresh: str | None = None,
    pictures: int = 0,
    steps: int = 240,
    examples: int = 4,
    learning_rate: float = 4e-4,
    beta: float = 0.1,
    likelihood_weight: float = 1.0,
    strength: float = 1.0,
    alone: bool = False,
    seed: int = 0,
    cache_dir: str | None = None,
) -> SteerablePolicy:
    """Trains for `steps` batches of `examples` users with a pair each, and saves the policy in float16.

    Args:
        samples: JSON lines of `examples.demo.sample`.
        adapter: go on with this policy; None starts a new one.
        fresh: JSON lines of `examples.demo.resample`, to choose from and to learn from what is badly written.
        pictures: choices of every kind of user between an answer and a row of pictures.
        strength: multiplies all modulations at the end.
        alone: users who care about one axis only, and of whom one choice at least is known. Ten choices on one axis
            steer three times as far as three do, and among other users they are met too seldom.
    """
    records = read_samples(samples)
    if adapter is None:
        policy = new_policy(records, seed=seed, cache_dir=cache_dir)
    else:
        policy = read_policy(adapter, cache_dir=cache_dir)
    policy.encoder.requires_grad_(False)  # it knows users already; what is left to learn is how to answer them
    assert policy.embedder is not None
    own = [] if fresh is None else read_samples(fresh)
    pairs = pairs_of([*records, *own], "train", seed=seed)
    users = preferences(pairs, policy.embedder)
    users = users if alone else with_both(users)
    better = preferences(better_pairs(records, own, seed=seed), policy.embedder, in_context=False)
    drawn = preferences(pictures_pairs(pairs, pictures, seed=seed), policy.embedder, in_context=False)
    for name, choices in users.items():
        written = [choice for kind in name.split() for choice in better[kind]]
        print(f"{name}: {len(choices)} choices, {len(written)} between a well and a badly written answer")
        choices += 2 * written + [choice for kind in name.split() for choice in drawn[kind]]
    data = PreferenceData(
        users, policy.tokenizer, length=steps * examples, targets=1, min_context=int(alone), seed=seed
    )
    work = Path(out).with_name(Path(out).name + "-run")
    arguments = NPDPOArguments(
        str(work),
        max_steps=steps,
        per_device_train_batch_size=examples,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        beta=beta,
        likelihood_weight=likelihood_weight,
        logging_steps=10,
        save_steps=50,
        save_total_limit=2,
        report_to=[],
        use_cpu=True,
        seed=seed,
    )
    trainer = NPDPOTrainer(policy, arguments, data)
    trainer.train(resume_from_checkpoint=any(work.glob("checkpoint-*")) or None)
    policy.strengthen(strength)
    policy.save_pretrained(out, dtype=torch.float16)
    return policy


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the demo adapter.")
    parser.add_argument("samples", help="JSON lines of examples.demo.sample")
    parser.add_argument("out", help="directory to write the policy to")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--examples", type=int, default=4, help="users a batch")
    parser.add_argument("--adapter", help="go on with this policy of an earlier round")
    parser.add_argument("--fresh", help="JSON lines of examples.demo.resample, made with that policy")
    parser.add_argument("--pictures", type=int, default=0, help="choices of every kind against rows of pictures")
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--likelihood-weight", type=float, default=1.0)
    parser.add_argument("--strength", type=float, default=1.0, help="multiplies all modulations at the end")
    parser.add_argument("--alone", action="store_true", help="only users who care about one axis")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache-dir", help="where the dequantised model is kept")
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
