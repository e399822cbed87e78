"""`fssa users`: the users of a database."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fssa_fast.commands.jsonl import check_keys, choice_of, object_of, read_objects
from fssa_fast.commands.options import Base, Embedder, Policy, Store, load_policy

if TYPE_CHECKING:
    from fssa_fast.users import SqliteStore, StoredUsers
    from fssa_fast.users.choices import Choice

app = typer.Typer(help="The users of a database: their choices, and what was made of them.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The user's name.")]


@app.command()
def add(
    policy: Policy,
    name: Name,
    store: Store,
    choices: Annotated[
        Path | None, typer.Option(help='Choices, a JSON line each: "chosen", "rejected" and perhaps "prompt".')
    ] = None,
    base: Base = None,
    embedder: Embedder = None,
) -> None:
    """Add a user, or choices to one who is there."""
    own = [choice_of(where, line) for where, line in read_objects(choices)] if choices is not None else []
    users = _users(policy, base, embedder, store)
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
        raise ValueError(f"name: expected a user of {store}, got {name!r}")
    typer.echo(f"{name}: removed")


@app.command()
def export(
    store: Store, output: Annotated[Path, typer.Argument(help="Where to write the users, a JSON line each.")]
) -> None:
    """Write all users with their choices, for `fssa users import`."""
    at_rest = _open(store)
    part = output.with_name(output.name + ".part")
    with part.open("w", encoding="utf-8") as file, _bar(len(at_rest)) as bar:
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
    input: Annotated[Path, typer.Argument(help='Users, a JSON line each: "name", "choices", and perhaps "strength".')],
    base: Base = None,
    embedder: Embedder = None,
) -> None:
    """Add users, encoded anew. Broken off, it goes on where it was: users who are there are left as they are."""
    lines = [(where, line) for where, line in read_objects(input)]
    batches = [_named(lines[start : start + 256]) for start in range(0, len(lines), 256)]
    users = _users(policy, base, embedder, store)
    with _bar(len(lines)) as bar:
        for choices, strengths in batches:
            new = {name: own for name, own in choices.items() if name not in users}
            users.import_many(new, strengths)
            bar.update(len(choices))
    typer.echo(f"{store}: {len(users)} users")


def _named(lines: list[tuple[str, dict[str, Any]]]) -> tuple[dict[str, list[Choice]], dict[str, float]]:
    choices: dict[str, list[Choice]] = {}
    strengths: dict[str, float] = {}
    for where, line in lines:
        check_keys(where, line, {"name", "choices"}, {"strength"})
        if not isinstance(line["choices"], list):
            raise ValueError(f"{where}: expected a list of choices, got {line['choices']!r:.80}")
        choices[line["name"]] = [choice_of(where, choice) for choice in line["choices"]]
        strengths[line["name"]] = line.get("strength", 1.0)
    return choices, strengths


def _users(policy: Path, base: str | None, embedder: str | None, store: Path) -> StoredUsers:
    from fssa_fast.users import StoredUsers

    users = load_policy(policy, base, embedder, store).users
    assert isinstance(users, StoredUsers)
    return users


def _open(store: Path) -> SqliteStore:
    from fssa_fast.users import SqliteStore

    if not store.is_file():
        raise FileNotFoundError(f"store: expected a database, got {store}, which is not there")
    return SqliteStore(store)


def _line(at_rest: SqliteStore, name: str) -> str:
    user = at_rest.get(name)
    if user is None:
        raise ValueError(f"name: expected a user of {at_rest.path}, got {name!r}")
    choices = "choices not kept" if user.choices is None else f"{user.choices} choices"
    return f"{name}: version {user.version}, strength {user.strength:g}, {choices}"


def _bar(total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="user")
