"""vLLM on a CPU, for tests that run where it is installed (`make vllm-test`), and tiny policies for it.

FSSA_VLLM_RUNNER=2 runs them with vLLM's second model runner, whose Triton kernels are interpreted.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fssa_fast import Choice, EncoderConfig, LoraConfig, SteerablePolicy, SteeringConfig

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0-1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

RUNNER = os.environ.setdefault("FSSA_VLLM_RUNNER", "1")
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(RUNNER == "2"))
if RUNNER == "2":
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import backends

    # vLLM for CPUs takes Triton for usable where it lists a backend "cpu"; interpreted kernels never ask it anything.
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)

USERS = [f"user{number}" for number in range(6)]
SHAPE = dict(
    vocab_size=256,
    hidden_size=128,  # heads of 32: the least that attention of vLLM on a CPU takes
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)


def tiny_model(kind: str) -> Any:
    """A model of random weights, of the kinds Llama, Qwen2, Qwen3, Gemma3."""
    import transformers

    torch.manual_seed(0)
    extra = {"head_dim": 32} if kind in ("Qwen3", "Gemma3") else {}
    if kind == "Gemma3":
        extra |= dict(sliding_window=32, layer_types=["sliding_attention"] * 2 + ["full_attention"])
    name = f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config"
    config = getattr(transformers, name)(**SHAPE, **extra)
    config.initializer_range = 0.2
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for module in model.modules():  # norms that are not all ones
        if type(module).__name__.endswith("Norm"):
            torch.nn.init.normal_(module.weight, 0.0 if kind == "Gemma3" else 1.0, 0.1)
    return model.float().eval()


def write_tokenizer(folder: Path) -> None:
    """Words w0 to w255 for the tokens of the tiny models, and a template that says roles by words, too."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(256)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.chat_template = "{% for message in messages %}w3 {{ message['content'] }} {% endfor %}w4"
    tokenizer.save_pretrained(folder)


def make_policy(model: Any, folder: Path, *, store: str = "users.db") -> SteerablePolicy:
    """A policy of all ways to steer, with six users at rest, saved beside its base: folder/{base,policy,users.db}."""
    model.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    torch.manual_seed(1)
    config = SteeringConfig(
        EncoderConfig(embedding_width=8, latent_width=16),
        film=True,
        loras=(
            LoraConfig(("q_proj", "v_proj"), rank=4, alpha=8.0, modulation="scale_shift"),
            LoraConfig(("k_proj", "o_proj", "gate_proj", "down_proj"), rank=3, alpha=3.0, modulation="scale"),
            LoraConfig(("v_proj", "up_proj"), rank=2, alpha=4.0, modulation="none"),
        ),
    )
    policy = SteerablePolicy(model, config, modulation_std=0.5)
    with torch.no_grad():
        policy.modulator.weight.normal_(0, 0.05)
        for _, child in policy.attachment.children():
            for b in child.b:
                b.normal_(0, 0.05)
        policy.users.refresh()
    policy.save_pretrained(folder / "policy")
    policy.use_store(folder / store)
    generator = torch.Generator().manual_seed(2)
    for name in USERS:
        a, b = torch.randn(2, 3, 8, generator=generator)
        policy.users.add(name, [Choice(x, y) for x, y in zip(a * 3, b * 3, strict=True)])
    return policy


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[SteerablePolicy, Path]]:
    """Policies by the kind of their base, each made once."""
    made: dict[str, tuple[SteerablePolicy, Path]] = {}

    def of(kind: str) -> tuple[SteerablePolicy, Path]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = make_policy(tiny_model(kind), folder), folder
        return made[kind]

    return of
