"""Reading the reference's checkpoints: what is read, and what is refused."""

import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from fssa_fast.nn import BTL, DPL, NPBTL, CheckpointError
from fssa_fast.policy.reference_checkpoint import ReferencePolicy, policy_from_state, read_reference

H, E, D, RANK, BLOCKS = 16, 6, 12, 4, 3
POLICY = {
    "model_type": "policy",
    "llm_name": "tiny",
    "input_dim": E,
    "hidden_dim": H,
    "is_conditional": True,
    "sample_latents": False,
    "context_agg_func": "self-attention",
    "context_input_encoder": "linear",
    "num_film_layers": -1,
    "tune_llm": True,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "lora_r": RANK,
}
REWARD = {
    "model_type": "reward",
    "input_dim": E,
    "hidden_dim": H,
    "is_conditional": True,
    "sample_latents": False,
    "context_agg_func": "mean",
    "context_input_encoder": "mlp",
    "target_input_encoder": "mlp",
    "distributional_head": False,
}
LLM = "model.decoder.conditional_llm.base."


def linear(name, out, inputs):
    return {f"{name}.weight": torch.randn(out, inputs), f"{name}.bias": torch.randn(out)}


def mlp(name, inputs, out):
    return linear(f"{name}.net.0", H, inputs) | linear(f"{name}.net.2", out, H)


