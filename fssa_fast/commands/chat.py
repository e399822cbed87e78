"""`fssa chat`: a conversation in a terminal, whose picks and thumbs-ups become choices of the user."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fssa_fast.commands.options import Base, Device, DType, Embedder, Policy, Store, load_policy, placed

if TYPE_CHECKING:
    from fssa_fast.generation import Engine
    from fssa_fast.policy import SteerablePolicy

HELP = """Type a message, or
  /two MESSAGE  two answers to pick from; the pick becomes a choice
  /up           the last answer was good: it becomes a choice, preferred to the base model's own
  /new          begin a new conversation
  /quit         leave"""


def chat(
    policy: Policy,
    user: Annotated[str, typer.Option(help="Who is talking; added to the store if not there.")],
    store: Store,
    base: Base = None,
    embedder: Embedder = None,
    device: Device = None,
    dtype: DType = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="Of the answers drawn; 0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that add up to this.")] = 0.95,
    seed: Annotated[int | None, typer.Option(help="Of the first answer; later ones count on.")] = None,
) -> None:
    """Talk to the model as one user; /help says how answers become choices."""
    loaded = load_policy(policy, base, embedder, store, **placed(device, dtype))
    if loaded.tokenizer is None:
        raise ValueError("base: expected a model with a tokenizer beside it, got one without")
    if user not in loaded.users:
        loaded.users.add(user, [])
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    with loaded.engine(max_rows=4, background=False) as engine:
        _Conversation(loaded, engine, user, options, seed).run()


class _Conversation:
    def __init__(
        self, policy: SteerablePolicy, engine: Engine, user: str, options: dict[str, Any], seed: int | None
    ) -> None:
        self.policy, self.engine, self.user, self.options, self.seed = policy, engine, user, options, seed
        self.messages: list[dict[str, str]] = []

    def run(self) -> None:
        typer.echo(HELP)
        for line in self._lines():
            command, _, rest = line.partition(" ")
            if command == "/quit":
                return
            if command == "/help":
                typer.echo(HELP)
            elif command == "/new":
                self.messages = []
            elif command == "/up":
                self._thumbs_up()
            elif command == "/two" and rest.strip():
                self._two(rest.strip())
            elif command.startswith("/"):
                typer.echo(f"expected a message or one of /two MESSAGE, /up, /new, /quit, got {line!r}")
            else:
                self._say(line)

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                line = input(f"{self.user}> ").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if line:
                yield line

    def _say(self, message: str) -> None:
        asked = [*self.messages, {"role": "user", "content": message}]
        try:
            handle = self.engine.submit(self._prompt(asked), self.user, seed=self._next_seed(), **self.options)
        except ValueError as error:  # the conversation has grown too long
            typer.echo(f"{error}; /new begins a new conversation")
            return
        for piece in handle.text():
            typer.echo(piece, nl=False)
        typer.echo()
        self.messages = [*asked, {"role": "assistant", "content": handle.result().text or ""}]

    def _two(self, message: str) -> None:
        asked = [*self.messages, {"role": "user", "content": message}]
        requests = [
            {"prompt": self._prompt(asked), "user": self.user, "seed": self._next_seed(), **self.options}
            for _ in range(2)
        ]
        try:
            answers = [result.text or "" for result in self.engine.run(requests)]
        except ValueError as error:
            typer.echo(f"{error}; /new begins a new conversation")
            return
        for number, answer in enumerate(answers, 1):
            typer.echo(f"[{number}] {answer}")
        picked = ""
        while answers[0] != answers[1] and picked not in ("1", "2", "0"):
            try:
                picked = input("1, 2, or 0 for neither> ").strip()
            except (EOFError, KeyboardInterrupt):
                picked = "0"
        better = 1 if picked == "2" else 0
        if picked in ("1", "2"):
            self._choose(message, answers[better], answers[1 - better])
        self.messages = [*asked, {"role": "assistant", "content": answers[better]}]

    def _thumbs_up(self) -> None:
        from fssa_fast.users import BASE

        if not self.messages:
            typer.echo("expected an answer first: nothing has been said yet")
            return
        *asked, answer = self.messages
        options = {**self.options, "temperature": 0.0}
        other = self.engine.submit(self._prompt(asked), BASE, **options).result().text or ""
        if other == answer["content"]:
            typer.echo("the base model says the same: nothing to choose between")
        else:
            self._choose(asked[-1]["content"], answer["content"], other)

    def _choose(self, message: str, chosen: str, rejected: str) -> None:
        from fssa_fast.users import Choice

        user = self.policy.users.add_choices(self.user, [Choice(chosen, rejected, message)])
        typer.echo(f"({self.user} is at version {user.version})")

    def _prompt(self, messages: list[dict[str, str]]) -> Any:
        """A chat, or its text where the policy was trained on texts, or the tokenizer has no template."""
        from fssa_fast.generation.prompts import has_template

        if self.policy.chat or (self.policy.chat is None and has_template(self.policy.tokenizer)):
            return messages
        return "\n".join(message["content"] for message in messages) + "\n"

    def _next_seed(self) -> int | None:
        if self.seed is None:
            return None
        self.seed += 1
        return self.seed - 1
