"""What serving over HTTP costs, and how latency grows with the rate: python -m bench.serve

SmolLM2's shape with random weights, float32, on the CPU (`--tiny`: two blocks, to try the script). One process serves,
another asks. First, closed: 32 requests at once through the engine alone and over HTTP, in turn: tokens a second and
the time to the first token. Then, open: requests come by a Poisson process whether others have ended or not, users
drawn by Zipf's law from those at rest: time to the first token and between tokens by rate, until it is saturated.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch

from bench.decode import SHAPES, make_policy
from bench.timing import machine

ROWS, PROMPT, ANSWER = 32, 48, 48


def make_served(users: int, tiny: bool, path: Path) -> tuple[Any, Any]:
    """A policy with so many users at rest, and their store."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from fssa_fast import SqliteStore
    from fssa_fast.users.store import Change, StoredUser

    config = SHAPES["smollm2-135m"]()
    if tiny:
        config.update({"num_hidden_layers": 2, "vocab_size": 4096})
    config.eos_token_id = None  # answers have the length asked for
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    policy = make_policy(base, 16, 4 * ROWS)
    for name in list(policy.users):
        policy.users.remove(name)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    policy.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    store = SqliteStore(path)
    policy.use_store(store)
    prior = policy.users.add("user-0", [])
    encoder = store.get("user-0").encoder  # type: ignore[union-attr]
    draw = torch.Generator().manual_seed(0)
    for start in range(1, users, 10_000):
        latents = prior.latent + 0.1 * torch.randn(min(10_000, users - start), len(prior.latent), generator=draw)  # type: ignore[operator, arg-type]
        store.put(
            [
                Change(StoredUser(f"user-{start + i}", 1, 1.0, latent.bfloat16(), encoder), (), True)
                for i, latent in enumerate(latents)
            ]
        )
    return policy, store


def prompt_of(draw: random.Random) -> str:
    """A text of PROMPT tokens that no other begins as."""
    return " ".join(f"w{draw.randrange(4096)}" for _ in range(PROMPT))


def serve(users: int, tiny: bool, path: str, pipe: Any) -> None:
    """The serving process: tells its port, then measures the engine alone whenever it is asked to."""
    import threading

    from fssa_fast.serving import Settings, make_app
    from fssa_fast.serving.server import Server
    from fssa_fast.serving.versions import only

    policy, store = make_served(users, tiny, Path(path))
    engine = policy.engine(max_rows=ROWS, max_tokens=ROWS * 2 * (PROMPT + ANSWER))
    app = make_app(only(policy, engine), store, Settings("bench"))
    server = Server(app, 1.0, port=0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    pipe.send(server.servers[0].sockets[0].getsockname()[1])
    while (seed := pipe.recv()) is not None:
        draw = random.Random(seed)
        asked = [(prompt_of(draw), f"user-{zipf(draw, users)}") for _ in range(2 * ROWS)]
        first: list[float] = []
        lock = threading.Semaphore(ROWS)
        begin = time.perf_counter()

        def one(prompt: str, user: str, first: list[float] = first, lock: Any = lock) -> None:
            with lock:
                sent = time.perf_counter()
                for number, _ in enumerate(engine.submit(prompt, user, max_new_tokens=ANSWER)):
                    if number == 0:
                        first.append(time.perf_counter() - sent)

        threads = [threading.Thread(target=one, args=pair) for pair in asked]
        for worker in threads:
            worker.start()
        for worker in threads:
            worker.join()
        pipe.send((2 * ROWS * ANSWER / (time.perf_counter() - begin), statistics.median(first)))


def zipf(draw: random.Random, users: int) -> int:
    """A user's number, by Zipf's law with exponent 1: the most frequent is 0."""
    return min(users - 1, int(users ** draw.random()) - 1)


async def ask(http: httpx.AsyncClient, prompt: str, user: str) -> list[float]:
    """The times at which the pieces of one streamed answer came, the first of them that of asking."""
    body = {"model": "bench", "prompt": prompt, "user": user, "max_tokens": ANSWER, "temperature": 0, "stream": True}
    times = [time.perf_counter()]
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and '"text": ""' not in line:
                times.append(time.perf_counter())
    return times


async def closed(url: str, seed: int, users: int) -> tuple[float, float]:
    """Tokens a second and the median time to the first token, ROWS requests at once."""
    draw = random.Random(seed)
    room = asyncio.Semaphore(ROWS)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None)) as http:

        async def one(prompt: str, user: str) -> list[float]:
            async with room:
                return await ask(http, prompt, user)

        asked = [(prompt_of(draw), f"user-{zipf(draw, users)}") for _ in range(2 * ROWS)]
        begin = time.perf_counter()
        found = await asyncio.gather(*(one(*pair) for pair in asked))
        seconds = time.perf_counter() - begin
    return 2 * ROWS * ANSWER / seconds, statistics.median(times[1] - times[0] for times in found)


