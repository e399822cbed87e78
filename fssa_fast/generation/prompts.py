"""Prompts, as texts or chats, to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, str]
Prompt = str | Sequence[Message]


def prompt_ids(tokenizer: Any, prompt: Prompt, name: str = "prompt") -> list[int]:
    """The token ids of a text as it is, or of a chat put through the tokenizer's template.

    Raises, naming `name`, TypeError for what is neither, ValueError for a prompt of no token.
    """
    if not isinstance(prompt, str) and (
        not isinstance(prompt, Sequence) or not all(isinstance(message, Mapping) for message in prompt)
    ):
        raise TypeError(f"{name}: expected a text, or a list of messages with role and content, got {prompt!r:.80}")
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]
    if not ids:
        raise ValueError(f"{name}: expected at least one token, got an empty prompt")
    return list(ids)


def told(prompt: Prompt, chat: bool | None) -> Prompt:
    """A prompt as a policy is asked it: where `chat`, a text is a user's message. Chats are what they are."""
    return [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer can tell a chat."""
    return bool(getattr(tokenizer, "chat_template", None))
