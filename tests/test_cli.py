"""The command `fssa`, and `python -m fssa_fast`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import fssa_fast
from fssa_fast import PRIOR, SteerablePolicy, cli
from fssa_fast.nn import RewardModel
from fssa_fast.policy.reference_checkpoint import read_reference

GOLDEN = Path(__file__).parent / "golden"


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of the command as it is installed."""
    monkeypatch.setattr(sys, "argv", ["fssa", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code if isinstance(left.value.code, int) else 0


def test_version() -> None:
    result = CliRunner().invoke(cli.app, ["--version"])
    assert result.exit_code == 0 and result.output.strip() == fssa_fast.__version__


def test_doctor() -> None:
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 0
    lines = dict(line.split(None, 1) for line in result.output.splitlines() if not line.startswith("backend"))
    assert lines["fssa_fast"] == fssa_fast.__version__ and lines["torch"] == torch.__version__
    backends = [line.split()[1] for line in result.output.splitlines() if line.startswith("backend")]
    assert backends == ["cuda", "triton", "cpu"]


def test_the_module_prints_the_same_report() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fssa_fast"], cwd=GOLDEN.parents[1], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout.startswith("fssa_fast") and "backend cpu" in done.stdout


def test_no_command_gives_help() -> None:
    result = CliRunner().invoke(cli.app, [])
    assert "import-reference" in result.output and "doctor" in result.output


@pytest.mark.parametrize("name", ["checkpoint_reward_dpl", "checkpoint_reward_npbtl"])
def test_rewards_are_imported(name: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["import-reference", str(GOLDEN / name), str(tmp_path / "out")])
    assert result.exit_code == 0 and "written" in result.output, result.output
    ours, source = RewardModel.from_pretrained(tmp_path / "out"), read_reference(GOLDEN / name)
    assert isinstance(source, RewardModel) and type(ours) is type(source)
    state = source.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in ours.state_dict().items())


@pytest.mark.parametrize("name", ["checkpoint_policy_llama", "checkpoint_policy_qwen2"])
def test_policies_are_imported(name: str, tmp_path: Path) -> None:
    base = str(GOLDEN / name / "base")
    for options in ([], ["--base", base]):
        out = tmp_path / f"out{len(options)}"
        result = CliRunner().invoke(cli.app, ["import-reference", str(GOLDEN / name), str(out), *options])
        assert result.exit_code == 0, (result.output, result.exception)
        ours = SteerablePolicy.from_pretrained(out, base)
        direct = SteerablePolicy.from_reference(GOLDEN / name, AutoModelForCausalLM.from_pretrained(base))
        ids = torch.arange(3, 10)[None]
        with torch.no_grad(), ours.steer([PRIOR]), direct.steer([PRIOR]):
            steered = ours.model(ids).logits
            assert torch.equal(steered, direct.model(ids).logits)
            with ours.steer([fssa_fast.BASE]):
                assert not torch.allclose(steered, ours.model(ids).logits)
        with safe_open(*out.glob("steering-*.safetensors"), framework="pt") as file:
            assert any(".fssa." in key for key in file.keys())


def without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def holding(name: str, data: bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(data)


class Evil:
    """What a pickle could run."""

    def __reduce__(self) -> Any:
        return (print, ("the pickle ran",))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("config.yaml"), "config.yaml"),
        (without("model_best.pt"), "model_best.pt"),
        (holding("config.yaml", b"model: [1"), "config.yaml"),
        (holding("config.yaml", b"model:\n\t- x\n"), "config.yaml"),
        (holding("config.yaml", b"!!python/object/apply:print ['the pickle ran']"), "config.yaml"),
        (holding("config.yaml", b"model: {model_type: oracle}"), "'oracle'"),
        (holding("model_best.pt", b"PK"), "model_best.pt"),
        (lambda folder: torch.save({"x": Evil()}, folder / "model_best.pt"), "model_best.pt"),
        (lambda folder: torch.save({"x": torch.zeros(3)}, folder / "model_best.pt"), "missing|not expected"),
    ],
)
def test_a_hostile_directory_is_one_line(
    spoil: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(GOLDEN / "checkpoint_reward_dpl", tmp_path / "copy"))
    spoil(folder)
    assert run_main(monkeypatch, "import-reference", str(folder), str(tmp_path / "out")) == 1
    out, err = capsys.readouterr()
    assert "pickle ran" not in out + err and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1 and err.startswith("error: ")
    assert any(part in err for part in message.split("|"))
    assert not (tmp_path / "out").exists()


def test_a_base_that_does_not_fit_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["import-reference", str(GOLDEN / "checkpoint_policy_llama"), str(tmp_path / "out"), "--base"]
    for base in (str(tmp_path / "nowhere"), str(GOLDEN / "checkpoint_reward_dpl")):
        assert run_main(monkeypatch, *arguments, base) == 1
        err = capsys.readouterr().err
        assert err.splitlines()[-1].startswith("error: ") and "Traceback" not in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_command_that_ends_well_ends_with_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_main(monkeypatch, "doctor") == 0
    assert run_main(monkeypatch, "no-such-command") == 2
