"""Tokens to text as they come, and the stop strings in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

WINDOW = 48  # tokens that are decoded again at most, where none of them completes a character
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of an answer."""
    return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TextStream:
    """The text of a sequence of tokens, in pieces of whole characters that join to the text of all of them.

    Each token costs the decoding of the few last ones, however many there were before: what a token adds is the
    difference that it makes behind them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # the last ones: those that are decoded
        self._given = 0  # characters of their text that have been given

    def add(self, token: int) -> str:
        """What is certain of the text with this token and was not before; may be empty."""
        self._tokens.append(token)
        if self._is_byte(token):  # SentencePiece decodes bytes beside each other together, or each as unknown
            return ""
        text = decoded(self._tokenizer, self._tokens)
        # At the end, U+FFFD may be the beginning of a character.
        whole = len(text) - text.endswith("\ufffd")
        piece = text[self._given : whole]
        self._given = max(self._given, whole)
        if self._given == len(text) or len(self._tokens) > WINDOW:
            self._shorten()
        return piece

    def _shorten(self) -> None:
        """Keeps the last tokens only, as many as have some text: a first one may lose its space."""
        for count in (1, 4, 16):
            kept = self._tokens[-count:]
            text = decoded(self._tokenizer, kept) if count < len(self._tokens) else ""
            whole = len(text) - (text.endswith("\ufffd") and len(self._tokens) > WINDOW)
            if whole > 0 and not text.startswith("\ufffd") and not self._is_byte(kept[0]):
                self._tokens, self._given = kept, whole
                return

    def _is_byte(self, token: int) -> bool:
        name = self._tokenizer.convert_ids_to_tokens(token)
        return isinstance(name, str) and _BYTE.fullmatch(name) is not None


class StopFinder:
    """Finds the first of some stop strings in a text that comes in pieces."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._longest = max((len(one) for one in self._stop), default=1)
        self._held = ""  # perhaps the beginning of a stop string
        self.found = False

    def add(self, piece: str, last: bool = False) -> str:
        """What of the text so far comes before any stop string, and has not been given before."""
        text = self._held + piece
        at = first_stop(text, self._stop)
        self.found = at is not None
        end = at if at is not None else len(text) if last else max(0, len(text) - self._longest + 1)
        self._held = "" if self.found else text[end:]
        return text[:end]


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of the stop strings begins."""
    found = [at for at in (text.find(one) for one in stop) if at >= 0]
    return min(found, default=None)