def policy_state(film=range(BLOCKS), lora=True):
    """A policy's tensors as the reference names them, with FiLM on some of three blocks."""
    torch.manual_seed(0)
    prefix = "model.context_encoder."
    state = linear(prefix + "inner_encoder", H, 2 * E) | mlp(prefix + "outer_encoder", H, H)
    state |= {f"{prefix}self_attention.in_proj_weight": torch.randn(3 * H, H)}
    state |= {f"{prefix}self_attention.in_proj_bias": torch.randn(3 * H)}
    state |= linear(prefix + "self_attention.out_proj", H, H)
    layers = LLM + ("model.model.layers" if lora else "model.layers")
    for block in range(BLOCKS):
        inside = ".block" if block in film else ""
        if block in film:
            state |= linear(f"{layers}.{block}.film.gamma_mlp.net.0", D, H)
            state |= linear(f"{layers}.{block}.film.beta_mlp.net.0", D, H)
        for projection, width in (("q_proj", D), ("v_proj", D // 2)) if lora else ():
            name = f"{layers}.{block}{inside}.self_attn.{projection}"
            state[f"{name}.lora_A.default.weight"] = torch.randn(RANK, D)
            state[f"{name}.lora_B.default.weight"] = torch.randn(width, RANK)
    return state


def reward_state(conditional=True, outputs=1):
    torch.manual_seed(0)
    state = mlp("model.target_encoder.inner_encoder", E, H)
    net = "model.decoder.decoder.net" if conditional else "model.decoder.net"
    state[f"{net}.0.weight"] = torch.randn(H, 2 * H if conditional else H)
    for name in ("weight", "bias", "running_mean", "running_var"):
        state[f"{net}.1.{name}"] = torch.rand(H)
    state[f"{net}.1.num_batches_tracked"] = torch.tensor(7)
    state[f"{net}.3.weight"] = torch.randn(outputs, H)
    if conditional:
        state |= mlp("model.context_encoder.inner_encoder", 2 * E, H) | mlp("model.context_encoder.outer_encoder", H, H)
    return state


def write(directory, config, state):
    (directory / "config.yaml").write_text(yaml.safe_dump({"model": config, "loss": {"beta_dpo": 0.05}}))
    torch.save(state, directory / "model_best.pt")
    return directory


def refused(directory, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read_reference(directory)
    assert str(directory) in str(caught.value)


# ---------------------------------------------------------------- what is read


def test_policy(tmp_path):
    state = policy_state()
    state = {name: torch.nn.Parameter(tensor) for name, tensor in state.items()}  # as the reference saves them
    source = read_reference(write(tmp_path, POLICY | {"device": "cuda:1"}, state))
    assert isinstance(source, ReferencePolicy)
    assert source.config["llm_name"] == "tiny" and source.alpha == 32.0 and source.rank == RANK
    encoder = source.encoder
    assert not encoder.training and encoder.config == {
        "embedding_width": E,
        "latent_width": H,
        "inner": "linear",
        "pooling": "self-attention",
        "heads": 8,
        "dropout": 0.1,
        "sampled": False,
    }
    assert torch.equal(encoder.qkv.weight, state["model.context_encoder.self_attention.in_proj_weight"])
    assert sorted(source.film) == [0, 1, 2]
    film, name = source.film[1], f"{LLM}model.model.layers.1.film."
    assert torch.equal(film.scale, state[name + "gamma_mlp.net.0.weight"])
    assert torch.equal(film.scale_bias, state[name + "gamma_mlp.net.0.bias"] - 1)
    assert torch.equal(film.shift, state[name + "beta_mlp.net.0.weight"])
    assert torch.equal(film.shift_bias, state[name + "beta_mlp.net.0.bias"])
    assert list(source.lora) == [f"model.layers.{b}.self_attn.{p}" for b in range(BLOCKS) for p in ("q_proj", "v_proj")]
    lora, name = source.lora["model.layers.2.self_attn.v_proj"], f"{LLM}model.model.layers.2.block.self_attn.v_proj."
    assert torch.equal(lora.a, state[name + "lora_A.default.weight"]) and lora.a.shape == (RANK, D)
    assert torch.equal(lora.b, state[name + "lora_B.default.weight"].T) and lora.b.shape == (RANK, D // 2)
    assert not any(t.requires_grad for t in (film.scale, lora.a, lora.b))


@pytest.mark.parametrize("wanted, film", [(2, [0, 1]), (3, [0, 1, 2]), ([0, 2], [0, 2]), ([2, 1], [1, 2])])
def test_policy_with_film_on_some_blocks(tmp_path, wanted, film):
    source = read_reference(write(tmp_path, POLICY | {"num_film_layers": wanted}, policy_state(film)))
    assert sorted(source.film) == film
    assert len(source.lora) == 2 * BLOCKS
    assert {name.split(".")[2] for name in source.lora} == {"0", "1", "2"}


def test_policy_without_lora(tmp_path):
    source = read_reference(write(tmp_path, POLICY | {"tune_llm": False}, policy_state(lora=False)))
    assert sorted(source.film) == [0, 1, 2] and source.lora == {} and source.rank == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32(tmp_path, dtype):
    state = {name: tensor.to(dtype) for name, tensor in policy_state().items()}
    source = read_reference(write(tmp_path, POLICY, state))
    assert source.encoder.outer0.weight.dtype == source.film[0].scale_bias.dtype == torch.float32
    assert source.lora["model.layers.0.self_attn.q_proj"].a.dtype == torch.float32


def test_rewards(tmp_path):
    model = read_reference(write(tmp_path, REWARD, reward_state()))
    assert type(model) is NPBTL and not model.training
    assert model.norm.num_batches_tracked == 7 and model.norm.num_batches_tracked.dtype == torch.int64
    plain = REWARD | {"is_conditional": False}
    assert type(read_reference(write(tmp_path, plain, reward_state(False)))) is BTL
    assert type(read_reference(write(tmp_path, plain | {"distributional_head": True}, reward_state(False, 2)))) is DPL


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "critic"}, "'model_type'"),
        ({"model_type": None}, "'model_type'"),
        ({"hidden_dim": 0}, "'hidden_dim'"),
        ({"hidden_dim": 10**12}, "'hidden_dim'"),
        ({"hidden_dim": 2**20}, r"expected shape \[1048576, 12\], got \[16, 12\]"),
        ({"hidden_dim": "16"}, "'hidden_dim'"),
        ({"hidden_dim": True}, "'hidden_dim'"),
        ({"hidden_dim": 12}, "heads"),
        ({"input_dim": E + 1}, r"expected shape \[16, 14\], got \[16, 12\]"),
        ({"context_agg_func": "max"}, "pooling"),
        ({"context_agg_func": "sum"}, "self_attention.*not expected"),
        ({"context_input_encoder": "mlp"}, "inner_encoder.*missing"),
        ({"sample_latents": True}, "outer_encoder.net.2"),
        ({"is_conditional": False}, "'is_conditional'"),
        ({"tune_llm": False}, "not expected"),
        ({"lora_r": RANK + 1}, r"lora_A: expected shape \[5, 12\], got \[4, 12\]"),
        ({"lora_alpha": "big"}, "'lora_alpha'"),
        ({"num_film_layers": 0}, "'num_film_layers'"),
        ({"num_film_layers": 2}, r"expected FiLM on blocks \[0, 1\], got \[0, 1, 2\]"),
        ({"num_film_layers": 4}, r"expected FiLM on blocks \[0, 1, 2, 3\], got \[0, 1, 2\]"),
        ({"num_film_layers": 10**30}, "'num_film_layers'"),
        ({"num_film_layers": [[0]]}, "'num_film_layers'"),
        ({"num_film_layers": []}, "'num_film_layers'"),
    ],
)
def test_policy_refuses_another_config(tmp_path, change, message):
    refused(write(tmp_path, POLICY | change, policy_state()), message)


