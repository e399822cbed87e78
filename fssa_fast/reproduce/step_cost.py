"""What a training step costs: ours, and one done as the reference implementation does it, on the same model and batch.

The reference's way, written for this measurement: the reference policy is a second copy of the base model; FiLM's
matrices are applied to the latent of every token, in every block; log-probabilities come from a full log-softmax over
the whole sequence. Both train the same number of LoRA and FiLM weights with the same optimizer.
"""

from __future__ import annotations

import copy
import gc
import multiprocessing
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fssa_fast.evaluation.tables import Cell, Table
from fssa_fast.policy import SteerablePolicy
from fssa_fast.steering import EncoderConfig, LoraConfig, SteeringConfig
from fssa_fast.training.policy import NPDPOArguments, ReferenceCache, np_dpo_loss

EMBEDDING, LATENT, RANK, ALPHA = 384, 256, 16, 32.0
TARGETS = ("q_proj", "v_proj")
PEAK_SHARE, SPEED_RATIO = 0.55, 1.5


def base_model(blocks: int = 30, width: int = 576, vocabulary: int = 49152) -> Any:
    """A random model of SmolLM2-135M's shapes."""
    torch.manual_seed(0)
    heads = max(1, width // 64)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 3),
            vocab_size=vocabulary,
            tie_word_embeddings=True,
        )
    ).eval()


def make_batch(pairs: int, prompt: int, answer: int, vocabulary: int, context: int = 10) -> dict[str, Any]:
    """Users with `context` choices each, one pair of answers for each."""
    draw = torch.Generator().manual_seed(0)
    rows, length = 2 * pairs, prompt + answer
    return {
        "pairs": torch.randn(pairs * context, 2, EMBEDDING, generator=draw) / EMBEDDING**0.5,
        "choices": torch.zeros(pairs * context, dtype=torch.long),
        "offsets": torch.arange(pairs + 1) * context,
        "input_ids": torch.randint(4, vocabulary, (rows, length), generator=draw),
        "attention_mask": torch.ones(rows, length, dtype=torch.long),
        "response_start": torch.full((rows,), prompt),
        "response_end": torch.full((rows,), length),
        "slots": torch.arange(pairs, dtype=torch.int32).repeat_interleave(2),
        "keys": [str(i) for i in range(rows)],
    }


class _TokenFiLM(nn.Module):
    """A block whose output is scaled and shifted, by two Linears applied to the latent of every token."""

    def __init__(self, block: nn.Module, width: int, latents: dict[str, Tensor]) -> None:
        super().__init__()
        self.block, self.latents = block, latents
        self.gamma, self.beta = nn.Linear(LATENT, width), nn.Linear(LATENT, width)
        nn.init.zeros_(self.gamma.weight)
        nn.init.ones_(self.gamma.bias)
        nn.init.zeros_(self.beta.weight)
        nn.init.zeros_(self.beta.bias)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden = self.block(*args, **kwargs)
        z = self.latents["z"].unsqueeze(1).expand(-1, hidden.shape[1], -1)
        return self.gamma(z) * hidden + self.beta(z)


class _Lora(nn.Module):
    """A projection with a plain adapter beside it."""

    def __init__(self, projection: nn.Linear) -> None:
        super().__init__()
        self.projection = projection
        self.a = nn.Linear(projection.in_features, RANK, bias=False)
        self.b = nn.Linear(RANK, projection.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x) + (ALPHA / RANK) * self.b(self.a(x))


