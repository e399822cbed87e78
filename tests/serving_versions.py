"""Two saved versions of a policy on one saved base, tiny and random, for servers of versions."""

from __future__ import annotations

from pathlib import Path

import torch
from serving_tiny import make_embedder
from tiny import EOS, make_model, make_policy, make_tokenizer
from transformers import AutoModelForCausalLM

from fssa_fast import TextEmbedder


def save_versions(folder: Path) -> tuple[Path, Path]:
    """Writes base, embedder and two policies whose adapters and encoders differ; returns where the policies are."""
    for name, model in (("base", make_model(max_position_embeddings=256)), ("embedder", make_embedder().model)):
        if name == "base":
            model.generation_config.eos_token_id = EOS
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    embedder = TextEmbedder.from_pretrained(folder / "embedder")
    found = []
    for seed, name in ((1, "one"), (2, "two")):
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        policy = make_policy(base, seed=seed, tokenizer=make_tokenizer(), embedder=embedder)
        with torch.no_grad():
            policy.modulator.weight.mul_(30)
        policy.save_pretrained(folder / name)
        found.append(folder / name)
    return found[0], found[1]
