"""The reproductions, on a small scale: that they train, measure on what is held out, and say what they found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fssa_fast import cli
from fssa_fast.data.synthetic import bayes_optimum, disagreement, reward, synthetic
from fssa_fast.nn import NPBTL, RewardModel
from fssa_fast.reproduce import people
from fssa_fast.reproduce.step_cost import MAKE, base_model, make_batch
from fssa_fast.reproduce.synthetic import COUNTS, MODELS, reproduce
from fssa_fast.training.runs import read_run


def test_the_synthetic_task_is_the_published_one() -> None:
    parts = synthetic()
    sizes = [len(part.choices[0]) for part in parts]
    assert sum(sizes) == 20_000 and sizes[0] > 15_800 and min(sizes) > 1_900
    assert disagreement(parts[2]) == pytest.approx(0.469, abs=5e-4)
    assert [round(100 * bayes_optimum(disagreement(parts[2]), k), 1) for k in COUNTS] == [76.5, 87.5, 96.5, 99.0, 100.0]
    for part in parts:
        for which, own in enumerate(part.choices):
            values = reward(which, part.options[:, 0].double().numpy())[own]
            assert (values[:, 0] >= values[:, 1] - 1e-6).all() and len(np.unique(part.groups[own[:, 0]])) == len(own)
    rows = [{tuple(row) for row in part.options.view(-1, 2).tolist()} for part in parts]
    assert not rows[0] & rows[2] and not rows[1] & rows[2]


def test_rewards_learn_the_synthetic_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fssa_fast.reproduce.synthetic.REPEATS", 50)
    models = {name: MODELS[name] for name in ("BTL", "NP-BTL")}
    found = reproduce(seeds=[0], runs=tmp_path, steps=100, models=models)
    table = found["tables"][0]
    np_btl, btl = ([cell.mean for cell in table.rows[name]] for name in ("NP-BTL", "BTL"))
    assert np_btl[-1] > 0.9 and np_btl[-1] > np_btl[0] + 0.1 and len(set(btl)) == 1 and 0.6 < btl[0] < 0.8
    assert len(found["checks"]) == len(COUNTS) and "NOT within" in " ".join(found["checks"])
    assert "| NP-BTL |" in table.markdown() and table.csv().startswith("model,column,mean,low,high\nBTL,0,")
    run = read_run(tmp_path / "np-btl-0")
    assert run["status"] == "finished" and run["steps"] == 100 and run["seed"] == 0 and run["data"] == "synthetic"
    assert run["training"]["max_steps"] == 100 and "torch" in run["environment"]["packages"]
    assert isinstance(RewardModel.from_pretrained(tmp_path / "np-btl-0"), NPBTL)


def test_the_command_writes_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fssa_fast.reproduce.synthetic.REPEATS", 4)
    path = tmp_path / "found.json"
    done = CliRunner().invoke(cli.app, ["reproduce", "synthetic", "--seeds", "1", "--steps", "2", "--json", str(path)])
    assert done.exit_code == 0, done.output
    content = json.loads(path.read_text())
    assert content["result"] == "synthetic" and content["seeds"] == 1 and content["checks"]
    rows = content["tables"][0]["mean, low, high"]
    assert set(rows) == {*MODELS, "Bayes optimum"}
    for cells in rows.values():
        mean, low, high = cells["10"]
        assert low is None or low <= mean <= high
    assert "| Bayes optimum | 76.55 |" in done.output
    assert "log-loss, nats" in done.output and "expected calibration error" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["polis"], "--data: expected the data set's directory"),
        (["synthetic", "--data", "x"], "--data: expected none"),
        (["synthetic", "--base", "x"], "--base: expected no"),
        (["policy", "--data", "x"], "--base: expected a base"),
        (["hh", "--data", "x", "--conversation", "y"], "--conversation: expected none for hh"),
    ],
)
def test_what_a_result_needs_is_named(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(cli.app, ["reproduce", *arguments])
    assert done.exit_code != 0 and message in str(done.exception)


# ---------------------------------------------------------------- real people, in miniature


def test_real_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = "user,situation,choice,price_a,time_a,change_a,comfort_a,price_b,time_b,change_b,comfort_b\n"
    draw = np.random.default_rng(0)
    rows = []
    for user in range(60):
        for situation in range(10):
            a, b = draw.integers(1, 50, (2, 4)).tolist()
            rows.append(f"{user},{situation},{int(a[user % 2] > b[user % 2])},{','.join(map(str, a + b))}")
    (tmp_path / "train_pairs.csv").write_text(header + "\n".join(rows) + "\n")
    task = replace(people.TASKS["stated-choice"][0], simulated=40, members=1, repeats=1)
    monkeypatch.setitem(people.TASKS, "stated-choice", (task,))
    found = people.reproduce("stated-choice", data=tmp_path, seeds=[0], steps=4, runs=tmp_path / "runs")
    table = found["tables"][0]
    assert set(table.rows) == {people.LINEAR, "BTL", "DPL", "variational (VPL-style)", "NP-BTL"}
    linear = [cell.mean for cell in table.rows[people.LINEAR]]
    assert linear[-1] > 0.7 and linear[-1] > linear[0]
    against = [line for line in found["checks"] if people.LINEAR in line]
    assert len(against) == 4 and all("NOT above" in line for line in against)
    loss, error = found["tables"][1:3]
    assert "log-loss" in loss.title and "calibration" in error.title
    for figures in (loss, error):
        assert set(figures.rows) == set(table.rows) and figures.columns == table.columns == ["0", "1", "3", "5", "8"]
    assert loss.rows[people.LINEAR][-1].mean < loss.rows[people.LINEAR][0].mean
    assert found["settings"][0]["choices given, mean"][0] == 0
    run = read_run(tmp_path / "runs" / "stated-choice-train-np-btl-0-0")
    assert run["split seed"] == 0 and run["status"] == "finished"


def test_compressed_options_are_the_principal_components() -> None:
    parts = synthetic()
    wide = [replace(p, options=torch.cat([p.options, 0 * p.options, 3 - p.options], 1)) for p in parts]
    one = people.compress((wide[0], wide[1], wide[2]), 1)
    centred = wide[2].options - wide[0].options.mean(0)
    assert one[2].options.shape == (len(wide[2].options), 1)
    torch.testing.assert_close(one[2].options.abs()[:, 0], centred.norm(dim=1), rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- the cost of a step


def test_both_ways_of_a_step_train_the_same() -> None:
    sizes = {"blocks": 2, "width": 64, "vocabulary": 60}
    batch = make_batch(2, 4, 6, 60, context=3)
    losses = {}
    for name in ("the reference's way", "ours, first time over the data", "ours, later times, blocks recomputed"):
        step = MAKE[name](base_model(**sizes))
        losses[name] = [step(batch) for _ in range(8)]
    for own in losses.values():
        assert own[0] == pytest.approx(np.log(2), abs=1e-5) and own[-1] < own[0]