class ReferenceStep:
    """A training step the reference's way."""

    def __init__(self, base: Any) -> None:
        from fssa_fast.nn import ContextEncoder

        self.reference = copy.deepcopy(base).requires_grad_(False)
        self.policy = base.requires_grad_(False)
        self.latents: dict[str, Tensor] = {}
        width = base.config.hidden_size
        for number, block in enumerate(base.model.layers):
            for name in TARGETS:
                setattr(block.self_attn, name, _Lora(getattr(block.self_attn, name)))
            base.model.layers[number] = _TokenFiLM(block, width, self.latents)
        self.encoder = ContextEncoder(EMBEDDING, LATENT, dropout=0.0)
        trained = [p for p in self.policy.parameters() if p.requires_grad] + list(self.encoder.parameters())
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    @staticmethod
    def _log_probs(model: Any, batch: dict[str, Any]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        every = F.log_softmax(logits[:, :-1].float(), -1)
        chosen = every.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        at = torch.arange(1, batch["input_ids"].shape[1])
        in_answer = (at >= batch["response_start"][:, None]) & (at < batch["response_end"][:, None])
        return (chosen * in_answer).sum(1)

    def __call__(self, batch: dict[str, Any]) -> float:
        """One step; returns its loss."""
        latents = self.encoder(batch["pairs"], batch["choices"], batch["offsets"])
        self.latents["z"] = latents[batch["slots"].long()]
        ours = self._log_probs(self.policy, batch).view(-1, 2)
        with torch.no_grad():
            base = self._log_probs(self.reference, batch).view(-1, 2)
        margin = 0.1 * ((ours - base)[:, 0] - (ours - base)[:, 1])
        loss = -F.logsigmoid(margin).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


class OurStep:
    """A training step as `NPDPOTrainer` does it.

    cached: whether the base model's log-probabilities are known, as from the second time on that a pair is trained on.
    recomputed: what of a block the backward pass computes again.
    """

    def __init__(
        self, base: Any, *, cached: bool, recomputed: Literal["nothing", "all but products", "all"] = "nothing"
    ) -> None:
        config = SteeringConfig(
            EncoderConfig(EMBEDDING, LATENT, dropout=0.0), True, (LoraConfig(TARGETS, RANK, ALPHA, "none"),)
        )
        self.policy, self.cached = SteerablePolicy(base, config).train(), cached
        if recomputed != "nothing":
            self.policy.gradient_checkpointing_enable({"keep_products": recomputed == "all but products"})
        self.reference = ReferenceCache()
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.args = NPDPOArguments(output_dir="unused", likelihood_weight=0.0, report_to="none", use_cpu=True)

    def __call__(self, batch: dict[str, Any]) -> float:
        """One step; returns its loss."""
        if not self.cached:
            self.reference = ReferenceCache()
        loss = np_dpo_loss(self.policy, batch, self.reference, self.args).loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


MAKE: dict[str, Callable[[Any], Callable[[dict[str, Any]], float]]] = {
    "the reference's way": ReferenceStep,
    "ours, first time over the data": lambda base: OurStep(base, cached=False),
    "ours, later times": lambda base: OurStep(base, cached=True),
    "ours, later times, products kept": lambda base: OurStep(base, cached=True, recomputed="all but products"),
    "ours, later times, blocks recomputed": lambda base: OurStep(base, cached=True, recomputed="all"),
}


def _measure(name: str, steps: int, sizes: dict[str, int], batch: dict[str, int], out: Any) -> None:
    """In a process of its own, whose peak memory is the step's: sends seconds a step, peak bytes, losses."""
    step = MAKE[name](base_model(**sizes))
    made = make_batch(**batch, vocabulary=sizes["vocabulary"])
    losses = [step(made)]
    gc.collect()
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        losses.append(step(made))
        seconds.append(time.perf_counter() - begin)
    out.send((sorted(seconds)[len(seconds) // 2], 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, losses))


def reproduce(
    *,
    steps: int = 5,
    blocks: int = 30,
    width: int = 576,
    vocabulary: int = 49152,
    pairs: int = 4,
    prompt: int = 32,
    answer: int = 160,
    names: Sequence[str] = tuple(MAKE),
) -> dict[str, Any]:
    """Runs each way in a process of its own, one after the other: the median of `steps` steps, and peak memory.

    Memory is the process' own peak less that of one that only loaded the library: weights, optimizer, activations.
    """
    context = multiprocessing.get_context("spawn")
    sizes, batch = {"blocks": blocks, "width": width, "vocabulary": vocabulary}, {
        "pairs": pairs, "prompt": prompt, "answer": answer,
    }  # fmt: skip
    results: dict[str, tuple[float, int, list[float]]] = {}
    idle = _run(context, _idle, ())
    for name in names:
        results[name] = _run(context, _measure, (name, steps, sizes, batch))
    table = Table(
        f"A training step of {pairs} pairs of {prompt} + {answer} tokens, {blocks} blocks of width {width}",
        ["seconds", "steps per second, against the reference's", "peak memory, GiB", "peak, against the reference's"],
        first="step", scale=1, digits=2,
    )  # fmt: skip
    first = results[names[0]]
    checks = []
    for name, (seconds, peak, _) in results.items():
        share, ratio = (peak - idle) / (first[1] - idle), first[0] / seconds
        table.rows[name] = [Cell(seconds), Cell(ratio), Cell((peak - idle) / 2**30), Cell(share)]
        if name != names[0]:
            checks.append(
                f"{name}: {'at most' if share <= PEAK_SHARE else 'over'} {PEAK_SHARE} of the memory ({share:.2f}), "
                f"{'at least' if ratio >= SPEED_RATIO else 'under'} {SPEED_RATIO} times the steps ({ratio:.2f})"
            )
    losses = {name: found[2] for name, found in results.items()}
    return {"tables": [table], "checks": checks, "losses": losses, "idle process, bytes": idle}


def _idle(out: Any) -> None:
    out.send(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _run(context: Any, target: Any, arguments: tuple[Any, ...]) -> Any:
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, sending))
    process.start()
    sending.close()
    try:
        return receiving.recv()
    except EOFError as error:
        process.join()
        raise RuntimeError(f"step-cost: a measuring process ended with status {process.exitcode}") from error
    finally:
        process.join()
