"""`fssa eval`, `fssa compare`, `fssa gate`: a run on held-out users, two runs on the same ones, and a verdict."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fssa_fast.commands.options import Base, Device, DType, Embedder, placed, warn_outside

if TYPE_CHECKING:
    from fssa_fast.policy import SteerablePolicy
    from fssa_fast.training.config import DataConfig
    from fssa_fast.users import TextEmbedder

Counts = Annotated[str, typer.Option(help="Numbers of choices, with commas.")]
DataFile = Annotated[Path | None, typer.Option(help="A file of choices; without, the run's own and its test users.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Where to write all figures, as JSON.")]


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--counts: expected numbers with commas, got {text!r}") from error
    if min(counts) < 0:
        raise ValueError(f"--counts: expected numbers >= 0, got {text!r}")
    return counts


@dataclass(frozen=True)
class Models:
    """The models that a command was given in place of those that a run names, and where they are loaded."""

    base: str | None
    embedder: str | None
    placed: dict[str, Any]

    def policy(self, run: Path) -> SteerablePolicy:
        from fssa_fast.policy import SteerablePolicy

        return SteerablePolicy.from_pretrained(run, self.base, embedder=self.embedder, **self.placed)

    def text_embedder(self, config: DataConfig) -> TextEmbedder | None:
        """The one that a reward run names, or the one given; None where options are features."""
        given = config if self.embedder is None else replace(config, embedder=self.embedder)
        found = given.load_embedder(ask_hub=self.embedder is not None)
        return None if found is None else found.to(self.placed["device_map"])


@dataclass(frozen=True)
class Setup:
    """Where a run's data is: the file, how the run read it, and the users to measure on (None: all)."""

    path: Path
    config: DataConfig
    users: list[str] | None


def _setup(run: dict[str, Any], data: Path | None) -> Setup:
    from fssa_fast.steering.config import from_json
    from fssa_fast.training.config import DataConfig

    config = run.get("config")
    if config is None:
        raise ValueError("run: expected one of `fssa train`, got one without a configuration")
    read = from_json(DataConfig, config["data"], "run.config.data")
    if data is not None:
        return Setup(data, read, None)
    from fssa_fast.data.choices import split_users
    from fssa_fast.data.files import read_choices
    from fssa_fast.records import file_hash

    if file_hash(read.path) != run["data"]["sha256"]:
        raise ValueError(f"{read.path}: expected the file the run was trained on, got another; name one with --data")
    names = list(dict.fromkeys(choice.user for choice in read_choices(read.path)))
    names = sorted(names) if run["what"] == "policy" else names
    test = split_users(len(names), read.split_seed, read.shares)[2]
    return Setup(Path(read.path), read, [names[i] for i in test])


def _reward_scores(run: Path, setup: Setup, counts: list[int], models: Models) -> dict[int, Any]:
    from fssa_fast.data.choices import held_out_examples
    from fssa_fast.data.files import choice_data, read_choices
    from fssa_fast.nn import RewardModel
    from fssa_fast.training.scores import model_predictor, score, truncate

    choices = read_choices(setup.path)
    if setup.users is not None:
        choices = [choice for choice in choices if choice.user in set(setup.users)]
    embedder = models.text_embedder(setup.config)
    data = choice_data(choices, None if embedder is None else embedder.encode, path=setup.path)
    model = RewardModel.from_pretrained(run)
    warn_outside(model, data.options, str(setup.path))
    predict = model_predictor(model)
    examples = held_out_examples(data, max_context=max(counts), repeats=4)
    return {count: score(predict, data, truncate(examples, count)) for count in counts}


