"""Trains a tiny policy in a process of its own: ``python train_tiny.py FOLDER STEPS BATCH [DIE]``.

It goes on from the folder's last whole checkpoint, leaves the policy in FOLDER/policy and the losses in
FOLDER/losses.json. DIE is the number of a torch.save, in a checkpoint, in the middle of which the process is killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from tiny import LATENT, WIDTH, make_loras, make_model, make_tokenizer

from fssa_fast import EncoderConfig, SteerablePolicy, SteeringConfig
from fssa_fast.training import NPDPOArguments, NPDPOTrainer, Preference, PreferenceData
from fssa_fast.training.policy import ReferenceCache
from fssa_fast.training.runs import last_checkpoint


def make_preferences(sign: int) -> list[Preference]:
    """A user who wants the answers of low (1) or of high words (-1), on six topics."""
    draw = torch.Generator().manual_seed(5)
    found = []
    for i in range(6):
        pair = torch.ones(2, WIDTH) * torch.tensor([[1.0], [-1.0]]) * sign + torch.randn(2, WIDTH, generator=draw)
        answers = (f"w{6 + i} w7 w8", f"w{50 + i} w60")[::sign]
        found.append(Preference(f"w{20 + i} w30", answers[0], answers[1], f"topic {i}", pair))
    return found


def die_at(number: int) -> None:
    """Kills this process in the middle of the torch.save of that number, half of the file written."""
    save, count = torch.save, 0

    def saving(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        save(content, path, *args, **kwargs)
        if count == number:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = saving


def main(folder: str, steps: str, batch: str, die: str = "0") -> None:
    if int(die):
        die_at(int(die))
    torch.manual_seed(0)
    model = make_model()
    config = SteeringConfig(EncoderConfig(WIDTH, LATENT, heads=2, dropout=0.0), True, make_loras(model, "scale_shift"))
    policy = SteerablePolicy(model, config, tokenizer=make_tokenizer(), modulation_std=0.1)
    users = {"low": make_preferences(1), "high": make_preferences(-1)}
    data = PreferenceData(users, policy.tokenizer, length=4 * int(steps), max_context=3, targets=2)
    args = NPDPOArguments(
        output_dir=folder,
        max_steps=int(steps),
        per_device_train_batch_size=int(batch),
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        dataloader_pin_memory=False,
    )
    trainer = NPDPOTrainer(policy, args, data, reference=ReferenceCache(Path(folder) / "reference.jsonl"))
    checkpoint = last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.is_world_process_zero():
        policy.save_pretrained(Path(folder) / "policy")
        losses = [entry for entry in trainer.state.log_history if "loss" in entry]
        Path(folder, "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(*sys.argv[1:])