@pytest.mark.parametrize("field", sorted(set(POLICY) - {"llm_name", "lora_dropout"}))
def test_policy_refuses_a_missing_field(tmp_path, field):
    config = {name: value for name, value in POLICY.items() if name != field}
    refused(write(tmp_path, config, policy_state()), f"{field}.*missing")


@pytest.mark.parametrize("name", list(policy_state()))
def test_policy_refuses_a_missing_or_misshapen_tensor(name):
    state = policy_state()
    tensor = state.pop(name)
    with pytest.raises(CheckpointError, match="here: "):
        policy_from_state(POLICY, state, "here")
    state[name] = torch.cat([tensor, tensor], -1)  # what B's other side fits, only the base model knows
    with pytest.raises(CheckpointError, match="here: .*expected shape"):
        policy_from_state(POLICY, state, "here")
    state[name] = tensor[None]
    with pytest.raises(CheckpointError, match="here: .*expected shape"):
        policy_from_state(POLICY, state, "here")


@pytest.mark.parametrize(
    "name, message",
    [
        ("surprise", "'surprise' is not expected"),
        ("model.context_encoder.surprise", "surprise' is not expected"),
        (f"{LLM}surprise", "surprise' is not expected"),
        (f"{LLM}model.model.layers.0.film.gamma_mlp.net.2.weight", "net.2.weight' is not expected"),
        (f"{LLM}model.model.layers.0.block.self_attn.q_proj.lora_A.other.weight", "other.weight' is not expected"),
        (f"{LLM}model.model.layers.0.self_attn.q_proj.lora_A.default.weight", "there twice, under two names"),
        (f"{LLM}model.other.layers.0.self_attn.o_proj.lora_A.default.weight", "one list of blocks"),
        (f"{LLM}model.model.layers.0.block.self_attn.o_proj.lora_A.default.weight", "o_proj: B is missing"),
        (f"{LLM}model.model.layers.3.self_attn.q_proj.lora_A.default.weight", r"FiLM on blocks \[0, 1, 2, 3\], got"),
        (f"{LLM}model.model.layers.99999.film.gamma_mlp.net.0.bias", "FiLM on blocks"),
    ],
)
def test_policy_refuses_an_unexpected_tensor(tmp_path, name, message):
    refused(write(tmp_path, POLICY, policy_state() | {name: torch.zeros(RANK, D)}), message)


def test_policy_refuses_lora_on_some_blocks():
    state = {name: tensor for name, tensor in policy_state().items() if "layers.1.block.self_attn.v_proj" not in name}
    with pytest.raises(CheckpointError, match="layers.1: LoRA on self_attn.v_proj is missing"):
        policy_from_state(POLICY, state, "here")
    state = {name: tensor for name, tensor in policy_state().items() if "layers.1.block.self_attn" not in name}
    with pytest.raises(CheckpointError, match="LoRA on blocks 0 to 2"):
        policy_from_state(POLICY, state, "here")


