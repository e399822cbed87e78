"""What a decode step costs when every row of the batch is another user: python -m bench.decode

SmolLM2-135M with its real weights, float32, on the CPU; with `--shapes`, random models of these shapes, bfloat16, on
the GPU. Adapters of rank 16 and 128 on q and v and film on every block. All systems run in one process, in turn, at the
same length of context; a step is the forward of one token a row and the choice of the likeliest next one. Systems:

    transformers            the plain model, eager, DynamicCache
    transformers_compiled   the plain model, StaticCache, torch.compile (on a GPU with its own CUDA graphs)
    reference               FiLM's matrices applied at every token, and a LoRA by peft
    peft_mixed              peft's adapter_names: a LoRA for every user, no film
    loop                    ours attached, one row after the other
    attached                ours attached
    fused_base              ours fused, of the model without an adapter
    fused                   ours fused, every row another user
    fused_one_user          ours fused, all rows the same user
    engine                  ours fused, behind the engine's scheduler

On a GPU the fused step is replayed from a CUDA graph.
`--stream N` then serves N requests of N / 2 users with random lengths, and compares tokens a second with fused static
batches of the same requests, and with the fused step alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, Qwen2Config, StaticCache

from bench.timing import Timing, compare, machine
from fssa_fast import BASE, Choice, EncoderConfig, LoraConfig, SteerablePolicy, SteeringConfig

SYSTEMS = (
    "transformers",
    "transformers_compiled",
    "reference",
    "peft_mixed",
    "loop",
    "attached",
    "fused_base",
    "fused",
    "fused_one_user",
    "engine",
)
LATENT, EMBEDDING = 256, 384


def _sizes(width: int, inner: int, blocks: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
    }


SHAPES: dict[str, Callable[[], Any]] = {
    "smollm2-135m": lambda: LlamaConfig(**_sizes(576, 1536, 30, 9, 3, 49152), tie_word_embeddings=True),
    "qwen2.5-1.5b": lambda: Qwen2Config(**_sizes(1536, 8960, 28, 12, 2, 151936), tie_word_embeddings=True),
    "qwen2.5-7b": lambda: Qwen2Config(**_sizes(3584, 18944, 28, 28, 4, 152064)),
}

Step = Callable[[], Any]


def random_base(config: Any, device: str) -> Any:
    """A model with random weights, bfloat16."""
    with torch.device(device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def twin(model: nn.Module) -> Any:
    """A copy of a model that shares its parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def make_policy(base: Any, rank: int, users: int) -> SteerablePolicy:
    """A policy on a twin of the base model, with random adapters and users that all differ."""
    torch.manual_seed(0)
    config = SteeringConfig(EncoderConfig(EMBEDDING, LATENT), True, (LoraConfig(("q_proj", "v_proj"), rank),))
    policy = SteerablePolicy(twin(base), config, capacity=users, modulation_std=0.05)
    with torch.no_grad():
        for number in range(len(config.loras)):
            for _, _, b in policy.attachment.adapter(number):
                b.normal_(std=0.002)
        policy.modulator.weight.add_(1e-4 * torch.randn_like(policy.modulator.weight))
    policy.users.refresh()
    policy.users.add_many({f"user{i}": [Choice(torch.randn(EMBEDDING), torch.randn(EMBEDDING))] for i in range(users)})
    return policy


def make_bare(base: Any) -> SteerablePolicy:
    """A policy on a twin of the base model whose fused form is the model's own: no adapter beside any projection.

    A policy steers in some way; film on one block takes no step of its own.
    """
    with torch.inference_mode(False):  # or the fused form could not tell when its parameters change
        return SteerablePolicy(twin(base), SteeringConfig(EncoderConfig(EMBEDDING, LATENT), (0,), ()), capacity=2)


