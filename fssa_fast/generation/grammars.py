"""Answers of a given form, a JSON schema or a regular expression: llguidance says which tokens may come next."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fssa_fast.generation.sampler import mask_of


@dataclass(frozen=True)
class Grammar:
    """The form of an answer, made by `json_schema` or `regex`; `source` is llguidance's own description of it."""

    source: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Grammar:
        """An answer that is JSON and meets this schema, given as a mapping or as JSON."""
        text = schema if isinstance(schema, str) else json.dumps(schema)
        return cls(_llguidance().LLMatcher.grammar_from_json_schema(text))

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """An answer that as a whole matches this expression, of Rust's syntax, without look-around."""
        return cls(_llguidance().LLMatcher.grammar_from_regex(pattern))


class Matcher:
    """How far one answer has come in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int, allowed: np.ndarray | None) -> None:
        self._matcher, self._allowed = matcher, allowed
        self._mask = np.zeros((1, -(-vocabulary // 32)), dtype=np.int32)
        self._check()

    def mask(self) -> np.ndarray:
        """The tokens that may come next, a bit each, in memory that the next call writes again."""
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._mask)
        self._check()
        return self._mask[0] if self._allowed is None else self._mask[0] & self._allowed

    def take(self, token: int) -> bool:
        """Goes on by a token; False where the answer is complete and nothing can follow."""
        self._matcher.consume_token(token)
        self._check()
        return not self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"grammar: expected one that can be followed, got: {self._matcher.get_error()}")


class GrammarTokens:
    """A tokenizer as llguidance sees it, made when the first grammar comes: that takes about a second.

    Args:
        tokenizer: a fast tokenizer of transformers. vocabulary: V, how many logits a token has. ends: tokens that end
            an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Sequence[int]) -> None:
        self._given = tokenizer, vocabulary, list(ends)
        self._lock = threading.Lock()
        self._tokens: Any = None

    def matcher(self, grammar: Grammar, allowed: Sequence[int] | None = None) -> Matcher:
        """What follows an answer through a grammar; `allowed`: and only by these tokens.

        Raises: ValueError for a grammar that is none, or for a policy without a fast tokenizer.
        """
        tokenizer, vocabulary, ends = self._given
        if not isinstance(grammar, Grammar):
            raise TypeError(f"grammar: expected a Grammar, got {grammar!r:.80}")
        if tokenizer is None:
            raise ValueError("grammar: expected none, since this policy has no tokenizer")
        library = _llguidance()
        with self._lock:
            if self._tokens is None:
                from llguidance.hf import from_tokenizer

                self._tokens = from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=ends or None)
        made = library.LLMatcher(self._tokens, grammar.source, log_level=0)
        return Matcher(made, vocabulary, None if allowed is None else mask_of(allowed, vocabulary))


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ImportError("grammar: needs llguidance; `pip install fssa-fast[structured]` brings it") from error
    return llguidance