def test_policy_refuses_integers():
    state = policy_state()
    name = f"{LLM}model.model.layers.0.film.gamma_mlp.net.0.bias"
    with pytest.raises(CheckpointError, match="gamma_mlp.*floating"):
        policy_from_state(POLICY, state | {name: torch.zeros(D).long()}, "here")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"target_input_encoder": "llama"}, "'target_input_encoder'"),
        ({"distributional_head": True}, "'distributional_head'"),
        ({"is_conditional": False}, "decoder"),
        ({"hidden_dim": 24}, "expected shape"),
        ({"context_agg_func": "self-attention"}, "self_attention.*missing"),
    ],
)
def test_reward_refuses_another_config(tmp_path, change, message):
    refused(write(tmp_path, REWARD | change, reward_state()), message)


def test_reward_refuses_other_tensors(tmp_path):
    for name in reward_state():
        state = reward_state()
        tensor = state.pop(name)
        refused(write(tmp_path, REWARD, state), "missing")
        refused(write(tmp_path, REWARD, state | {name: torch.stack([tensor, tensor])}), "expected shape")
    name = "model.decoder.decoder.net.1.num_batches_tracked"
    refused(write(tmp_path, REWARD, reward_state() | {name: torch.tensor(1.5)}), "num_batches_tracked.*dtype")


class Hostile:
    """Creates a file when it is unpickled by a reader that runs what pickles say."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path):
    trace = tmp_path / "trace"
    write(tmp_path, POLICY, policy_state() | {"model.extra": Hostile(trace)})
    refused(tmp_path, "model_best.pt: refused: it holds more than tensors")
    assert not trace.exists()
    torch.load(tmp_path / "model_best.pt", weights_only=False)  # the trap works
    assert trace.exists()


@pytest.mark.parametrize("keep", [0, 10, 1000, -100, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = write(tmp_path, POLICY, policy_state()) / "model_best.pt"
    path.write_bytes(path.read_bytes()[:keep])
    refused(tmp_path, "model_best.pt")


def test_a_damaged_file_is_refused_or_read_as_tensors(tmp_path):
    path = write(tmp_path, POLICY, policy_state()) / "model_best.pt"
    whole = path.read_bytes()
    for place in range(0, len(whole), 997):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            assert isinstance(read_reference(tmp_path), ReferencePolicy)
        except CheckpointError as error:
            assert "model_best.pt" in str(error) or str(tmp_path) in str(error)


@pytest.mark.parametrize("name", ["config.yaml", "model_best.pt"])
def test_a_missing_file_is_refused(tmp_path, name):
    (write(tmp_path, POLICY, policy_state()) / name).unlink()
    refused(tmp_path, name)


@pytest.mark.parametrize(
    "state",
    [
        [torch.zeros(3)],
        torch.zeros(3),
        {"step": 3},
        {3: torch.zeros(3)},
        {"a" * 1000: torch.zeros(3)},
        {"model": policy_state()},
        {"wide": torch.zeros(1).expand(10**6, 10**6)},
        {"sparse": torch.eye(3).to_sparse()},
    ],
    ids=["list", "tensor", "number", "number as name", "long name", "nested", "view", "sparse"],
)
def test_a_foreign_state_is_refused(tmp_path, state):
    refused(write(tmp_path, POLICY, state), "model_best.pt")


def test_the_old_format_of_torch_is_refused(tmp_path):
    write(tmp_path, POLICY, {})
    torch.save(policy_state(), tmp_path / "model_best.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path, "expected a whole zip archive")


def test_compressed_records_are_refused(tmp_path):
    path = write(tmp_path, POLICY, {"zeros": torch.zeros(1 << 20)}) / "model_best.pt"
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    refused(tmp_path, "compressed")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "model",
        "model: [1]",
        "model: {model_type: [a]}",
        "a: [",
        "a: 2001-99-99",
        "[" * 50_000,
        "\x00",
        "x: " + "y" * (2 << 20),
        "model: !!python/object/apply:os.getcwd []",
        "a: &a [x, x]\nb: &b [*a, *a]\nmodel: [*b, *b]",
    ],
)
def test_a_foreign_config_is_refused(tmp_path, text):
    write(tmp_path, POLICY, policy_state())
    (tmp_path / "config.yaml").write_text(text)
    refused(tmp_path, "config.yaml")
