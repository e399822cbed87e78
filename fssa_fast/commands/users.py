"""`fssa users`: the users of a database."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fssa_fast.commands.jsonl import check_keys, choice_of, object_of, read_objects
from fssa_fast.commands.options import Embedder, Policy, Store

if TYPE_CHECKING:
    from fssa_fast.users import StoredUsers, UserStore
    from fssa_fast.users.choices import Choice

app = typer.Typer(help="The users of a database: their choices, and what was made of them.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The user's name.")]


@app.command()
def add(
    policy: Policy,
    name: Name,
    store: Store,
    choices: Annotated[
        Path | None, typer.Option(help='Choices, a JSON line each: "chosen", "rejected", perhaps "prompt".')
    ] = None,
    embedder: Embedder = None,
) -> None:
    """Add a user, or choices to one who is there."""
    own = [choice_of(where, line, name) for where, line in read_objects(choices)] if choices is not None else []
    users = _users(policy, embedder, store)
    user = users.add_choices(name, own) if name in users else users.add(name, own)
    typer.echo(f"{name}: version {user.version}, {len(users.choices(name))} choices")


@app.command()
def show(
    store: Store, name: Annotated[str | None, typer.Argument(help="One user; else all, a line each.")] = None
) -> None:
    """Show users, or one with the choices."""
    at_rest = _open(store)
    if name is None:
        for one in at_rest.names():
            typer.echo(_line(at_rest, one))
        return
    typer.echo(_line(at_rest, name))
    for chosen, rejected in at_rest.choices(name) or ():
        typer.echo(json.dumps(object_of(chosen, rejected), ensure_ascii=False))


@app.command()
def remove(store: Store, name: Name) -> None:
    """Forget a user, with the choices."""
    if not _open(store).remove(name):
        raise ValueError(f"name: expected one who is in the store, got {name!r}")
    typer.echo(f"{name}: removed")


@app.command()
def export(
    store: Store, output: Annotated[Path, typer.Argument(help="Where to write the users, a JSON line each.")]
) -> None:
    """Write all users with their choices, for `fssa users import`."""
    at_rest = _open(store)
    part = output.with_name(output.name + ".part")
    part.unlink(missing_ok=True)
    mine = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)  # what users chose is the owner's alone
    with open(mine, "w", encoding="utf-8") as file, _bar(len(at_rest)) as bar:
        for name in at_rest.names():
            user, choices = at_rest.get(name), at_rest.choices(name)
            if user is not None:
                listed = None if choices is None else [object_of(*pair) for pair in choices]
                line = {"name": name, "strength": user.strength, "choices": listed}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            bar.update()
    part.replace(output)


@app.command("import")
def import_(
    policy: Policy,
    store: Store,
    input: Annotated[
        Path | None, typer.Argument(help='Users, a JSON line each: "name", "choices", and perhaps "strength".')
    ] = None,
    choices: Annotated[
        Path | None, typer.Option(help="In place of INPUT, the users of a file of choices, as for training.")
    ] = None,
    embedder: Embedder = None,
) -> None:
    """Add users, encoded anew. Broken off, it goes on where it was: users who are there are left as they are."""
    if (input is None) == (choices is None):
        raise ValueError("input, --choices: expected one of them, got " + ("both" if input else "neither"))
    listed = _choosing(choices) if choices is not None else _named(input) if input is not None else {}
    users = _users(policy, embedder, store)
    with _bar(len(listed)) as bar:
        names = iter(listed)
        while batch := list(itertools.islice(names, 256)):
            new = [name for name in batch if name not in users]
            users.import_many({name: listed[name][0] for name in new}, {name: listed[name][1] for name in new})
            bar.update(len(batch))
    typer.echo(f"{store}: {len(users)} users")


def _named(input: Path) -> dict[str, tuple[list[Choice], float]]:
    """Users by name: choices and strength. Raises ValueError, with file and line, for what cannot be added."""
    from fssa_fast.users.limits import check_choices, check_name, finite

    found: dict[str, tuple[list[Choice], float]] = {}
    first: dict[str, str] = {}
    for where, line in read_objects(input):
        check_keys(where, line, {"name", "choices"}, {"strength"})
        name, listed, strength = line["name"], line["choices"], line.get("strength", 1.0)
        if not isinstance(listed, list):
            raise ValueError(f"{where}: expected a list of choices, got {listed!r:.80}")
        choices = [choice_of(where, choice) for choice in listed]
        try:
            check_name(name)
            check_choices(choices)
            strength = finite("strength", strength)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if name in found:
            raise ValueError(f"{where}: expected every user once, got {name!r} again, after {first[name]}")
        found[name], first[name] = (choices, strength), where
    return found


def _choosing(path: Path) -> dict[str, tuple[list[Choice], float]]:
    """The users of a file of choices, as training reads it. Raises DataError, with file and line."""
    import torch

    from fssa_fast.data.files import read_choices
    from fssa_fast.users.choices import Choice
    from fssa_fast.users.limits import check_choices, check_name

    found: dict[str, tuple[list[Choice], float]] = {}
    for line in read_choices(path):
        chosen, rejected = (o if isinstance(o, str) else torch.tensor(o) for o in (line.chosen, line.rejected))
        try:
            check_name(line.user)
            own, _ = found.setdefault(line.user, ([], 1.0))
            own.append(Choice(chosen, rejected, line.prompt))
            check_choices(own[-1:])
        except ValueError as error:
            raise ValueError(f"{path}, line {line.line}: {error}") from error
    return found


def _users(policy: str, embedder: str | None, store: str) -> StoredUsers:
    from fssa_fast.policy.encoding import load_encoding
    from fssa_fast.policy.storage import saved_policy
    from fssa_fast.users import StoredUsers, open_store

    encoding = load_encoding(saved_policy("policy", policy), embedder=embedder)
    return StoredUsers(encoding, open_store(store))


def _open(store: str) -> UserStore:
    from fssa_fast.users.open_store import is_url, open_store

    if not is_url(store) and not Path(store).is_file():
        raise FileNotFoundError(f"store: expected a database, got {store}, which is not there")
    return open_store(store)


def _line(at_rest: UserStore, name: str) -> str:
    user = at_rest.get(name)
    if user is None:
        raise ValueError(f"name: expected one who is in the store, got {name!r}")
    choices = "choices not kept" if user.choices is None else f"{user.choices} choices"
    return f"{name}: version {user.version}, strength {user.strength:g}, {choices}"


def _bar(total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="user")
