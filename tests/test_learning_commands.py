"""The commands that make, train, measure, compare and draw, and the examples, on small made-up people."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_embedder import make_bert
from tiny import make_model, make_tokenizer
from typer.testing import CliRunner

from fssa_fast import SteerablePolicy, cli
from fssa_fast.data.choices import ChoiceData, Example, held_out_examples
from fssa_fast.data.files import Choice, choice_data, read_choices, write_choices
from fssa_fast.evaluation.gate import judged, predicted
from fssa_fast.evaluation.linear import HierarchicalLogit, UserLogits
from fssa_fast.evaluation.questions import ask, expected_information
from fssa_fast.nn import NPBTL, RewardModel
from fssa_fast.training.runs import read_run
from fssa_fast.training.scores import Floats, Scores, interval, score, truncate

PNG = b"\x89PNG\r\n\x1a\n"


def run(*arguments: object) -> str:
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def write_people(folder: Path, users: int = 60, items: int = 40) -> tuple[Path, Path]:
    """Tables of items with two features, and of ratings by people who like either the first or the second."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((items, 2)).round(3)
    table = "item,first,second\n" + "".join(f"i{i},{a},{b}\n" for i, (a, b) in enumerate(features))
    rows = []
    for user in range(users):
        for i in rng.permutation(items)[:16]:
            rows.append(f"u{user:02},i{i},{features[i, user % 2] + 0.05 * rng.standard_normal():.4f}\n")
    (folder / "items.csv").write_text(table)
    (folder / "ratings.csv").write_text("user,item,value\n" + "".join(rows))
    return folder / "ratings.csv", folder / "items.csv"


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with choices, and two reward runs on them: of points, and of sampled latents."""
    folder = tmp_path_factory.mktemp("people")
    ratings, items = write_people(folder)
    output = run("data", "make-choices", ratings, folder, "--kind", "ratings", "--items", items, "--max-pairs", 40)
    assert "2400 choices of 60 users\n" in output and "left out" not in output
    config = folder / "reward.yaml"
    config.write_text(
        "data: {path: choices.jsonl}\noutput: np\nmodel: {latent_width: 16}\n"
        "training: {max_steps: 250, eval_steps: 125, warmup_steps: 5, learning_rate: 1e-2, disable_tqdm: true}\n"
    )
    run("train", "reward", config)
    run("train", "reward", config, "--set", "model.sampled=true", "--set", "output=sampled")
    run("train", "reward", config, "--set", "model.kind=btl", "--set", "output=btl", "--set", "training.max_steps=20",
        "--set", "training.eval_steps=20")  # fmt: skip
    return folder


def test_a_trained_reward_is_measured_on_its_held_out_users(people: Path) -> None:
    found = people / "eval.json"
    output = run("eval", people / "np", "--counts", "0,1,10", "--json", found)
    rows = json.loads(found.read_text())["tables"][0]["mean, low, high"]["accuracy"]
    assert rows["10"][0] > 0.8 and rows["10"][0] > rows["0"][0] + 0.1 and rows["10"][1] < rows["10"][0] < rows["10"][2]
    assert "expected calibration error" in output
    record = read_run(people / "np")
    split = record["users"]
    assert len(split["training"]) == 42 and len(split["test"]) == 12 and not set(split["training"]) & set(split["test"])
    assert record["config"]["model"]["latent_width"] == 16 and len(record["data"]["sha256"]) == 64
    assert isinstance(RewardModel.from_pretrained(people / "np"), NPBTL)


def test_two_rewards_are_compared(people: Path) -> None:
    found = people / "compare.json"
    output = run("compare", people / "np", people / "btl", "--counts", "0,10", "--json", found)
    rows = json.loads(found.read_text())["tables"][0]["mean, low, high"]
    assert rows["A - B"]["10"][1] > 0 and "A - B" in output
    same = run("compare", people / "np", people / "np", "--counts", "3")
    assert "| A - B | 0.0 [0.0, 0.0] |" in same


def gate(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, ["gate", *map(str, arguments)])
    assert done.exit_code in (0, 3), done.output
    return done.exit_code, done.output


def test_the_gate_lets_no_loss_through(people: Path) -> None:
    """`btl` knows no user: after choices it loses against `np`. The way back is a gain, and an equal pair no loss."""
    found = people / "gate.json"
    code, output = gate(people / "np", people / "btl", "--counts", "3,10", "--json", found)
    said = json.loads(found.read_text())
    (difference,) = said["differences"]
    assert code == 3 and said["lost"] and difference["high"] < 0 and difference["n"] == len(said["users"]) == 12
    assert output.endswith("LOSS\n") and "over 12 users: a loss" in output and str(people / "choices.jsonl") in output
    code, output = gate(people / "btl", people / "np", "--counts", "3,10")
    assert code == 0 and "a gain" in output
    code, output = gate(people / "np", people / "np")
    assert code == 0 and "+0.0 [+0.0, +0.0] over 12 users" in output and output.endswith("no significant loss\n")


def test_the_gate_measures_on_nobody_whom_either_run_knows(people: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(people / "np", other)
    record = json.loads((other / "run.json").read_text())
    test = record["users"]["test"]
    record["users"]["training"] += test[:5]
    (other / "run.json").write_text(json.dumps(record))
    gate(people / "np", other, "--json", tmp_path / "gate.json")
    assert json.loads((tmp_path / "gate.json").read_text())["users"] == test[5:]
    record["users"]["validation"] += test[5:]
    (other / "run.json").write_text(json.dumps(record))
    for change, message in ((None, "at least two users whom neither run"), ("sha256", "trained on different ones")):
        if change:
            record["data"][change] = "0" * 64
            (other / "run.json").write_text(json.dumps(record))
        done = CliRunner().invoke(cli.app, ["gate", str(people / "np"), str(other)])
        assert done.exit_code == 1 and message in str(done.exception)


def test_the_gates_verdict_by_hand() -> None:
    rng = np.random.default_rng(0)
    old = {count: rng.random(200) for count in (1, 5)}
    worse = {count: old[count] - 0.02 + 0.1 * rng.standard_normal(200) for count in old}  # 0.005 is its deviation
    found = predicted(old, worse)
    assert found.lost and found.n == 200 and found.mean == pytest.approx(-0.02, abs=0.01)
    # Where nothing differs but by chance, one test of forty says loss.
    alarms = [predicted({1: rng.random(50)}, {1: rng.random(50)}).lost for _ in range(400)]
    assert sum(alarms) < 22  # 10 expected; more than 21 in one case of two thousand
    with pytest.raises(ValueError, match="new: expected shares for the users"):
        predicted(old, {1: old[1]})
    with pytest.raises(ValueError, match="at least two"):
        predicted({1: np.ones(1)}, {1: np.ones(1)})
    assert judged(np.array([0.0, 0.5, 0.0, 0.0])).lost and not judged(np.full(4, 0.5)).lost


def test_plots_are_drawn(people: Path, tmp_path: Path) -> None:
    run("eval", people / "np", "--json", tmp_path / "e.json")
    for source in (tmp_path / "e.json", people / "np"):
        run("plot", source, tmp_path / "out.png")
        assert (tmp_path / "out.png").read_bytes().startswith(PNG)
        (tmp_path / "out.png").unlink()
    for source, out, message in (
        (people / "np", "x.pdf", "ends in .png"),
        (people / "choices.json", "x.png", "tables"),
    ):
        done = CliRunner().invoke(cli.app, ["plot", str(source), str(tmp_path / out)])
        assert done.exit_code and message in str(done.exception)


def test_a_run_whose_data_changed_is_named(people: Path, tmp_path: Path) -> None:
    record = json.loads((people / "np" / "run.json").read_text())
    record["data"]["sha256"] = "0" * 64
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "run.json").write_text(json.dumps(record))
    done = CliRunner().invoke(cli.app, ["eval", str(copy)])
    assert done.exit_code and "expected the file the run was trained on" in str(done.exception)


# ---------------------------------------------------------------- questions


def test_questions_that_tell_users_apart_come_first(people: Path, tmp_path: Path) -> None:
    model = NPBTL.from_pretrained(people / "sampled")
    clear = torch.tensor([[[2.0, -2.0], [-2.0, 2.0]]])  # the two kinds of people disagree
    alike = torch.tensor([[[2.0, 2.0], [-2.0, -2.0]]])  # nobody does
    both = torch.cat([clear, alike])
    before = expected_information(model, torch.empty(0, 2, 2), both)
    assert before[0] > 0.1 and before[0] > 3 * before[1] and (before >= 0).all() and before[0] < np.log(2) + 1e-3
    after = expected_information(model, clear.repeat(6, 1, 1), both)
    assert after[0] < 0.5 * before[0]
    write_choices(tmp_path / "pool.jsonl", [Choice("u", *(tuple(o.tolist()) for o in pair)) for pair in both.flip(0)])
    (tmp_path / "known.jsonl").write_text("")
    output = run("ask", people / "sampled", tmp_path / "known.jsonl", tmp_path / "pool.jsonl")
    assert output.splitlines()[0].split("\t")[1] == "line 2" and len(output.splitlines()) == 2
    with pytest.raises(ValueError, match="model: expected sampled latents"):
        expected_information(NPBTL.from_pretrained(people / "np"), torch.empty(0, 2, 2), both)
    data = choice_data(read_choices(tmp_path / "pool.jsonl"))
    known, pool = data.choices[0][:0], data.choices[0]
    assert ask(model, data, known, pool) == 1
    with pytest.raises(ValueError, match="pool"):
        ask(model, data, known, known)


# ---------------------------------------------------------------- measuring


def test_scores_by_hand() -> None:
    found = [np.array([0.9, 0.2]), np.array([0.5]), np.array([0.6, 0.8, 0.7, 0.4])]
    scores = Scores(np.repeat([7, 7, 9], [2, 1, 4]), found)
    assert scores.accuracies.tolist() == [0.5, 0.75] and scores.accuracy == 0.625
    one = (-np.log([0.9, 0.2]).mean() - np.log(0.5)) / 2
    two = -np.log([0.6, 0.8, 0.7, 0.4]).mean()
    assert scores.nll == pytest.approx((one + two) / 2)
    perfect = Scores(np.arange(4), [np.array([0.75])] * 3 + [np.array([0.25])])
    assert perfect.calibration_error == pytest.approx(0) and perfect.calibration() == [(0.75, 0.75, 4)]
    mean, low, high = interval([np.array([0.0, 1.0] * 50), np.array([1.0] * 100)])
    assert mean == 0.75 and 0.68 < low < 0.73 and 0.77 < high < 0.82


def test_overlapping_draws_are_no_independent_units() -> None:
    """An interval over draws that share their pairs would be far too narrow: pairs are drawn again, not draws."""
    rng = np.random.default_rng(0)
    right = rng.random(40) < 0.6  # a predictor that knows some pairs and not others
    options = torch.zeros(80, 1)
    pairs = np.arange(80).reshape(40, 2)
    data = ChoiceData(options, np.arange(80) // 2, ("one",), (pairs,))
    examples = [Example(0, pairs[:0], pairs[rng.permutation(40)[:30]][:, ::order]) for order in [1, -1] * 200]

    def predict(_: ChoiceData, given: Sequence[Example]) -> list[Floats]:
        return [np.where(right[e.targets.min(1) // 2], 0.9, 0.1) for e in given]

    by_pair, by_draw = (score(predict, data, examples, unit=unit) for unit in ("pair", "example"))
    assert by_pair.accuracies.tolist() == right.astype(float).tolist()  # both orders of a pair are one unit
    assert by_pair.accuracy == pytest.approx(by_draw.accuracy, abs=0.01)
    widths = [high - low for _, low, high in (interval([scores.accuracies]) for scores in (by_pair, by_draw))]
    assert widths[0] == pytest.approx(4 * (right.std() / 40**0.5), rel=0.1) and widths[1] < widths[0] / 5


def test_a_logit_a_user_and_bayes_over_them() -> None:
    rng = np.random.default_rng(0)
    options = torch.from_numpy(rng.standard_normal((200, 3)).astype(np.float32))
    pairs = rng.permutation(200).reshape(100, 2)
    first = np.where((options[pairs[:, 0], 0] > options[pairs[:, 1], 0]).numpy()[:, None], pairs, pairs[:, ::-1])
    data = ChoiceData(options, np.arange(200), ("up", "down"), (first, first[:, ::-1].copy()))
    model = UserLogits(data.of_users([0, 1]), data)
    torch.testing.assert_close(model.weights[0], -model.weights[1])
    unknown, known, other = model.predict(
        data, [Example(0, first[:0], first[50:]), Example(0, first[:5], first[50:]), Example(1, first[:5], first[50:])]
    )
    assert unknown == pytest.approx(np.full(50, 0.5)) and (known > 0.5).all() and (known == other).all()



def test_the_linear_model_finds_linear_people(people: Path) -> None:
    data = choice_data(read_choices(people / "choices.jsonl"))
    train, test = data.of_users(range(40)), data.of_users(range(40, 60))
    linear = HierarchicalLogit(train, iterations=15)
    examples = held_out_examples(test, max_context=10, repeats=2)
    shares = [score(linear.predict, test, truncate(examples, count)).accuracy for count in (0, 10)]
    assert shares[1] > 0.85 and shares[1] > shares[0] + 0.1
    simulated = linear.simulate(train, 50, seed=1)
    taken = [score(linear.predict, simulated, truncate(held_out_examples(simulated, max_context=10), k)).accuracy
             for k in (0, 10)]  # fmt: skip
    assert len(simulated.users) == 50 and taken[1] > taken[0] + 0.03


# ---------------------------------------------------------------- policies and examples


def write_texts(path: Path) -> Path:
    """Users who want answers of low words, and users who want high ones; six prompts."""
    choices = []
    for user in range(10):
        for topic in range(6):
            answers = (f"w{6 + topic} w7 w8", f"w{40 + topic} w50 w51")[:: 1 if user % 2 else -1]
            choices.append(Choice(f"u{user}", *answers, prompt=f"w{20 + topic} w30"))
    write_choices(path, choices)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base model, a tiny text encoder and choices between texts."""
    folder = tmp_path_factory.mktemp("models")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    make_bert().save_pretrained(folder / "encoder")
    make_tokenizer().save_pretrained(folder / "encoder")
    write_texts(folder / "choices.jsonl")
    return folder


