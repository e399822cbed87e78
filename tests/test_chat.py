"""How a prompt is told is decided once: training, both forms of generation and commands follow what a run records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_embedder import make_bert
from tiny import make_choices, make_config, make_model, make_policy, make_tokenizer

from fssa_fast import SteerablePolicy, TextEmbedder
from fssa_fast.policy.storage import CONFIG_NAME
from fssa_fast.training.config import DataConfig, PolicyRun
from fssa_fast.training.data import encode_answer
from fssa_fast.training.fit_policy import fit_policy, preferences

TEXT = "w6 w7"
CHAT = [{"role": "user", "content": TEXT}]


def asked(policy: SteerablePolicy, prompt: Any) -> tuple[list[str], str | None]:
    """What the attached form and the engine answer."""
    policy.users.add("alice", make_choices(1)) if "alice" not in policy.users else None
    with policy.engine(background=False) as engine:
        fused = engine.submit(prompt, "alice", max_new_tokens=6).result().text
    return policy.generate([prompt], ["alice"], max_new_tokens=6, do_sample=False), fused


@pytest.mark.parametrize("chat", [True, False, None])
def test_a_text_is_told_as_the_policy_was_trained(chat: bool | None, tmp_path: Path) -> None:
    policy = make_policy(tokenizer=make_tokenizer(), chat=chat)
    told, raw = asked(policy, CHAT), asked(policy, TEXT)
    assert (told == raw) is bool(chat)
    policy.save_pretrained(tmp_path)
    loaded = SteerablePolicy.from_pretrained(tmp_path, make_model(), tokenizer=make_tokenizer())
    assert loaded.chat is chat and asked(loaded, TEXT) == raw
    before = json.loads((tmp_path / CONFIG_NAME).read_text())
    del before["chat"]  # as an earlier version wrote it: texts as they are
    (tmp_path / CONFIG_NAME).write_text(json.dumps(before))
    assert SteerablePolicy.from_pretrained(tmp_path, make_model(), tokenizer=make_tokenizer()).chat is None


def test_a_tokenizer_that_cannot_tell_a_chat_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="tokenizer: expected one with a chat template"):
        SteerablePolicy(make_model(), make_config(make_model()), tokenizer=tokenizer, chat=True)


@pytest.mark.parametrize("chat", ["auto", False])
def test_training_tells_prompts_as_generation_does(chat: Any, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    encoder = make_bert()
    encoder.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    lines = [
        {"user": user, "prompt": f"w{i} w9", "chosen": f"w{10 + i + which}", "rejected": f"w{11 + i - which}"}
        for which, user in enumerate("abcdefgh")
        for i in range(6, 10)
        if 10 + i + which != 11 + i - which
    ]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = PolicyRun(
        str(tmp_path / "model"),
        DataConfig(str(tmp_path / "choices.jsonl"), str(tmp_path / "encoder")),
        str(tmp_path / "run"),
        latent_width=8,
        chat=chat,
        training={"max_steps": 1, "use_cpu": True, "warmup_steps": 0},
    )
    policy = fit_policy(config, quiet=True)
    assert policy.chat is (chat == "auto")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["chat"] is policy.chat
    embedder = TextEmbedder(encoder, tokenizer)
    (one,) = preferences({"a": _choices(tmp_path)[:1]}, embedder.encode, chat=policy.chat)["a"]
    row = encode_answer(tokenizer, one.prompt, one.chosen, True, 64)
    prompt = [{"role": "user", "content": "w6 w9"}] if policy.chat else "w6 w9"
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True) if policy.chat else tokenizer(prompt)
    assert row.ids[: row.start] == torch.tensor(ids["input_ids"]).flatten().tolist()


def _choices(folder: Path) -> list[Any]:
    from fssa_fast.data.files import read_choices

    return read_choices(str(folder / "choices.jsonl"))