def _policy_shares(run: Path, setup: Setup, counts: list[int], models: Models) -> dict[int, Any]:
    import numpy as np

    from fssa_fast.data.files import read_choices
    from fssa_fast.evaluation.policies import held_out, implicit_margins
    from fssa_fast.training.fit_policy import preferences
    from fssa_fast.training.policy import ReferenceCache

    policy = models.policy(run)
    by_user: dict[str, list[Any]] = {}
    for choice in read_choices(setup.path):
        if setup.users is None or choice.user in setup.users:
            by_user.setdefault(choice.user, []).append(choice)
    assert policy.embedder is not None
    examples = held_out(preferences(by_user, policy.embedder.encode, chat=policy.chat), max_context=max(counts))
    reference = ReferenceCache()
    return {
        count: np.array([(m > 0).mean() for m in implicit_margins(policy, examples, count, reference=reference)])
        for count in counts
    }


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    data: DataFile = None,
    counts: Counts = "0,1,3,5,10",
    base: Base = None,
    embedder: Embedder = None,
    device: Device = None,
    dtype: DType = None,
    json: JsonFile = None,
) -> None:
    """Measure a reward model, or a policy by its implicit rewards, on users it was not trained on."""
    from fssa_fast.evaluation.tables import Cell, Table
    from fssa_fast.records import environment, write_json
    from fssa_fast.training.runs import read_run
    from fssa_fast.training.scores import interval

    record, wanted = read_run(run), _counts(counts)
    models = Models(base, embedder, placed(device, dtype))
    setup = _setup(record, data)
    table = Table(f"{run.name}: held-out choices predicted, %, by choices given", [str(k) for k in wanted])
    found: dict[str, Any] = {"run": str(run), "data": str(setup.path)}
    if record["what"] == "reward":
        scores = _reward_scores(run, setup, wanted, models)
        table.rows["accuracy"] = [Cell(*interval([scores[k].accuracies])) for k in wanted]
        other = Table("Likelihood and calibration", table.columns, scale=1, digits=3)
        other.rows["minus log-likelihood of a choice, nats"] = [Cell(scores[k].nll) for k in wanted]
        other.rows["expected calibration error"] = [Cell(scores[k].calibration_error) for k in wanted]
        found["tables"], tables = [table.json(), other.json()], [table, other]
        found["calibration: stated, right, predictions"] = {k: scores[k].calibration() for k in wanted}
    else:
        shares = _policy_shares(run, setup, wanted, models)
        table.rows["implicit accuracy"] = [Cell(*interval([shares[k]])) for k in wanted]
        found["tables"], tables = [table.json()], [table]
    for each in tables:
        typer.echo(each.markdown() + "\n")
    if json is not None:
        write_json(json, {**found, "environment": environment()})


def compare(
    a: Annotated[Path, typer.Argument(help="A run directory.")],
    b: Annotated[str, typer.Argument(help="Another of the same kind; for policies also: base")],
    data: DataFile = None,
    counts: Counts = "0,1,3,5,10",
    base: Base = None,
    embedder: Embedder = None,
    device: Device = None,
    dtype: DType = None,
    judge: Annotated[Path | None, typer.Option(help="A held-out reward run that names the better text.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of the texts compared.")] = 96,
    prompts: Annotated[int, typer.Option(min=1, help="How many of the held-out prompts to answer.")] = 32,
    json: JsonFile = None,
) -> None:
    """Compare two runs on the same held-out users: A minus B, with paired intervals."""
    from fssa_fast.evaluation.tables import Cell, Table
    from fssa_fast.records import environment, write_json
    from fssa_fast.training.runs import read_run
    from fssa_fast.training.scores import interval

    record, wanted = read_run(a), _counts(counts)
    models = Models(base, embedder, placed(device, dtype))
    setup = _setup(record, data)
    tables = []
    if record["what"] == "reward":
        if judge is not None:
            raise ValueError("--judge: expected none, since these are reward models")
        if read_run(b)["what"] != "reward":
            raise ValueError(f"{b}: expected a reward model, as {a} is one, got another run")
        ours, theirs = (_reward_scores(Path(run), setup, wanted, models) for run in (a, b))
        differences = [ours[k].accuracies - theirs[k].accuracies for k in wanted]
        title = "Held-out choices predicted, %, by choices given"
        rows = {
            f"A: {a.name}": [Cell(*interval([ours[k].accuracies])) for k in wanted],
            f"B: {Path(b).name}": [Cell(*interval([theirs[k].accuracies])) for k in wanted],
            "A - B": [Cell(*interval([d])) for d in differences],
        }
        tables.append(Table(title, [str(k) for k in wanted], rows))
    else:
        from fssa_fast.evaluation.compare import compare_policies

        tables = compare_policies(a, None if b == "base" else Path(b), setup.path, setup.users, judge=judge,
                                  count=max(wanted), prompts=prompts, max_new_tokens=max_new_tokens,
                                  base=base, embedder=embedder, **models.placed)  # fmt: skip
    for table in tables:
        typer.echo(table.markdown() + "\n")
    if json is not None:
        write_json(json, {"a": str(a), "b": b, "tables": [t.json() for t in tables], "environment": environment()})