def test_a_policy_is_trained_measured_and_compared(models: Path) -> None:
    config = models / "policy.yaml"
    config.write_text(
        "base: model\ndata: {path: choices.jsonl, embedder: encoder}\noutput: policy\nlatent_width: 16\n"
        "loras: [{targets: [q_proj, v_proj], rank: 4}]\n"
        "training: {max_steps: 30, learning_rate: 5e-3, warmup_steps: 0, likelihood_weight: 0.0, disable_tqdm: true,\n"
        "  use_cpu: true, save_steps: 15}\n"
    )
    run("train", "policy", config)
    policy = models / "policy"
    loaded = SteerablePolicy.from_pretrained(policy)
    record = read_run(policy)
    assert loaded.embedder is not None and record["status"] == "finished"
    # Users not trained on say which weights are kept; two of them show how it writes.
    evaluated = {entry["step"]: entry["eval_loss"] for entry in record["log"] if "eval_loss" in entry}
    assert set(evaluated) == {15, 30} and sum("eval_accuracy" in entry for entry in record["log"]) == 2
    assert record["kept"] == {"step": min(evaluated, key=evaluated.__getitem__), "eval_loss": min(evaluated.values())}
    best = load_file(*policy.glob(f"checkpoint-{record['kept']['step']}/steering-*.safetensors"))
    kept = load_file(*policy.glob("steering-*.safetensors"))
    assert all(torch.equal(tensor, best[name]) for name, tensor in kept.items())
    data = record["data"]
    assert data["validation users"] and not set(data["validation users"]) & set(data["training users"])
    samples = [json.loads(line) for line in (policy / "samples.jsonl").read_text().splitlines()]
    shown = data["validation users"][:2]
    assert [(line["step"], line["user"]) for line in samples] == [(step, user) for step in (15, 30) for user in shown]
    output = run("eval", policy, "--counts", "0,3", "--json", models / "eval.json")
    assert "implicit accuracy" in output
    share = json.loads((models / "eval.json").read_text())["tables"][0]["mean, low, high"]["implicit accuracy"]
    assert all(0 <= low <= mean <= high <= 1 for mean, low, high in share.values()) and set(share) == {"0", "3"}
    # A base that was moved is found where it is said to be, and another one refused.
    (models / "model").rename(models / "moved")
    with pytest.raises(ValueError, match="base: expected"):
        run("eval", policy, "--counts", "0")
    again = run("eval", policy, "--counts", "0,3", "--base", models / "moved", "--embedder", models / "encoder")
    assert again[again.index("**") :] == output[output.index("**") :]
    with pytest.raises(ValueError, match="base: expected the weights of"):
        make_model(seed=5).save_pretrained(models / "other")
        run("eval", policy, "--counts", "0", "--base", models / "other")
    (models / "moved").rename(models / "model")
    reward = models / "reward.yaml"
    reward.write_text(
        "data: {path: choices.jsonl, embedder: encoder}\noutput: judge\nmodel: {latent_width: 16}\n"
        "training: {max_steps: 20, warmup_steps: 0, disable_tqdm: true}\n"
    )
    run("train", "reward", reward)
    output = run("compare", policy, "base", "--counts", "3", "--prompts", 4, "--max-new-tokens", 6,
                 "--judge", models / "judge")  # fmt: skip
    for name in ("words", "ended", "distinct", "likelihood", "judged"):
        assert f"| {name} |" in output
    same = run("compare", policy, policy, "--counts", "3", "--prompts", 4, "--max-new-tokens", 6)
    assert same.count("0.000 [0.000, 0.000] |") >= 4
    code, output = gate(policy, policy, "--counts", "0,3", "--prompts", 4, "--max-new-tokens", 6, "--judge",
                        models / "judge")  # fmt: skip
    assert code == 0 and "texts that win, beyond one half, %: +0.0 [+0.0, +0.0] over 2 users" in output
    # The reward's encoder can be taken over, and then stays as it is but for the size of its latents.
    run("train", "policy", config, "--set", "reward=judge", "--set", "output=second", "--set", "training.max_steps=2")
    opposed = ("examples.opposed=true", "examples.min_context=2", "modulation_mean=0.0", "training.max_steps=2")
    run("train", "policy", config, "--set", "output=third", *(part for each in opposed for part in ("--set", each)))
    stopped = ("patience=1", "samples=0", "training.learning_rate=0.0", "training.save_steps=1", "output=stopped")
    run("train", "policy", config, *(part for each in stopped for part in ("--set", each)))
    assert read_run(models / "stopped")["steps"] == 2  # no lower loss: it ends
    assert not (models / "stopped" / "samples.jsonl").exists()
    with pytest.raises(ValueError, match="examples.targets: expected 1 .*got 2"):
        run("train", "policy", config, "--set", "examples.opposed=true", "--set", "examples.targets=2")
    second = read_run(models / "second")
    assert second["config"]["reward"] == str(models / "judge")
    run("plot", policy, models / "log.png")
    assert (models / "log.png").read_bytes().startswith(PNG)