async def opened(url: str, rate: float, seconds: float, users: int) -> dict[str, Any]:
    """Latencies of requests that come at this rate a second."""
    draw = random.Random(int(1000 * rate))
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None)) as http:
        begin, at, tasks = time.perf_counter(), 0.0, []
        while (at := at + draw.expovariate(rate)) < seconds:
            await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
            tasks.append(asyncio.ensure_future(ask(http, prompt_of(draw), f"user-{zipf(draw, users)}")))
        found = await asyncio.gather(*tasks)
        took = time.perf_counter() - begin
    first = [times[1] - times[0] for times in found]
    between = [b - a for times in found for a, b in zip(times[1:], times[2:], strict=False)]
    return {"rate": rate, "requests": len(found), "tokens_per_second": len(found) * ANSWER / took,
            "first": percentiles(first), "between": percentiles(between)}  # fmt: skip


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p95 and p99, in milliseconds."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"p{p}": round(1000 * cuts[p - 1], 2) for p in (50, 95, 99)}


def draw_picture(results: dict[str, Any], path: Path) -> None:
    """Latency by rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True)
    for axis, name, title in zip(axes, ("first", "between"), ("first token", "between tokens"), strict=True):
        for p in ("p50", "p95", "p99"):
            axis.plot([r["rate"] for r in results["open"]], [r[name][p] for r in results["open"]], marker="o", label=p)
        axis.set(title=title, xlabel="requests a second", ylabel="ms", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures, prints, and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=1000, help="users at rest")
    parser.add_argument("--rounds", type=int, default=3, help="of the engine alone and over HTTP, in turn")
    parser.add_argument("--rates", type=float, nargs="*", default=[1, 2, 4, 6, 8], help="requests a second")
    parser.add_argument("--seconds", type=float, default=15, help="of each rate")
    parser.add_argument("--tiny", action="store_true", help="a model of two blocks")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "users": options.users, "tiny": options.tiny}
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        pipe, end = context.Pipe()
        arguments = (options.users, options.tiny, f"{folder}/users.db", end)
        process = context.Process(target=serve, args=arguments, daemon=True)
        process.start()
        url = f"http://127.0.0.1:{pipe.recv()}"
        engine, http = [], []
        for seed in range(options.rounds + 1):
            pipe.send(2 * seed)
            engine.append(pipe.recv())
            http.append(asyncio.run(closed(url, 2 * seed + 1, options.users)))
        for name, rounds in (("engine", engine[1:]), ("http", http[1:])):  # the first round warms up
            rate, first = (statistics.median(values) for values in zip(*rounds, strict=True))
            results[name] = {"tokens_per_second": round(rate, 1), "first_ms": round(1000 * first, 2)}
            print(f"{name:8}{rate:10.1f} tokens/s   first token {1000 * first:8.1f} ms")
        share = results["http"]["tokens_per_second"] / results["engine"]["tokens_per_second"]
        print(f"http / engine: {share:.3f}")
        results["open"] = []
        for rate in options.rates:
            results["open"].append(found := asyncio.run(opened(url, rate, options.seconds, options.users)))
            print(json.dumps(found), flush=True)
        pipe.send(None)
        process.terminate()
        process.join()
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.picture:
        draw_picture(results, options.picture)


if __name__ == "__main__":
    main()
