"""Runs in processes of their own: killed and resumed, two instead of one; and what a run directory holds."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fssa_fast.data.choices import ChoiceExamples
from fssa_fast.data.synthetic import synthetic
from fssa_fast.nn import CheckpointError, RewardModel
from fssa_fast.training.config import PolicyRun, RewardRun, read_run_config
from fssa_fast.training.fit import RewardConfig, fit_reward
from fssa_fast.training.policy import ReferenceCache
from fssa_fast.training.reward import RewardArguments, RewardTrainer, scale_first_layers
from fssa_fast.training.runs import last_checkpoint, read_run, write_run

SCRIPT = Path(__file__).with_name("train_tiny.py")


def start(folder: Path, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """train_tiny.py in a process."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> None:
    output, _ = process.communicate(timeout=500)
    assert process.returncode == status, output[-3000:]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps of four examples that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(folder, 6, 4))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(*(folder / "policy").glob("steering-*.safetensors"))


def test_killed_while_writing_a_checkpoint_and_resumed(whole: Path, tmp_path: Path) -> None:
    # Each checkpoint is several torch.saves: the second checkpoint is being written.
    saves = len([p for p in (whole / "checkpoint-2").iterdir() if p.suffix in (".pt", ".pth")])
    assert saves >= 2
    finish(start(tmp_path, 6, 4, saves + 1), -signal.SIGKILL)
    assert (tmp_path / "checkpoint-4").exists() or list(tmp_path.glob("*checkpoint-4*"))
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    finish(start(tmp_path, 6, 4))
    theirs = weights(whole)
    for name, tensor in weights(tmp_path).items():
        assert torch.equal(tensor, theirs[name]), name


def test_two_processes_do_what_one_does(whole: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    both = [start(tmp_path, 6, 2, **shared, RANK=str(i), LOCAL_RANK=str(i)) for i in range(2)]
    for process in both:
        finish(process)
    ours, theirs = (json.loads((folder / "losses.json").read_text()) for folder in (tmp_path, whole))
    assert [entry["step"] for entry in ours] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "accuracy", "margin", "likelihood"):
            assert float(a[name]) == pytest.approx(float(b[name]), abs=2e-4), (name, a, b)
    expected = weights(whole)
    for name, tensor in weights(tmp_path).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=2e-4)


def test_the_reference_is_kept_on_disk(whole: Path, tmp_path: Path) -> None:
    path = whole / "reference.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    assert len(lines) == len({key for key, _ in lines}) == 12  # of twelve answers, once each
    torn = tmp_path / "torn.jsonl"
    torn.write_text(path.read_text() + '["a line that a killed run left')
    cache = ReferenceCache(torn)
    assert cache._known == dict(lines)
    cache._keep("next", -1.5)
    assert ReferenceCache(torn)._known == {**dict(lines), "next": -1.5}


# ---------------------------------------------------------------- rewards


def small(steps: int = 6, **training: Any) -> dict[str, Any]:
    return {"max_steps": steps, "per_device_train_batch_size": 4, "warmup_steps": 0, "disable_tqdm": True,
            "use_cpu": True, **training}  # fmt: skip


def test_a_reward_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    train, validation, _ = synthetic()
    config = RewardConfig(latent_width=8, sampled=True, dropout=0.1)
    saving = small(save_strategy="steps", save_steps=2)
    one = fit_reward(config, train, None, tmp_path / "one", training=saving)
    fit_reward(config, train, None, tmp_path / "two", training=saving)
    for late in (4, 6):  # as if it had been killed after its second step
        for file in (tmp_path / "two" / f"checkpoint-{late}").iterdir():
            file.unlink()
    torch.manual_seed(5)
    two = fit_reward(config, train, None, tmp_path / "two", training=saving, resume=True)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name
    loaded = RewardModel.from_pretrained(tmp_path / "two")
    assert loaded.config == one.config and read_run(tmp_path / "two")["steps"] == 6


def test_logs_go_to_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    train = synthetic()[0]
    training = small(report_to="tensorboard", logging_steps=2)
    fit_reward(RewardConfig(latent_width=8), train, None, tmp_path, training=training)
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    written = {event.step: event.value for event in events.Scalars("train/loss")}
    logged = {entry["step"]: entry["loss"] for entry in read_run(tmp_path)["log"] if "loss" in entry}
    assert written.keys() == logged.keys() == {2, 4, 6}
    assert all(written[step] == pytest.approx(logged[step], rel=1e-4) for step in logged)


def test_the_best_evaluation_is_kept(tmp_path: Path) -> None:
    train, validation, _ = synthetic()
    training = small(eval_steps=2, learning_rate=0.3, lr_scheduler_type="constant")  # so large that it gets worse
    fit_reward(RewardConfig(latent_width=8), train, validation, tmp_path, training=training)
    log = read_run(tmp_path)["log"]
    found = {entry["step"]: float(entry["eval_nll"]) for entry in log if "eval_nll" in entry}
    best = min(found, key=found.__getitem__)
    assert set(found) == {2, 4, 6}
    kept = load_file(*tmp_path.glob("model-*.safetensors"))
    if best != 6:
        wanted = load_file(*tmp_path.glob(f"checkpoint-{best}/model-*.safetensors"))
        assert all(torch.equal(kept[name], wanted[name]) for name in kept)


