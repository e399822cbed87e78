"""Answers for a few validation users, written as a policy trains: losses do not show text that breaks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from fssa_fast.generation.prompts import prompt_ids
from fssa_fast.nn import pack_choices
from fssa_fast.policy.policy import SteerablePolicy
from fssa_fast.training.data import Preference

SAMPLES_NAME = "samples.jsonl"


class SampleAnswers(TrainerCallback):
    """At every evaluation, the likeliest answer to one prompt of each of `count` users, to a file and to the screen.

    The prompt is of the user's first group, the context of the others, at most `known` choices.
    """

    def __init__(
        self,
        policy: SteerablePolicy,
        users: Mapping[str, Sequence[Preference]],
        count: int,
        path: Path,
        max_tokens: int,
        quiet: bool,
        known: int = 5,
        new_tokens: int = 64,
    ) -> None:
        self.policy, self.path, self.quiet, self.new_tokens = policy, path, quiet, new_tokens
        self.asked: list[tuple[str, Preference, torch.Tensor]] = []
        for name in sorted(users)[:count]:
            target = min(users[name], key=lambda choice: choice.group)
            context = [choice.pair for choice in users[name] if choice.group != target.group and choice.in_context]
            if len(prompt_ids(policy.tokenizer, target.prompt)) < max_tokens:
                self.asked.append((name, target, torch.stack(context[:known])))

    @torch.no_grad()
    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        policy, lines = self.policy, []
        training = policy.training
        policy.eval()
        for name, target, pairs in self.asked:
            packed = pack_choices([pairs], [torch.zeros(len(pairs), dtype=torch.long)])
            rows = policy.rows(policy.encoder.latents(*(part.to(policy.device) for part in packed)))
            prompt = prompt_ids(policy.tokenizer, target.prompt)
            with policy.serve(rows, torch.zeros(1, dtype=torch.long, device=policy.device)):
                ids = policy.model.generate(
                    torch.tensor([prompt], device=policy.device), max_new_tokens=self.new_tokens, do_sample=False,
                    pad_token_id=policy.tokenizer.pad_token_id or policy.tokenizer.eos_token_id,
                )  # fmt: skip
            answer = policy.tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)
            lines.append({"step": state.global_step, "user": name, "prompt": target.prompt, "answer": answer})
            if not self.quiet:
                tqdm.write(f"step {state.global_step}, {name}: {answer!r:.300}")
        policy.train(training)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
