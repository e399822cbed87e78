"""`fssa serve`: the policy over HTTP; and `fssa key`, who may ask."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fssa_fast.commands.options import Base, Device, DType, Embedder, Policy, Store, named, placed


def serve(
    policy: Policy,
    store: Store,
    base: Base = None,
    embedder: Embedder = None,
    device: Device = None,
    dtype: DType = None,
    name: Annotated[str | None, typer.Option(help="The policy's name for clients; its folder's, if not given.")] = None,
    host: Annotated[str, typer.Option(help="Where to listen; beyond the loopback only with --api-keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    api_keys: Annotated[Path | None, typer.Option(help="Keys as `fssa key` writes them.")] = None,
    version: Annotated[list[str] | None, typer.Option(help="Another version over the same base, as NAME=DIRECTORY; "
                                                      "may be repeated. POLICY itself is `main`.")] = None,
    share: Annotated[list[str] | None, typer.Option(help="A version's share of the users, as NAME=NUMBER; may be "
                                                    "repeated. 1, if not given.")] = None,
    experiment: Annotated[str, typer.Option(help="Decides, with a user's name, on the version.")] = "",
    history: Annotated[Path | None, typer.Option(help="Where to record completions and choices.")] = None,
    create_users: Annotated[bool, typer.Option(help="A user's first choice makes the user.")] = False,
    rows: Annotated[int, typer.Option(help="Requests that run at once.")] = 32,
    cache_tokens: Annotated[int, typer.Option(help="Tokens in the cache, of all requests together.")] = 16384,
    waiting: Annotated[int, typer.Option(help="Requests that may wait.")] = 1024,
    grace: Annotated[float, typer.Option(help="Seconds that running requests have when the server is stopped.")] = 30.0,
    traces: Annotated[bool, typer.Option(help="Send OpenTelemetry's traces; its variables say where.")] = False,
    ray: Annotated[bool, typer.Option("--ray", help="On Ray Serve: this machine's, or the cluster of RAY_ADDRESS; "
                                      "--history is then a folder.")] = False,
    replicas: Annotated[int, typer.Option(min=1, help="How many, with --ray.")] = 1,
    ssl_certfile: Annotated[Path | None, typer.Option(help="A certificate: serves HTTPS.")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="The certificate's key.")] = None,
) -> None:  # fmt: skip
    """Serve an OpenAI-compatible API, whose field `user` steers, and a page to try it on."""
    from fssa_fast.commands.extras import needs

    with needs("serve"):
        from fssa_fast.serving import Settings, make_app
        from fssa_fast.serving.keys import read_keys
        from fssa_fast.serving.server import is_loopback, run
        from fssa_fast.serving.traces import export
        from fssa_fast.serving.versions import Shelf, Versions
    from fssa_fast.data.history import History
    from fssa_fast.policy.storage import saved_policy
    from fssa_fast.users import open_store
    from fssa_fast.users.open_store import is_url

    keys = None if api_keys is None else read_keys(api_keys)
    if keys is None and not is_loopback(host):
        raise ValueError(f"host: expected the loopback, since no --api-keys are given; got {host}")
    directories = {"main": saved_policy("policy", policy)}
    directories |= {name: Path(where) for name, where in named("--version", version)}
    shares = {name: _number("--share", number) for name, number in named("--share", share)}
    for unknown in shares.keys() - directories.keys():
        raise ValueError(f"--share: expected a version of {', '.join(directories)}, got {unknown!r}")
    if traces:
        with needs("traces"):
            export()
    if ray:
        for option, value in (("ssl-certfile", ssl_certfile), ("ssl-keyfile", ssl_keyfile), ("traces", traces or None)):
            if value is not None:
                raise ValueError(f"--{option}: expected none with --ray, got {value}")
        with needs("ray"):
            from fssa_fast.serving import ray as on_ray
        # Replicas have other working folders.
        paths = {"policy": directories["main"], "api_keys": api_keys, "history": history}
        given: dict[str, Any] = {key: None if path is None else str(path.resolve()) for key, path in paths.items()}
        given["store"] = store if is_url(store) else str(Path(store).resolve())
        arguments = on_ray.Arguments(
            **given, base=base, embedder=embedder, name=name, without_keys=keys is None, create_users=create_users,
            rows=rows, cache_tokens=cache_tokens, waiting=waiting, grace=grace, dtype=dtype,
            gpus=int(str(placed(device, dtype)["device_map"]).startswith("cuda")),
        )  # fmt: skip
        there = {one: on_ray.HeldVersion(policy=str(where.resolve()), share=shares.get(one, 1.0))
                 for one, where in directories.items()}  # fmt: skip
        on_ray.run(arguments, on_ray.Held(versions=there, experiment=experiment), host=host, port=port,
                   replicas=replicas)  # fmt: skip
        return
    if replicas > 1:
        raise ValueError(f"--replicas: expected 1 without --ray, got {replicas}")
    users = open_store(store)
    engine = {"max_rows": rows, "max_tokens": cache_tokens, "max_waiting": waiting, "step_tokens": max(256, rows)}
    shelf = Shelf(directories["main"], base, embedder, users, engine, len(directories) > 1, **placed(device, dtype))
    held = Versions([shelf.make(*one, shares.get(one[0], 1.0)) for one in directories.items()], experiment)
    recorded = None if history is None else History(history, experiment)
    app = make_app(held, users, Settings(name or Path(policy).resolve().name, create_users), keys, history=recorded)
    typer.echo(f"http{'s' if ssl_certfile else ''}://{host}:{port}/", err=True)
    run(app, host=host, port=port, grace_seconds=grace,
        ssl_certfile=ssl_certfile, ssl_keyfile=ssl_keyfile)  # fmt: skip
    users.close()


def _number(option: str, given: str) -> float:
    try:
        return float(given)
    except ValueError as error:
        raise ValueError(f"{option}: expected NAME=NUMBER, got {given!r}") from error


def key(
    file: Annotated[Path, typer.Argument(help="The file for `--api-keys`, made where there is none.")],
    namespace: Annotated[str, typer.Argument(help="Whose users the key sees: small letters, digits, hyphens.")] = "",
    admin: Annotated[bool, typer.Option(help="A key that sees everybody's, in place of a namespace.")] = False,
    requests_per_minute: Annotated[int | None, typer.Option(help="No limit, if not given.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Of prompts and answers.")] = None,
    open_requests: Annotated[int | None, typer.Option(help="That run or wait at once.")] = None,
) -> None:  # fmt: skip
    """Make a key for `fssa serve`, and print it: the file holds its SHA-256 only."""
    from fssa_fast.commands.extras import needs

    with needs("serve"):
        from fssa_fast.serving.keys import add_key

    typer.echo(
        add_key(file, namespace=namespace, admin=admin, requests_per_minute=requests_per_minute,
                tokens_per_minute=tokens_per_minute, open_requests=open_requests)
    )  # fmt: skip