def test_nan_is_named_and_checkpoints_kept(tmp_path: Path) -> None:
    train, _, _ = synthetic()
    data = ChoiceExamples(train, length=40)
    model = RewardConfig(latent_width=8).build(1)
    scale_first_layers(model, train.options)
    args = RewardArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, save_steps=1, max_steps=4,
                           per_device_train_batch_size=4, disable_tqdm=True, dataloader_pin_memory=False)  # fmt: skip
    trainer = RewardTrainer(model, args, data)
    step = trainer.training_step

    def spoil(*arguments: Any, **options: Any) -> Any:
        if trainer.state.global_step == 2:
            with torch.no_grad():
                model.decoder1.weight.fill_(float("nan"))
        return step(*arguments, **options)

    trainer.training_step = spoil  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="loss: .* got nan at step 3"):
        trainer.train()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert all(torch.isfinite(t).all() for t in load_file(*tmp_path.glob("checkpoint-2/model-*.safetensors")).values())


@pytest.mark.parametrize("bound", ["reference", "neural-process", "variational"])
def test_sampled_latents_train_under_every_bound(bound: str, tmp_path: Path) -> None:
    train, _, _ = synthetic()
    training = small(bound=bound, samples=2, embedding_noise=0.1, kl_warmup_ratio=0.3)
    model = fit_reward(RewardConfig(latent_width=8, sampled=True), train, None, tmp_path, training=training)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_first_layers_see_numbers_of_size_one() -> None:
    options = 3 + 0.01 * torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    plain, scaled = (RewardConfig(latent_width=64).build(6) for _ in range(2))
    scaled.load_state_dict(plain.state_dict())
    scale_first_layers(scaled, options)
    standard = (options - options.mean(0)) / (options - options.mean(0)).square().mean().sqrt()
    torch.testing.assert_close(scaled.target0(options), plain.target0(standard), rtol=1e-3, atol=1e-3)
    pairs = torch.stack([options, options.flip(0)], 1).flatten(1)
    wanted = torch.stack([standard, standard.flip(0)], 1).flatten(1)
    torch.testing.assert_close(scaled.encoder.inner0(pairs), plain.encoder.inner0(wanted), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="options: expected different"):
        scale_first_layers(plain, torch.ones(4, 6))


# ---------------------------------------------------------------- configurations and run directories


REWARD = """
data: {path: choices.jsonl}
output: runs/reward
model: {kind: np-btl, latent_width: 16}
training: {max_steps: 20, learning_rate: 3e-3}
"""


def test_a_configuration_is_read(tmp_path: Path) -> None:
    path = tmp_path / "reward.yaml"
    path.write_text(REWARD)
    run = read_run_config(RewardRun, path, ["model.latent_width=32", "training.weight_decay=0.1", "seed=4"])
    assert run.model.latent_width == 32 and run.seed == 4 and run.data.path == str(tmp_path / "choices.jsonl")
    assert run.training == {"max_steps": 20, "learning_rate": 0.003, "weight_decay": 0.1}
    assert run.output == str(tmp_path / "runs" / "reward")


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        (REWARD + "modle: {}", [], "reward.yaml.modle: unknown key"),
        (REWARD, ["model.latent=3"], "reward.yaml.model.latent: unknown key"),
        (REWARD, ["training.max_step=3"], "reward.yaml.training.max_step: unknown key"),
        (REWARD, ["training.max_steps=many"], "training.max_steps: expected int, got 'many'"),
        (REWARD, ["training.learning_rate=fast"], "training.learning_rate: expected a number, got 'fast'"),
        (REWARD, ["model.kind=np"], "reward.yaml.model.kind: expected one of"),
        (REWARD, ["model.latent_width=1.5"], "model.latent_width: expected int, got 1.5"),
        (REWARD, ["data.path.x=1"], "--set data.path.x=1: 'path' has no keys"),
        (REWARD, ["seed"], "--set: expected key=value, got 'seed'"),
        (REWARD, ["training.output_dir=x"], "training.output_dir: unknown key"),
        ("data: [", [], "reward.yaml: not plain YAML"),
        ("- 1", [], "reward.yaml: expected keys and values, got list"),
        ("output: x", [], "reward.yaml: .*data"),
    ],
)
def test_bad_configurations_are_named(text: str, settings: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "reward.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_run_config(RewardRun, path, settings)


def test_a_policy_configuration_takes_adapters(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("base: b\ndata: {path: c}\noutput: o\nloras: [{rank: 4}]\ntraining: {beta: 0.2, fp16: false}\n")
    run = read_run_config(PolicyRun, path)
    assert run.loras[0].rank == 4 and run.training["beta"] == 0.2
    assert run.base == "b"  # no folder: a name of the hub
    (tmp_path / "b").mkdir()
    assert read_run_config(PolicyRun, path).base == str(tmp_path / "b")
    assert read_run_config(PolicyRun, path, ["base=./nowhere"]).base == str(tmp_path / "nowhere")


def test_a_run_of_a_newer_version(tmp_path: Path) -> None:
    write_run(tmp_path, {"what": "reward"})
    assert read_run(tmp_path) == {"what": "reward"}
    (tmp_path / "run.json").write_text('{"version": 2}')
    with pytest.raises(CheckpointError, match="run.json: expected version 1, got 2"):
        read_run(tmp_path)
    with pytest.raises(CheckpointError, match="run.json: cannot be read"):
        read_run(tmp_path / "nowhere")
