"""Features on their own scales: a reward model hears each alike, keeps the statistics, says when it extrapolates."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fssa_fast import cli
from fssa_fast.data.choices import ChoiceData
from fssa_fast.data.files import Choice, read_choices, write_choices
from fssa_fast.nn import BTL, NPBTL, CheckpointError, RewardModel
from fssa_fast.steering import ConfigError
from fssa_fast.training.fit import RewardConfig, fit_reward

SHORT = {"max_steps": 3, "warmup_steps": 0, "disable_tqdm": True}


def run(*arguments: object) -> str:
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def write_tables(folder: Path, *, scaled: bool, users: int = 60, items: int = 40) -> None:
    """Items of five features, `year` among them, and ratings by people of whom each likes, or does not, one of two."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((items, 5)).round(3)
    year = rng.integers(1960, 2025, items)
    features[:, 4] = (year - year.mean()) / year.std()
    lines = [f"i{i},{','.join(f'{x}' for x in features[i, :4])}" for i in range(items)]
    last = features[:, 4].round(3) if scaled else year
    folder.mkdir()
    (folder / "items.csv").write_text(
        "item,a,b,c,d,year\n" + "".join(f"{line},{x}\n" for line, x in zip(lines, last, strict=True))
    )
    ratings = [
        f"u{user},i{i},{(1, -1)[user // 2 % 2] * features[i, (0, 4)[user % 2]] + 0.05 * rng.standard_normal():.4f}\n"
        for user in range(users)
        for i in rng.permutation(items)[:12]
    ]
    (folder / "ratings.csv").write_text("user,item,value\n" + "".join(ratings))


def trained(folder: Path, *, scaled: bool) -> tuple[float, str]:
    """By command, from two tables: held-out choices predicted, given ten, and what was said."""
    write_tables(folder, scaled=scaled)
    run("data", "make-choices", folder / "ratings.csv", folder, "--kind", "ratings", "--items", folder / "items.csv",
        "--max-pairs", 30)  # fmt: skip
    (folder / "reward.yaml").write_text(
        "data: {path: choices.jsonl}\noutput: run\nmodel: {latent_width: 16}\n"
        "training: {max_steps: 250, warmup_steps: 5, learning_rate: 1e-2, disable_tqdm: true}\n"
    )
    run("train", "reward", folder / "reward.yaml")
    output = run("eval", folder / "run", "--counts", "10", "--json", folder / "eval.json")
    table = json.loads((folder / "eval.json").read_text())["tables"][0]
    return table["mean, low, high"]["accuracy"]["10"][0], output


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float, str]:
    folder = tmp_path_factory.mktemp("features") / "raw"
    return folder, *trained(folder, scaled=False)


def test_a_column_of_years_costs_no_accuracy(raw: tuple[Path, float, str], tmp_path: Path) -> None:
    scaled, _ = trained(tmp_path / "scaled", scaled=True)
    assert scaled > 0.75 and raw[1] > scaled - 0.02


def test_features_beyond_those_of_training_are_named(raw: tuple[Path, float, str], tmp_path: Path) -> None:
    folder, _, said = raw
    assert "warning" not in said
    choices = read_choices(folder / "choices.jsonl")
    later = [Choice(c.user, (*c.chosen[:4], 2050.0), c.rejected) for c in choices[:60]]
    write_choices(tmp_path / "later.jsonl", [*later, *choices[60:]])
    said = run("eval", folder / "run", "--counts", "1", "--data", tmp_path / "later.jsonl")
    assert "the model extrapolates: feature 5 from 196" in said and " to 2050 (in training from 196" in said


def some_data(width: int = 3, users: int = 6) -> ChoiceData:
    rng = np.random.default_rng(1)
    options = torch.from_numpy(rng.standard_normal((20, width)).astype(np.float32)) * torch.logspace(-2, 5, width)
    choices = tuple(rng.permutation(20)[:16].reshape(8, 2) for _ in range(users))
    return ChoiceData(options, np.arange(20), tuple(f"u{i}" for i in range(users)), choices)


@pytest.mark.parametrize("kind", ["btl", "np-btl"])
def test_statistics_are_the_training_users_and_go_with_the_model(kind: str, tmp_path: Path) -> None:
    data = some_data()
    data.options[:, 1] = 7.0  # constant: 0 for everyone
    fitted = fit_reward(RewardConfig(kind, 8), data, None, tmp_path, training=SHORT, features=True)
    loaded = RewardModel.from_pretrained(tmp_path)
    used = data.options[torch.from_numpy(np.unique(np.concatenate([c.ravel() for c in data.choices])))]
    assert loaded.features is not None and fitted.features is not None
    torch.testing.assert_close(loaded.features.mean, used.double().mean(0).float())
    scaled = loaded.scaled(used)
    torch.testing.assert_close(scaled.std(0, correction=0), torch.tensor([1.0, 0.0, 1.0]))
    assert (scaled[:, 1] == 0).all()
    targets = data.options[:4].view(1, 2, 2, 3)
    none = (torch.empty(0, 2, 3), torch.empty(0, dtype=torch.long), torch.tensor([0, 0]))
    with torch.no_grad():
        given = [targets] if isinstance(loaded, BTL) else [targets, *none]
        torch.testing.assert_close(loaded(*given), fitted(*given))
        loaded.features = None
        assert not torch.allclose(loaded(*given), fitted(*given))


def test_a_file_without_statistics_still_loads(tmp_path: Path) -> None:
    model = NPBTL(3, 8)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("standardized") is False
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert RewardModel.from_pretrained(tmp_path).features is None
    (tmp_path / "config.json").write_text(json.dumps({**config, "standardized": True}))
    with pytest.raises(CheckpointError, match="'features.high' is missing"):
        RewardModel.from_pretrained(tmp_path)


def test_options_that_are_all_the_same_are_refused() -> None:
    with pytest.raises(ValueError, match="options: expected different ones"):
        NPBTL(3, 8).standardize(torch.ones(4, 3))


def test_a_policy_takes_no_encoder_of_features(tmp_path: Path) -> None:
    from test_embedder import make_bert
    from tiny import make_model, make_tokenizer

    make_model().save_pretrained(tmp_path / "model")
    make_bert().save_pretrained(tmp_path / "encoder")
    for name in ("model", "encoder"):
        make_tokenizer().save_pretrained(tmp_path / name)
    choices = [Choice(f"u{u}", f"w{7 + t} w8", f"w{40 + t} w9", f"w{20 + t}") for u in range(10) for t in range(3)]
    write_choices(tmp_path / "choices.jsonl", choices)
    fit_reward(RewardConfig("np-btl", 8), some_data(), None, tmp_path / "reward", training=SHORT, features=True)
    (tmp_path / "policy.yaml").write_text(
        "base: model\ndata: {path: choices.jsonl, embedder: encoder}\noutput: policy\nreward: reward\n"
    )
    with pytest.raises(ConfigError, match="reward: expected one that was trained on texts, got one on features"):
        run("train", "policy", tmp_path / "policy.yaml")