LOST = 3  # the exit status of a loss: a comparison that could not be made is 1


def _known(record: dict[str, Any]) -> set[str]:
    """The users by whom a run's weights were made or chosen."""
    data, users = record.get("data", {}), record.get("users", {})
    parts = [data.get("training users", ()), data.get("validation users", ())]
    return {name for part in (*parts, users.get("training", ()), users.get("validation", ())) for name in part}


def _unknown_to_both(old: dict[str, Any], new: dict[str, Any], data: Path | None) -> Setup:
    """The users of a file, or of OLD's test, whom neither run knows."""
    from fssa_fast.data.files import read_choices
    from fssa_fast.records import file_hash

    setup = _setup(old, data)
    if data is None and new.get("data", {}).get("sha256") != file_hash(setup.path):
        raise ValueError("--data: expected a file, since the two runs were trained on different ones; got none")
    known = _known(old) | _known(new)
    names = setup.users or list(dict.fromkeys(choice.user for choice in read_choices(setup.path)))
    users = [name for name in names if name not in known]
    if len(users) < 2:
        raise ValueError(f"{setup.path}: expected at least two users whom neither run was trained on, got {len(users)}")
    return Setup(setup.path, setup.config, users)


def gate(
    old: Annotated[Path, typer.Argument(help="The run that serves.")],
    new: Annotated[Path, typer.Argument(help="The run that shall serve.")],
    data: DataFile = None,
    counts: Counts = "0,1,3,5,10",
    base: Base = None,
    embedder: Embedder = None,
    device: Device = None,
    dtype: DType = None,
    judge: Annotated[Path | None, typer.Option(help="Texts too: a held-out reward run names the better.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of the texts compared.")] = 96,
    prompts: Annotated[int, typer.Option(min=1, help="How many of the held-out prompts to answer.")] = 32,
    json: JsonFile = None,
) -> None:  # fmt: skip
    """Exit with 3 where NEW is significantly worse than OLD on users whom neither was trained on; else with 0."""
    from dataclasses import asdict

    from fssa_fast.evaluation.gate import judged, predicted
    from fssa_fast.records import environment, write_json
    from fssa_fast.training.runs import read_run

    records, wanted = (read_run(old), read_run(new)), _counts(counts)
    models = Models(base, embedder, placed(device, dtype))
    if records[0]["what"] != records[1]["what"]:
        raise ValueError(f"{new}: expected a {records[0]['what']} run, as {old} is one, got a {records[1]['what']} run")
    setup = _unknown_to_both(*records, data)
    if records[0]["what"] == "reward":
        if judge is not None:
            raise ValueError("--judge: expected none, since these are reward models")
        scores = [_reward_scores(run, setup, wanted, models) for run in (old, new)]
        shares = [{count: found[count].accuracies for count in wanted} for found in scores]
    else:
        shares = [_policy_shares(run, setup, wanted, models) for run in (old, new)]
    found = [predicted(*shares)]
    if judge is not None:
        from fssa_fast.evaluation.compare import answer_both
        from fssa_fast.nn import RewardModel

        both = answer_both(new, old, setup.path, setup.users, count=max(wanted), prompts=prompts,
                           max_new_tokens=max_new_tokens, base=base, embedder=embedder, **models.placed)  # fmt: skip
        found.append(judged(both.wins(RewardModel.from_pretrained(judge))))
    lost = any(one.lost for one in found)
    typer.echo(f"{new} minus {old}, on {setup.path}, after {counts} choices; 95 % intervals")
    for one in found:
        typer.echo(one.text())
    typer.echo("LOSS" if lost else "no significant loss")
    if json is not None:
        verdict = {"old": str(old), "new": str(new), "data": str(setup.path), "users": setup.users, "counts": wanted}
        rows = [asdict(one) | {"lost": one.lost} for one in found]
        write_json(json, verdict | {"differences": rows, "lost": lost, "environment": environment()})
    if lost:
        raise typer.Exit(LOST)
