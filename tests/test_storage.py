"""Saving and loading: the same policy comes back, and nothing else gets in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import WIDTH, make_choices, make_ids, make_model, make_policy, make_tokenizer
from torch import Tensor

from fssa_fast import BASE, PRIOR, ConfigError, EncoderConfig, LoraConfig, SteerablePolicy, SteeringConfig
from fssa_fast.nn import CheckpointError

CONFIG, WEIGHTS = "steering.json", "steering.safetensors"
USERS = ["alice", BASE, PRIOR]


def weights_of(folder: Path) -> Path:
    (path,) = folder.glob("steering*.safetensors")
    return path


def served(policy: SteerablePolicy) -> tuple[Tensor, Tensor]:
    """The rows of two users, and logits of a mixed batch."""
    if "alice" not in policy.users:
        policy.users.add("alice", make_choices(1))
    with torch.no_grad(), policy.steer(USERS) as slots:
        return policy.bank.rows[slots.long()].clone(), policy.model(make_ids(3)).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    make_policy().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """The saved policy as format 1 had it, with a fixed name for the tensors."""
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    weights_of(folder).rename(folder / WEIGHTS)
    edit_config(lambda c: (c.pop("weights"), c["base"].pop("revision"), c.update(format_version=1)))(folder)
    return folder


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_loaded_policy_is_the_saved_one_bit_for_bit(name: str, tmp_path: Path) -> None:
    film = (1,)
    policy = make_policy(make_model(name), film, ("scale", "none", "scale_shift"))
    wanted = served(policy)
    policy.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([CONFIG, weights_of(tmp_path).name])
    loaded = SteerablePolicy.from_pretrained(tmp_path, make_model(name))
    assert loaded.steering == policy.steering and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(served(loaded), wanted, strict=True))
    theirs = dict(loaded.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in policy.named_parameters())
    loaded.save_pretrained(tmp_path / "again")
    assert weights_of(tmp_path / "again").read_bytes() == weights_of(tmp_path).read_bytes()


def test_neither_base_nor_users_are_saved(saved: Path) -> None:
    names = set(load_file(weights_of(saved)))
    assert all(name.startswith(("encoder.", "modulator.")) or ".fssa." in name for name in names)
    assert weights_of(saved).stat().st_size < 100_000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_saving_in_half_the_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    policy = make_policy()
    rows, logits = served(policy)
    policy.save_pretrained(tmp_path, dtype=dtype)
    assert {tensor.dtype for tensor in load_file(weights_of(tmp_path)).values()} == {dtype}
    loaded = SteerablePolicy.from_pretrained(tmp_path, make_model())
    assert loaded.modulator.weight.dtype == torch.float32
    assert torch.equal(loaded.modulator.weight, policy.modulator.weight.to(dtype).float())
    close = served(loaded)
    size = 2.0 ** (-7 if dtype == torch.bfloat16 else -10)
    torch.testing.assert_close(close[0], rows, rtol=4 * size, atol=4 * size)
    assert torch.equal(close[1][1], logits[1]) and (close[1] - logits).abs().max() < 0.1 * logits.abs().max()


def test_saving_over_an_older_policy(copy: Path) -> None:
    policy = make_policy(seed=5)
    wanted = served(policy)
    policy.save_pretrained(copy)
    loaded = SteerablePolicy.from_pretrained(copy, make_model())
    assert all(torch.equal(a, b) for a, b in zip(served(loaded), wanted, strict=True))
    assert sorted(p.name for p in copy.iterdir()) == sorted([CONFIG, weights_of(copy).name])  # the older ones are gone


def test_a_policy_of_format_1_is_the_same(copy: Path) -> None:
    loaded = SteerablePolicy.from_pretrained(copy, make_model())
    assert all(torch.equal(a, b) for a, b in zip(served(loaded), served(make_policy()), strict=True))


def test_damage_within_the_tensors_is_noticed(saved: Path, tmp_path: Path) -> None:
    path = weights_of(Path(shutil.copytree(saved, tmp_path / "copy")))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # the same names, shapes and dtypes, and a finite number
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged: its content is not that which its name says"):
        SteerablePolicy.from_pretrained(path.parent, make_model())


def test_base_and_tokenizer_by_path(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    policy = make_policy(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    wanted = served(policy)
    policy.save_pretrained(tmp_path / "policy")
    for base in (None, str(tmp_path / "base")):
        loaded = SteerablePolicy.from_pretrained(tmp_path / "policy", base)
        assert all(torch.equal(a, b) for a, b in zip(served(loaded), wanted, strict=True))
        assert loaded.generate(["w7 w8"], ["alice"], max_new_tokens=2)


def test_no_base_named(saved: Path) -> None:
    with pytest.raises(ValueError, match="^base: .*None"):
        SteerablePolicy.from_pretrained(saved)


# ---------------------------------------------------------------- another base


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_model("mistral"), "architecture 'LlamaForCausalLM'.*'MistralForCausalLM'"),
        (lambda: make_model(hidden_size=48, head_dim=12), "hidden_size 32.*48"),
        (lambda: make_model(num_hidden_layers=3), "blocks 2.*3"),
        (lambda: make_model(vocab_size=65), "vocabulary 64.*65"),
        (lambda: make_model(seed=3), "weights.*others"),
    ],
)
def test_another_base_is_refused_and_left_alone(make: Any, message: str, saved: Path) -> None:
    model = make()
    keys = set(model.state_dict())
    with pytest.raises(ValueError, match=f"^base: expected .*{message}"):
        SteerablePolicy.from_pretrained(saved, model)
    assert set(model.state_dict()) == keys and all(p.requires_grad for p in model.parameters())


def test_weights_of_wide_models_are_told_apart() -> None:
    from fssa_fast.users.embedder import same_fingerprint, weight_fingerprint

    def wide(seed: int) -> Any:
        return make_model(seed=seed, hidden_size=4096, head_dim=8, num_hidden_layers=1, intermediate_size=8)

    one, other = wide(0), weight_fingerprint(wide(1))
    own = weight_fingerprint(one)
    assert same_fingerprint(own, weight_fingerprint(one.bfloat16())) and not same_fingerprint(own, other)


def test_the_base_may_be_in_another_precision(saved: Path) -> None:
    assert SteerablePolicy.from_pretrained(saved, make_model(dtype=torch.bfloat16)).bank.rows.dtype == torch.bfloat16


# ---------------------------------------------------------------- damaged, foreign and hostile files


def edit_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = json.loads((folder / CONFIG).read_text())
        change(data)
        (folder / CONFIG).write_text(json.dumps(data))

    return edit


def edit_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return edit


def keep(name: str, count: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:count])  # type: ignore[return-value]


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data)  # type: ignore[return-value]


A = "model.model.layers.1.self_attn.v_proj.fssa.a.1"
LORA = {"targets": ["q_proj"], "rank": 4, "alpha": 8.0, "modulation": "none"}
HOSTILE: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), CheckpointError, CONFIG),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), CheckpointError, f"{WEIGHTS}: there is no such file"),
    "half a config": (keep(CONFIG, 200), CheckpointError, f"{CONFIG}: not JSON"),
    "an empty config": (keep(CONFIG, 0), CheckpointError, f"{CONFIG}: not JSON"),
    "bytes for a config": (write(CONFIG, b"\xff\xfe\x00"), CheckpointError, CONFIG),
    "a deep config": (write(CONFIG, b"[" * 100_000), CheckpointError, f"{CONFIG}: not JSON"),
    "a number of many digits": (write(CONFIG, b"9" * 10_000), CheckpointError, f"{CONFIG}: "),
    "a list for a config": (write(CONFIG, b"[1]"), CheckpointError, f"{CONFIG}: .*format_version"),
    "a huge config": (write(CONFIG, b" " * (2 << 20)), CheckpointError, f"{CONFIG}: .*bytes"),
    "half the weights": (keep(WEIGHTS, 5000), CheckpointError, f"{WEIGHTS}: not a whole safetensors file"),
    "no byte of weights": (keep(WEIGHTS, 0), CheckpointError, f"{WEIGHTS}: not a whole safetensors file"),
    "a pickle for weights": (lambda f: torch.save({}, f / WEIGHTS), CheckpointError, f"{WEIGHTS}: not a whole"),
    "a huge header": (write(WEIGHTS, b"\xff" * 7 + b"\x00{}"), CheckpointError, f"{WEIGHTS}: not a whole"),
    "a folder for weights": (
        lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()),
        CheckpointError,
        f"{WEIGHTS}: there is no such file",
    ),
    "an extra tensor": (
        edit_tensors(lambda t: t.update(extra=torch.zeros(1))),
        CheckpointError,
        "'extra' is not expected",
    ),
    "a tensor of the base": (
        edit_tensors(lambda t: t.update({"model.lm_head.weight": torch.zeros(64, 32)})),
        CheckpointError,
        "'model.lm_head.weight' is not expected",
    ),
    "a missing tensor": (edit_tensors(lambda t: t.pop(A)), CheckpointError, f"'{A}' is missing"),
    "a wrong shape": (
        edit_tensors(lambda t: t.update({A: t[A][:-1].clone()})),
        CheckpointError,
        rf"'{A}': expected shape \[4, 32\], got \[3, 32\]",
    ),
    "integers": (edit_tensors(lambda t: t.update({A: t[A].long()})), CheckpointError, f"'{A}': expected dtype"),
    "two dtypes": (edit_tensors(lambda t: t.update({A: t[A].half()})), CheckpointError, f"'{A}': expected dtype"),
    "NaN": (edit_tensors(lambda t: t[A].view(-1)[5:6].fill_(float("nan"))), CheckpointError, f"'{A}': .*NaN"),
    "infinity": (
        edit_tensors(lambda t: t["modulator.bias"][3:4].fill_(float("inf"))),
        CheckpointError,
        "'modulator.bias': .*infinity",
    ),
    "weights elsewhere": (edit_config(lambda c: c.update(weights="../w")), CheckpointError, "'weights': expected"),
    "other weights": (edit_config(lambda c: c.update(weights="w")), CheckpointError, "'weights': expected"),
    "a newer format": (edit_config(lambda c: c.update(format_version=3)), CheckpointError, "1 or 2, got 3"),
    "a format of true": (edit_config(lambda c: c.update(format_version=True)), ConfigError, "format_version.*True"),
    "no format": (edit_config(lambda c: c.pop("format_version")), CheckpointError, "format_version 1 or 2, got None"),
    "an unknown key": (edit_config(lambda c: c["config"].update(flim=True)), ConfigError, "config.flim: unknown key"),
    "a missing key": (edit_config(lambda c: c["config"].pop("encoder")), ConfigError, "config: .*'encoder'"),
    "a text for a rank": (
        edit_config(lambda c: c["config"]["loras"][0].update(rank="4")),
        ConfigError,
        r"loras\[0\].rank: expected int, got '4'",
    ),
    "an unknown pooling": (
        edit_config(lambda c: c["config"]["encoder"].update(pooling="max")),
        ConfigError,
        "encoder.pooling: .*'max'",
    ),
    "NaN for alpha": (
        edit_config(lambda c: c["config"]["loras"][0].update(alpha=float("nan"))),
        ConfigError,
        "alpha: .*nan",
    ),
    "heads that do not divide": (edit_config(lambda c: c["config"]["encoder"].update(heads=3)), ConfigError, "heads"),
    "no film": (edit_config(lambda c: c["config"].update(film=[7])), ConfigError, r"film: .*\[0, 2\), got 7"),
    "film twice": (edit_config(lambda c: c["config"].update(film=[1, 1])), ConfigError, "film: .*once"),
    "another rank": (
        edit_config(lambda c: c["config"]["loras"][0].update(rank=5)),
        CheckpointError,
        "expected shape",
    ),
    # Sizes that no machine has: refused before they are asked for.
    "a huge rank": (
        edit_config(lambda c: c["config"]["loras"][0].update(rank=1 << 40)),
        CheckpointError,
        "expected shape",
    ),
    "a huge latent": (
        edit_config(lambda c: c["config"]["encoder"].update(latent_width=1 << 36)),
        (CheckpointError, ConfigError),  # type: ignore[dict-item]
        "expected shape|encoder: ",
    ),
    "a huge embedding": (
        edit_config(lambda c: c["config"]["encoder"].update(embedding_width=1 << 62)),
        (CheckpointError, ConfigError),  # type: ignore[dict-item]
        "expected shape|encoder: ",
    ),
    "thousands of adapters": (
        edit_config(lambda c: c["config"].update(loras=[LORA] * 3000)),
        CheckpointError,
        "is missing|expected shape",
    ),
    "another base": (edit_config(lambda c: c["base"].update(blocks=3)), ValueError, "base: expected blocks 3.*2"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_bad_files_are_refused_before_the_model_is_touched(case: str, copy: Path) -> None:
    spoil, error, message = HOSTILE[case]
    spoil(copy)
    model = make_model()
    keys = set(model.state_dict())
    with pytest.raises(error, match=message):
        SteerablePolicy.from_pretrained(copy, model)
    assert set(model.state_dict()) == keys and all(p.requires_grad for p in model.parameters())


def test_a_model_that_lacks_the_targets(tmp_path: Path) -> None:
    model = make_model()
    config = SteeringConfig(EncoderConfig(WIDTH, 16, heads=2), False, (LoraConfig(("mlp.down_proj",), 2),))
    SteerablePolicy(model, config).save_pretrained(tmp_path)
    edit_config(lambda c: c["config"]["loras"][0].update(targets=["mlp.dwon_proj"]))(tmp_path)
    with pytest.raises(ConfigError, match="'mlp.dwon_proj' names no projection"):
        SteerablePolicy.from_pretrained(tmp_path, make_model())


def test_an_embedder_for_a_policy_that_has_none(saved: Path) -> None:
    with pytest.raises(ValueError, match="^embedder: expected None"):
        SteerablePolicy.from_pretrained(saved, make_model(), embedder="somewhere")
