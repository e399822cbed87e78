"""`fssa generate`: prompts and users in JSON lines, answers in JSON lines."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fssa_fast.commands.jsonl import check_keys, read_objects
from fssa_fast.commands.options import Base, Device, DType, Embedder, Policy, StoreOption, load_policy, placed

if TYPE_CHECKING:
    from fssa_fast.generation import Engine, Handle

SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop", "strength")


def generate(
    policy: Policy,
    output: Annotated[Path, typer.Option(help="Where answers go, a JSON line each; those there are not made again.")],
    input: Annotated[
        Path | None,
        typer.Option(help='Requests, a JSON line each: "prompt" (a text or a chat), "user" (a name, or names with '
                     'weights), and perhaps "id" and any of ' + ", ".join(SAMPLING) + "."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="One prompt, in place of --input.")] = None,
    user: Annotated[list[str] | None, typer.Option(help="Whom to answer it for; may be given several times.")] = None,
    base: Base = None,
    store: StoreOption = None,
    embedder: Embedder = None,
    device: Device = None,
    dtype: DType = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that add up to this.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many tokens; 0 from all.")] = 0,
    seed: Annotated[int, typer.Option(help="Request number n draws with the seed seed + n.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Texts that end an answer.")] = None,
    strength: Annotated[float, typer.Option(help="How strongly users steer; 0 is the base model.")] = 1.0,
    rows: Annotated[int, typer.Option(help="Requests that run at once.")] = 32,
    cache_tokens: Annotated[int, typer.Option(help="Tokens in the cache, of all requests together.")] = 16384,
) -> None:  # fmt: skip
    """Answer many prompts, each for its user, all in one running batch. Broken off, it goes on where it was."""
    if (input is None) == (prompt is None):
        raise ValueError("input, prompt: expected one of them, got " + ("both" if input else "neither"))
    if input is not None:
        if user:
            raise ValueError("user: expected in the lines of --input, got it as an option")
        lines = list(read_objects(input))
    else:
        if not user:
            raise ValueError("user: expected at least one with --prompt, got none")
        lines = [("--prompt", {"prompt": prompt, "user": name}) for name in user]
    defaults: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    defaults |= {"top_k": top_k, "stop": stop or [], "strength": strength}
    requests = dict(_request(where, n, line, {**defaults, "seed": seed + n}) for n, (where, line) in enumerate(lines))
    if len(requests) < len(lines):
        raise ValueError("id: expected another one for each request, got one twice")
    left = _left(output, requests)
    if not left:
        typer.echo(f"{output}: all {len(requests)} answers are there", err=True)
        return
    loaded = load_policy(policy, base, embedder, store, room=2 * rows, **placed(device, dtype))
    with loaded.engine(max_rows=rows, max_tokens=cache_tokens, step_tokens=max(256, rows), background=False) as engine:
        failed = _serve(engine, left, output, len(requests))
    if failed:
        typer.echo(f"{output}: {failed} of {len(requests)} requests failed; run again to try those again", err=True)
        raise typer.Exit(1)


def _request(where: str, number: int, line: dict[str, Any], defaults: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A line's id, and the arguments of `Engine.submit` with the line's place and digest."""
    check_keys(where, line, {"prompt", "user"}, {"id", *SAMPLING})
    name = line.get("id", number)
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise ValueError(f"{where}: expected a text or an integer for id, got {name!r}")
    arguments = {**defaults, **{key: value for key, value in line.items() if key != "id"}}
    digest = hashlib.blake2b(json.dumps(arguments, sort_keys=True).encode(), digest_size=8).hexdigest()
    return name, {"where": where, "digest": digest, "arguments": arguments}


def _left(output: Path, requests: dict[Any, dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """The requests that the output does not answer. A line that was being written when the run was broken off goes."""
    if not output.exists():
        return requests
    text = output.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with output.open("r+b") as file:
            file.truncate(len(whole))
    left = dict(requests)
    for where, line in read_objects(output):
        request = left.pop(line.get("id"), None)
        if request is None or request["digest"] != line.get("request"):
            raise ValueError(f"{where}: expected an answer to one of these requests, got another; name a new output")
    return left


def _serve(engine: Engine, left: dict[Any, dict[str, Any]], output: Path, total: int) -> int:
    """Writes every answer as soon as it is whole. Returns how many requests failed."""
    from tqdm import tqdm

    waiting, failed = deque(left.items()), 0
    running: dict[Any, tuple[dict[str, Any], Handle]] = {}
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a", encoding="utf-8") as file, tqdm(total=total, initial=total - len(left), unit="answer") as bar:

        def fail(request: dict[str, Any], error: Exception) -> None:
            nonlocal failed
            failed += 1
            bar.update()
            bar.write(f"{request['where']}: {error}", nolock=True)

        while waiting or running:
            while waiting and len(running) < 2 * engine.max_rows:
                name, request = waiting[0]
                try:
                    running[name] = request, engine.submit(**request["arguments"])
                except RuntimeError as error:  # no room in the bank: wait, unless nothing is under way
                    if running:
                        break
                    fail(request, error)
                except (ValueError, TypeError, KeyError) as error:
                    fail(request, error)
                waiting.popleft()
            engine.step()
            for name in [name for name, (_, handle) in running.items() if handle.done]:
                request, handle = running.pop(name)
                try:
                    result = handle.result()
                except Exception as error:
                    fail(request, error)
                    continue
                answer = {"id": name, "user": request["arguments"]["user"], "text": result.text}
                answer |= {"reason": result.reason, "tokens": len(result.tokens), "request": request["digest"]}
                file.write(json.dumps(answer, ensure_ascii=False) + "\n")
                file.flush()
                bar.update()
    return failed
