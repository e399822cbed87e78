"""Texts to embeddings: any Hugging Face encoder, its pooling, its prompt and its width."""

from __future__ import annotations

import os
import string
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fssa_fast.hub import find_folder, load_model, load_tokenizer, recall


@dataclass(frozen=True)
class EmbedderConfig:
    """What a policy remembers of its embedder. `template` joins a prompt and an answer.

    name_or_path: the hub's name, then with its revision, or a folder; in a saved policy the path from its own folder.
    """

    name_or_path: str
    width: int
    pooling: Literal["mean", "first", "last"] = "mean"
    template: str = "{prompt}\n{response}"
    normalize: bool = True
    max_tokens: int = 256
    fingerprint: tuple[float, ...] = ()
    revision: str | None = None


def weight_fingerprint(model: Any) -> tuple[float, ...]:
    """Eight numbers that tell one set of weights from another, and survive rounding to bfloat16.

    Eight rows, evenly spread, of the input embeddings, each projected on one fixed direction. (Norms would not do: in
    wide models those of all rows, whatever the weights, are nearly the same.)
    """
    table = model.get_input_embeddings().weight.detach()
    return fingerprint_of_rows(table[fingerprinted_rows(len(table)).to(table.device)])


def fingerprinted_rows(count: int) -> Tensor:
    """Which rows, of so many, a fingerprint is made of."""
    return torch.linspace(0, count - 1, 8).round().long()


def fingerprint_of_rows(rows: Tensor) -> tuple[float, ...]:
    """The fingerprint of a model whose `fingerprinted_rows` are these, [8, D]."""
    direction = torch.arange(rows.shape[1], dtype=torch.float32).cos()
    return tuple(round(float(value), 6) for value in rows.float().cpu() @ direction)


def same_fingerprint(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two fingerprints are of the same weights, up to rounding, which is judged by `a`, the measured one."""
    allowed = 0.02 * max([1e-3, *map(abs, a)])
    return len(a) == len(b) and all(abs(x - y) <= allowed for x, y in zip(a, b, strict=True))


def _is_template(template: str) -> bool:
    # Plain fields only: a format specification can pad a text to any length, an attribute can reach anything.
    try:
        fields = [field for _, *field in string.Formatter().parse(template) if field[0] is not None]
    except ValueError:
        return False
    return all(field in (["prompt", "", None], ["response", "", None]) for field in fields) and (
        "response" in [name for name, _, _ in fields]
    )


class TextEmbedder:
    """Embeds (prompt, answer) pairs, and keeps the last `cache` of them.

    Args:
        model, tokenizer: of a Hugging Face encoder (any model that returns `last_hidden_state`).
        pooling: over tokens: "mean", or the "first" or "last" one. template: how prompt and answer are joined.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        pooling: Literal["mean", "first", "last"] = "mean",
        template: str = "{prompt}\n{response}",
        normalize: bool = True,
        max_tokens: int = 256,
        batch: int = 32,
        cache: int = 65536,
    ) -> None:
        if pooling not in ("mean", "first", "last"):
            raise ValueError(f"pooling: expected mean, first or last, got {pooling!r}")
        if not _is_template(template):
            raise ValueError(f"template: expected the fields {{prompt}} and {{response}} alone, got {template!r}")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.batch, self.cache_size = batch, cache
        self.config = EmbedderConfig(
            str(model.config.name_or_path),
            model.config.hidden_size,
            pooling,
            template,
            normalize,
            max_tokens,
            weight_fingerprint(model),
        )
        self._lock = threading.Lock()
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **options: Any) -> TextEmbedder:
        """Loads encoder and tokenizer from a folder, or from the hub by name; options as for the constructor.

        Raises ValueError where there is no such folder and the hub does not give it.
        """
        return cls._from_folder(find_folder("embedder", path, ask_hub=True), options)

    @classmethod
    def from_config(
        cls, config: EmbedderConfig, source: str | None = None, *, directory: str | os.PathLike[str] = "."
    ) -> TextEmbedder:
        """Loads the encoder that a file in `directory` describes, from what it names, or from `source` in its place.

        The hub is asked for `source` only, the name that the user gives. Raises ValueError where there is none, and
        where its width or its weights are not those the policy was trained with.
        """
        name = source or recall(config.name_or_path, directory)
        revision = config.revision if name == config.name_or_path else None
        embedder = cls._from_folder(
            find_folder("embedder", name, ask_hub=source is not None, revision=revision),
            {name: getattr(config, name) for name in ("pooling", "template", "normalize", "max_tokens")},
        )
        embedder.check(config)
        return embedder

    @classmethod
    def _from_folder(cls, folder: Path, options: dict[str, Any]) -> TextEmbedder:
        from transformers import AutoModel

        tokenizer = load_tokenizer(folder)
        if tokenizer.pad_token is None:  # as of many language models; what stands in the padding is masked
            tokenizer.pad_token = tokenizer.eos_token
        return cls(load_model(AutoModel, folder), tokenizer, **options)

    def check(self, config: EmbedderConfig) -> None:
        """Raises ValueError unless this embedder computes what `config` describes, name and path aside."""
        for name in ("width", "pooling", "template", "normalize", "max_tokens"):
            want, have = getattr(config, name), getattr(self.config, name)
            if want != have:
                raise ValueError(f"embedder: expected {name} {want!r}, as the policy was trained with, got {have!r}")
        if not same_fingerprint(self.config.fingerprint, config.fingerprint):
            raise ValueError(f"embedder: expected the weights of {config.name_or_path!r}, got others")

    def to(self, device: torch.device | str) -> TextEmbedder:
        """Moves the encoder to a device; embeddings stay on the CPU."""
        self.model.to(device)
        return self

    @property
    def width(self) -> int:
        """The embedding width E."""
        return self.config.width

    def encode(self, texts: Sequence[tuple[str, str]]) -> Tensor:
        """Embeddings [n, E], float32 on the CPU, of n (prompt, answer) pairs."""
        joined = [self.config.template.format(prompt=prompt, response=response) for prompt, response in texts]
        with self._lock:
            known = {text: self._cache[text] for text in joined if text in self._cache}
        missing = list(dict.fromkeys(text for text in joined if text not in known))
        for start in range(0, len(missing), self.batch):
            part = missing[start : start + self.batch]
            known.update(zip(part, self._forward(part), strict=True))
        with self._lock:
            self._cache.update((text, known[text]) for text in missing)
            while len(self._cache) > self.cache_size:
                self._cache.popitem(last=False)
        return torch.stack([known[text] for text in joined]) if joined else torch.empty(0, self.width)

    @torch.no_grad()
    def _forward(self, texts: list[str]) -> Tensor:
        batch = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.config.max_tokens, return_tensors="pt"
        ).to(self.model.device)
        hidden = self.model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1)
        if not mask.any(1).all():
            empty = texts[int((~mask.any(1)).nonzero()[0, 0])]
            raise ValueError(f"texts: expected at least one token each, got {empty!r:.80}")
        if self.config.pooling == "mean":
            pooled = (hidden * mask).sum(1) / mask.sum(1)
        else:  # the first or last token that is not padding, whichever side the padding is on
            places = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
            places = places.masked_fill(mask.squeeze(-1) == 0, -1 if self.config.pooling == "last" else hidden.shape[1])
            index = places.amax(1) if self.config.pooling == "last" else places.amin(1)
            pooled = hidden[torch.arange(len(texts), device=hidden.device), index]
        return (F.normalize(pooled, dim=-1) if self.config.normalize else pooled).cpu()