class Bench:
    """One step of every system, for one rank and number of rows."""

    def __init__(self, base: Any, policy: SteerablePolicy, rank: int, rows: int, length: int) -> None:
        self.base, self.policy, self.rank, self.rows, self.length = base, policy, rank, rows, length
        self.device = base.device
        draw = torch.Generator().manual_seed(1)
        self.prompt = torch.randint(base.config.vocab_size, (rows, length), generator=draw).to(self.device)
        self.names = [f"user{i}" for i in range(rows)]
        slots = [policy.users.slot(name) for name in self.names]
        self.slots = torch.tensor(slots, dtype=torch.int32, device=self.device)

    def steps(self, systems: list[str]) -> Iterator[tuple[str, Step]]:
        """The systems' steps, ready to run."""
        for system in systems:
            yield system, getattr(self, system.removesuffix("_base").removesuffix("_one_user"))(system)

    def _dynamic(self, forward: Callable[..., Any], rows: int | None = None) -> Step:
        ids, cache = self.prompt[:rows], DynamicCache()
        forward(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = ids[:, :1]

        def step() -> Tensor:
            output = forward(input_ids=token, past_key_values=cache, use_cache=True)
            cache.crop(-1)  # every step at the same length
            return output.logits[:, -1].argmax(-1)

        return step

    def transformers(self, system: str) -> Step:
        return self._dynamic(self.base)

    def transformers_compiled(self, system: str) -> Step:
        cache: Any = StaticCache(self.base.config, max_cache_len=self.length + 32)
        positions = torch.arange(self.length, device=self.device)[None]
        self.base(input_ids=self.prompt, past_key_values=cache, position_ids=positions, use_cache=True)
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        compiled = torch.compile(twin(self.base), dynamic=False, mode=mode)
        token, where = self.prompt[:, :1].clone(), torch.tensor([[self.length]], device=self.device)
        mask = torch.zeros(self.rows, 1, 1, self.length + 32, device=self.device, dtype=self.base.dtype)
        mask[..., self.length + 1 :] = float("-inf")

        def step() -> Tensor:
            for layer in cache.layers:
                layer.cumulative_length.fill_(self.length)
            output = compiled(
                input_ids=token, past_key_values=cache, position_ids=where, attention_mask=mask, use_cache=True
            )
            return output.logits[:, -1].argmax(-1)

        return step

    def reference(self, system: str) -> Step:
        import peft

        model = peft.get_peft_model(twin(self.base), self._peft_config(), autocast_adapter_dtype=False)
        kind = {"device": self.device, "dtype": self.base.dtype}
        latents = torch.randn(self.rows, LATENT, **kind)
        for block in model.base_model.model.model.layers:
            width = self.base.config.hidden_size
            film = nn.ModuleList([nn.Linear(LATENT, width, **kind), nn.Linear(LATENT, width, **kind)])

            def hook(module: nn.Module, args: Any, output: Tensor, film: nn.ModuleList = film) -> Tensor:
                gamma, beta = (matrix(latents[: len(output)])[:, None] for matrix in film)
                return (1 + gamma) * output + beta

            block.register_forward_hook(hook)
        return self._dynamic(model.eval())

    def peft_mixed(self, system: str) -> Step:
        import peft

        # Adapters in the base model's dtype, as ours are.
        model = peft.get_peft_model(
            twin(self.base), self._peft_config(), adapter_name="user0", autocast_adapter_dtype=False
        )
        for name in self.names[1:]:
            model.add_adapter(name, self._peft_config(), autocast_adapter_dtype=False)

        def forward(**inputs: Any) -> Any:
            return model(adapter_names=self.names, **inputs)

        model.eval()
        return self._dynamic(forward)

    def _peft_config(self) -> Any:
        import peft

        return peft.LoraConfig(
            r=self.rank, lora_alpha=2 * self.rank, target_modules=["q_proj", "v_proj"], init_lora_weights=False
        )

    def _attached(self, rows: slice) -> Step:
        slots = self.slots[rows]
        return self._dynamic(lambda **inputs: self.policy.forward(slots=slots, **inputs), len(slots))

    def loop(self, system: str) -> Step:
        steps = [self._attached(slice(row, row + 1)) for row in range(self.rows)]
        return lambda: [step() for step in steps]

    def attached(self, system: str) -> Step:
        return self._attached(slice(None))

    def fused(self, system: str) -> Step:
        policy = make_bare(self.base) if system == "fused_base" else self.policy
        fused = policy.fused or policy.fuse(max_positions=2048)
        slots = {"fused": self.slots, "fused_base": 0 * self.slots, "fused_one_user": 0 * self.slots + self.slots[0]}
        rows, own = torch.arange(self.rows, device=self.device), slots[system]
        positions = torch.arange(self.length, device=self.device)
        cache = fused.new_cache(self.rows, self.length + 1)
        across = cache.table.shape[1]
        for row in range(self.rows):
            cache.assign(row, list(range(1 + row * across, 1 + (row + 1) * across)))
            fused.forward(
                self.prompt[row], own[row].expand(self.length), rows[row].expand(self.length), positions, cache,
                positions[-1:],
            )  # fmt: skip
        token, where = self.prompt[:, 0].clone(), torch.full_like(rows, self.length)

        def step() -> Tensor:
            return fused.forward(token, own, rows, where, cache).argmax(-1)

        return step

    def engine(self, system: str) -> Step:
        steps = 512  # more than are timed: their context grows meanwhile, as an engine's does
        engine = self.policy.engine(
            max_rows=self.rows, max_tokens=self.rows * (self.length + steps + 32), step_tokens=1024, background=False
        )
        engine._ends.clear()
        for row, name in zip(self.prompt.tolist(), self.names, strict=True):
            engine.submit(row, name, max_new_tokens=steps)
        for _ in range(2 + self.rows * self.length // 1024):
            engine.step()
        return engine.step


def first_tokens(bench: Bench, systems: list[str]) -> dict[str, Timing]:
    """Time to the first token of all rows, for the systems that differ in it."""
    sides: dict[str, Step] = {}
    with torch.inference_mode():
        if "transformers" in systems:
            sides["transformers"] = lambda: bench.base(input_ids=bench.prompt, use_cache=True, logits_to_keep=1)
        if "attached" in systems:
            sides["attached"] = lambda: bench.policy.forward(
                input_ids=bench.prompt, slots=bench.slots, use_cache=True, logits_to_keep=1
            )
        if "fused" in systems:
            fused = bench.policy.fused or bench.policy.fuse(max_positions=2048)
            cache = fused.new_cache(bench.rows, bench.length + 1)
            across, length = cache.table.shape[1], bench.length
            for row in range(bench.rows):
                cache.assign(row, list(range(1 + row * across, 1 + (row + 1) * across)))
            rows, positions = (torch.arange(count, device=bench.device) for count in (bench.rows, length))
            sides["fused"] = lambda: fused.forward(
                bench.prompt.flatten(), bench.slots.repeat_interleave(length), rows.repeat_interleave(length),
                positions.repeat(bench.rows), cache, rows * length + length - 1,
            )  # fmt: skip
        return compare(sides, seconds=2.0, rounds=5) if sides else {}


def stream(policy: SteerablePolicy, count: int, rows: int, step_ms: float) -> dict[str, Any]:
    """Tokens a second of the engine under a stream of requests, of static batches of them, and of the step alone."""
    draw = random.Random(0)
    users = [f"user{i}" for i in range(min(count // 2, len(policy.users)))]
    requests: list[dict[str, Any]] = [
        {
            "prompt": [draw.randrange(policy.config.vocab_size) for _ in range(draw.randint(4, 48))],
            "user": draw.choice(users),
            "max_new_tokens": draw.randint(16, 96),
        }
        for _ in range(count)
    ]

    def serve(batches: list[list[dict[str, Any]]]) -> tuple[float, int, list[list[int]]]:
        engine = policy.engine(max_rows=rows, max_tokens=rows * 160, background=False)
        engine._ends.clear()
        begin = time.perf_counter()
        results = [result.tokens for batch in batches for result in engine.run(batch)]
        return time.perf_counter() - begin, sum(map(len, results)), results

    seconds, tokens, results = serve([requests])
    static_seconds, _, static_results = serve([requests[i : i + rows] for i in range(0, count, rows)])
    alone = [serve([[requests[i]]])[2][0] for i in range(0, count, max(1, count // 20))]
    return {
        "requests": count,
        "users": len(users),
        "rows": rows,
        "tokens": tokens,
        "prompt_tokens": sum(len(request["prompt"]) for request in requests),
        "engine_tokens_per_second": tokens / seconds,
        "static_batches_tokens_per_second": tokens / static_seconds,
        "fused_step_tokens_per_second": 1e3 * rows / step_ms,
        "same_as_alone": results == static_results and alone == results[:: max(1, count // 20)],
    }


def show(results: list[dict[str, Any]]) -> None:
    """Prints a table for every rank."""
    from rich.console import Console
    from rich.table import Table

    for rank in sorted({result["rank"] for result in results}):
        own = [result for result in results if result["rank"] == rank]
        rows = sorted({result["rows"] for result in own})
        table = Table(title=f"ms a decode step (and its ratio to transformers), rank {rank}")
        table.add_column("system")
        for count in rows:
            table.add_column(f"{count} rows", justify="right")
        for system in dict.fromkeys(result["system"] for result in own):
            cells = []
            for count in rows:
                found = {r["system"]: r for r in own if r["rows"] == count}
                if system not in found:
                    cells.append("")
                    continue
                mine, plain = found[system], found.get("transformers")
                ratio = f" ({mine['ms_per_step'] / plain['ms_per_step']:.2f})" if plain else ""
                cells.append(f"{mine['ms_per_step']:.1f} [{mine['ms_low']:.1f}, {mine['ms_high']:.1f}]{ratio}")
            table.add_row(system, *cells)
        Console(width=160).print(table)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draws milliseconds a step against rows, a line a system, a panel a rank."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ranks = sorted({result["rank"] for result in results})
    figure, axes = plt.subplots(1, len(ranks), figsize=(6 * len(ranks), 4.5), sharey=True, squeeze=False)
    for axis, rank in zip(axes[0], ranks, strict=True):
        for system in dict.fromkeys(result["system"] for result in results):
            own = sorted((r["rows"], r["ms_per_step"]) for r in results if r["rank"] == rank and r["system"] == system)
            if own:
                axis.plot(*zip(*own, strict=True), marker="o", label=system)
        axis.set(title=f"rank {rank}", xlabel="rows, each another user", xscale="log", yscale="log")
        counts = sorted({result["rows"] for result in results})
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
    axes[0][0].set_ylabel("ms a decode step")
    axes[0][-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def measure(base: Any, name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The results of one model, printed as they come."""
    about, results = machine(), []
    about |= {"model": name, "dtype": str(base.dtype).removeprefix("torch."), "device": base.device.type}
    for rank in args.ranks:
        policy = make_policy(base, rank, max(100, *args.rows))
        assert policy.users.slot(BASE) == 0
        for rows in args.rows:
            bench = Bench(base, policy, rank, rows, args.prompt)
            with torch.inference_mode():
                timings = compare(dict(bench.steps(args.systems)), seconds=args.seconds, rounds=args.steps)
            first = first_tokens(bench, args.systems)
            for system, timing in timings.items():
                result = {
                    "system": system,
                    "rows": rows,
                    "distinct_users": {"fused_one_user": 1, "fused_base": 0, "transformers": 0}.get(system, rows),
                    "rank": rank,
                    "ms_per_step": 1e3 * timing.median,
                    "ms_low": 1e3 * timing.low,
                    "ms_high": 1e3 * timing.high,
                    "tokens_per_second": rows / timing.median,
                    "steps": timing.rounds,
                    "prompt": args.prompt,
                    "ms_to_first_token": 1e3 * first[system].median if system in first else None,
                    **about,
                }
                if system in ("fused", "engine", "fused_one_user") and policy.fused is not None:
                    result["packed_weight_bytes"] = policy.fused.nbytes
                results.append(result)
            show([result for result in results if result["rank"] == rank])
        fused = [r for r in results if r["system"] == "fused" and r["rank"] == rank and r["rows"] == 32]
        if args.stream and fused:
            found = stream(policy, args.stream, 32, fused[0]["ms_per_step"])
            print(json.dumps(found, indent=2))
            head = {"system": "engine_stream", "distinct_users": found["users"], "rank": rank}
            results.append({**head, **found, **about})
        policy.unfuse()
    return results


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", help="1, 8, 32, 64; with --shapes also 128 and 256")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--steps", type=int, default=11, help="timed steps of each system")
    parser.add_argument("--seconds", type=float, default=4.0, help="fewer steps, but 5, where a system's take longer")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of context before the step")
    parser.add_argument("--stream", type=int, default=200, help="requests of the engine's stream; 0 leaves it out")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[], help="random models on the GPU instead")
    parser.add_argument("--cache-dir", type=Path, help="directory of the base model's dequantised copy")
    parser.add_argument("--json", type=Path, help="where to write the results, a list of objects")
    parser.add_argument("--plot", type=Path, help="where to draw them; of several models a file each, by its name")
    args = parser.parse_args()
    if args.shapes and not torch.cuda.is_available():
        parser.error("--shapes: expected a GPU that torch finds, got none")
    args.rows = args.rows or [1, 8, 32, 64, *([128, 256] if args.shapes else [])]

    everything: list[dict[str, Any]] = []
    for shape in args.shapes or ["SmolLM2-135M"]:
        if args.shapes:
            base = random_base(SHAPES[shape](), "cuda")
        else:
            from examples.demo.base import load_base

            base, _ = load_base(args.cache_dir)
        results = measure(base, shape, args)
        everything += results
        if args.json:
            args.json.write_text(json.dumps(everything, indent=2) + "\n")
        if args.plot:
            path = args.plot.with_stem(f"{args.plot.stem}-{shape}") if len(args.shapes) > 1 else args.plot
            plot([result for result in results if "ms_per_step" in result], path)


if __name__ == "__main__":
    main()
