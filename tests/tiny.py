"""Tiny random models, policies and a tokenizer, made in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from fssa_fast import Choice, EncoderConfig, LoraConfig, SteerablePolicy, SteeringConfig
from fssa_fast.steering.sites import default_targets

VOCABULARY, WIDTH, LATENT = 64, 8, 16
PAD, BOS, EOS, UNKNOWN = range(4)
CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)

_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, _COMMON),
    "mistral": (MistralConfig, _COMMON),
    "qwen2": (Qwen2Config, {k: v for k, v in _COMMON.items() if k != "head_dim"}),
    "qwen3": (Qwen3Config, _COMMON),
    "gemma2": (Gemma2Config, _COMMON),
    "gemma3": (Gemma3TextConfig, _COMMON),
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "phi3": (Phi3Config, {k: v for k, v in _COMMON.items() if k != "head_dim"}),
    "olmo2": (Olmo2Config, {k: v for k, v in _COMMON.items() if k != "head_dim"}),
}
ARCHITECTURES = tuple(_CONFIGS)


def make_model(name: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random causal LM in evaluation mode; the same seed gives the same weights."""
    kind, sizes = _CONFIGS[name]
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    config = kind(**{**sizes, **tokens, "initializer_range": 0.2, "max_position_embeddings": 128, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval().to(dtype)


def make_loras(model: Any, *modulations: str) -> tuple[LoraConfig, ...]:
    """An adapter of rank 4 for each of `modulations`, on the usual projections."""
    return tuple(LoraConfig(default_targets(model), 4, 8.0, m) for m in modulations)  # type: ignore[arg-type]


def make_config(model: Any, film: Any = True, modulations: tuple[str, ...] = ("scale_shift", "none")) -> SteeringConfig:
    """FiLM and adapters as asked for, with a small encoder."""
    return SteeringConfig(EncoderConfig(WIDTH, LATENT, inner="linear", heads=2), film, make_loras(model, *modulations))


def shake(policy: SteerablePolicy, seed: int = 1, size: float = 0.2) -> SteerablePolicy:
    """Random modulations and adapters, so that every path matters and users differ."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(policy.named_parameters()):
            if name.startswith("modulator.") or ".fssa." in name:
                parameter.add_((size * torch.randn(parameter.shape, generator=draw)).to(parameter.device))
    policy.users.refresh()
    return policy


def make_policy(
    model: Any = None,
    film: Any = True,
    modulations: tuple[str, ...] = ("scale_shift", "none"),
    *,
    seed: int = 1,
    **options: Any,
) -> SteerablePolicy:
    """A policy on `model` (None: a Llama) whose every part matters."""
    model = make_model() if model is None else model
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return shake(SteerablePolicy(model, make_config(model, film, modulations), **options), seed)


def make_choices(seed: int, count: int = 3) -> list[Choice]:
    """Choices between random embeddings."""
    draw = torch.Generator().manual_seed(seed)
    return [Choice(torch.randn(WIDTH, generator=draw), torch.randn(WIDTH, generator=draw)) for _ in range(count)]


def make_ids(rows: int = 3, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Random token ids, none of them special."""
    return torch.randint(4, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def make_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """Words w6, w7, ... and the roles of a chat, one token each; it adds nothing to a text."""
    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "user", "assistant", *(f"w{i}" for i in range(6, VOCABULARY))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    names = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**names, **options})
    wrapped.chat_template = CHAT
    return wrapped
