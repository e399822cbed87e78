"""Prompts, as texts or chats, to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, str]
Prompt = str | Sequence[Message]


def prompt_ids(tokenizer: Any, prompt: Prompt, name: str = "prompt") -> list[int]:
    """The token ids of a text as it is, or of a chat put through the tokenizer's template.

    Raises, naming `name`, TypeError for what is neither, or for a message without a role or a content that are texts;
    ValueError for a prompt of no token, or a text that is no Unicode (lone surrogates).
    """
    if isinstance(prompt, str):
        _check_text(prompt, name)
        ids = tokenizer(prompt)["input_ids"]
    else:
        _check_chat(prompt, name)
        ids = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]
    if not ids:
        raise ValueError(f"{name}: expected at least one token, got an empty prompt")
    return list(ids)


def _check_chat(prompt: Any, name: str) -> None:
    if isinstance(prompt, bytes | bytearray | memoryview) or (
        not isinstance(prompt, Sequence) or not all(isinstance(message, Mapping) for message in prompt)
    ):
        raise TypeError(f"{name}: expected a text, or a list of messages with role and content, got {prompt!r:.80}")
    for i, message in enumerate(prompt):
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise TypeError(f"{name}[{i}]: expected a {key} that is a text, got {message.get(key)!r:.80}")
            _check_text(message[key], f"{name}[{i}]: {key}")


def _check_text(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: expected Unicode text, got a lone surrogate at {error.start}") from None


def told(prompt: Prompt, chat: bool | None) -> Prompt:
    """A prompt as a policy is asked it: where `chat`, a text is a user's message. Chats are what they are."""
    return [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer can tell a chat."""
    return bool(getattr(tokenizer, "chat_template", None))