def test_a_reward_on_the_hidden_states_of_a_language_model(models: Path) -> None:
    config = models / "states.yaml"
    config.write_text(
        "data: {path: choices.jsonl, embedder: model, pooling: last}\noutput: states\nmodel: {latent_width: 16}\n"
        "training: {max_steps: 60, warmup_steps: 0, disable_tqdm: true}\n"
    )
    run("train", "reward", config)
    reward = RewardModel.from_pretrained(models / "states")
    assert reward.embedding_width == make_model().config.hidden_size
    run("eval", models / "states", "--counts", "5", "--json", models / "states.json")
    found = json.loads((models / "states.json").read_text())["tables"][0]["mean, low, high"]["accuracy"]["5"]
    assert found[0] > 0.8


def test_the_example_with_a_table(tmp_path: Path, capsys: Any) -> None:
    example = importlib.import_module("examples.train_reward")
    ratings, items = write_people(tmp_path, users=30)
    found = example.main(str(ratings), str(items), str(tmp_path / "out"), steps=150)
    assert found[10][0] > 0.7 and "10 choices:" in capsys.readouterr().out


def test_the_example_with_a_model(models: Path, tmp_path: Path, capsys: Any) -> None:
    example = importlib.import_module("examples.steer")
    arguments = (models / "model", models / "encoder", models / "choices.jsonl", tmp_path / "out")
    answers = example.main(*map(str, arguments), steps=2)
    assert len(answers) == 2 and len(list((tmp_path / "out").glob("steering-*"))) == 1


@pytest.mark.parametrize("name", ["reward", "policy"])
def test_example_configurations_are_right(name: str) -> None:
    from fssa_fast.training.config import PolicyRun, RewardRun, read_run_config

    path = Path(__file__).parents[1] / "examples" / f"{name}.yaml"
    run = read_run_config(RewardRun if name == "reward" else PolicyRun, path)
    assert run.data.path.endswith("choices.jsonl")
