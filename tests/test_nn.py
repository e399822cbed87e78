"""The modules: context encoder, modulator, reward models, and their files."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from fssa_fast.arguments import INNER, POOLING
from fssa_fast.nn import BTL, DPL, NPBTL, CheckpointError, ContextEncoder, Modulator, RewardModel, pack_choices
from fssa_fast.ops import context_rows_

E, H = 5, 16
KINDS = [(inner, pooling, sampled) for inner in INNER for pooling in POOLING for sampled in (False, True)]
kinds = pytest.mark.parametrize("inner, pooling, sampled", KINDS)


def users(counts, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (
        [torch.randn(k, 2, E, generator=generator, dtype=dtype) for k in counts],
        [torch.randint(0, 2, (k,), generator=generator) for k in counts],
    )


# ---------------------------------------------------------------- packing


def test_pack_choices():
    pairs, choices = users([3, 0, 2])
    packed = pack_choices(pairs, choices)
    assert torch.equal(packed[0], torch.cat(pairs)) and torch.equal(packed[1], torch.cat(choices))
    assert packed[2].tolist() == [0, 3, 3, 5]


@pytest.mark.parametrize(
    "pairs, choices, name",
    [
        ([], [], "pairs, choices"),
        ([torch.zeros(2, 2, E)], [], "pairs, choices"),
        ([torch.zeros(2, E)], [torch.zeros(2).long()], r"pairs\[0\]"),
        ([torch.zeros(1, 2, E), torch.zeros(1, 2, E + 1)], [torch.zeros(1).long()] * 2, r"pairs\[1\]"),
        ([torch.zeros(2, 2, E)], [torch.zeros(2, 1).long()], r"choices\[0\]"),
        ([torch.zeros(2, 2, E)], [torch.zeros(2)], r"choices\[0\]"),
    ],
)
def test_pack_choices_refuses(pairs, choices, name):
    with pytest.raises(ValueError, match=name):
        pack_choices(pairs, choices)


# ---------------------------------------------------------------- encoder


def oracle(encoder, pairs, choices):
    """One user's encoding by torch's own modules."""
    which = choices.view(-1, 1, 1).expand(-1, 1, E)
    x = torch.cat([pairs.gather(1, which), pairs.gather(1, 1 - which)], 2).squeeze(1)
    h = encoder.inner0(x)
    if encoder.inner1 is not None:
        h = encoder.inner1(h.relu())
    if not len(h):
        pooled = h.new_zeros(H)
    elif encoder.pooling == "self-attention":
        attention = nn.MultiheadAttention(H, encoder.heads, batch_first=True, dtype=h.dtype)
        names = {"in_proj_weight": encoder.qkv.weight, "in_proj_bias": encoder.qkv.bias}
        names |= {"out_proj.weight": encoder.out.weight, "out_proj.bias": encoder.out.bias}
        attention.load_state_dict(names)
        pooled = attention(h[None], h[None], h[None])[0].sum(1).squeeze(0)
    else:
        pooled = h.mean(0) if encoder.pooling == "mean" else h.sum(0)
    return encoder.outer1(encoder.outer0(pooled).relu())


@kinds
@torch.no_grad()
def test_encoder_is_torchs_own_modules(inner, pooling, sampled):
    torch.manual_seed(0)
    encoder = ContextEncoder(E, H, inner=inner, pooling=pooling, heads=4, sampled=sampled).double().eval()
    pairs, choices = users([4, 0, 1, 7], dtype=torch.float64)
    encoded = encoder(*pack_choices(pairs, choices))
    assert encoded.shape == (4, 2 * H if sampled else H)
    assert_close(encoded, torch.stack([oracle(encoder, p, c) for p, c in zip(pairs, choices, strict=True)]))
    order = torch.tensor([2, 0, 3, 1])  # a context is a set
    pairs[0], choices[0] = pairs[0][order], choices[0][order]
    assert_close(encoder(*pack_choices(pairs, choices)), encoded)


@kinds
@pytest.mark.parametrize("training", [True, False])
def test_every_weight_gets_a_gradient(inner, pooling, sampled, training):
    torch.manual_seed(0)
    encoder = ContextEncoder(E, H, inner=inner, pooling=pooling, sampled=sampled).train(training)
    encoder(*pack_choices(*users([4, 0, 1, 7]))).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_dropout_is_for_attention_in_training():
    packed = pack_choices(*users([6, 3]))
    encoder = ContextEncoder(E, H, dropout=0.5)
    assert not torch.equal(encoder(*packed), encoder(*packed))
    encoder.eval()
    evaluated = encoder(*packed)
    assert torch.equal(evaluated, encoder(*packed))
    encoder.train()
    encoder.dropout = 0.0
    assert_close(encoder(*packed), evaluated)
    for pooling in ("mean", "sum"):
        encoder = ContextEncoder(E, H, pooling=pooling, dropout=0.5)
        assert torch.equal(encoder(*packed), encoder(*packed))


def test_dropout_keeps_the_mean_of_what_attention_pools():
    torch.manual_seed(0)
    encoder = ContextEncoder(E, H, dropout=0.3)
    packed = pack_choices(*users([5]))
    with torch.no_grad():
        for layer in (encoder.outer0, encoder.outer1):  # makes the outer encoder linear: dropout's mean passes through
            layer.weight.copy_(torch.eye(H))
            layer.bias.fill_(100.0 if layer is encoder.outer0 else -100.0)
        expected = encoder.eval()(*packed)
        encoder.train()
        drawn = torch.cat([encoder(*packed) for _ in range(400)])
    error = drawn.std(0) / 400**0.5
    assert bool(((drawn.mean(0) - expected[0]).abs() < 5 * error + 1e-3).all())


def test_sampled_latents():
    torch.manual_seed(0)
    encoder = ContextEncoder(E, H, sampled=True).eval()
    packed = pack_choices(*users([4, 0, 2]))
    mean, deviation = encoder.distribution(encoder(*packed))
    assert mean.shape == deviation.shape == (3, H) and bool((deviation > 0).all())
    assert torch.equal(encoder.latents(*packed), mean)
    noise = torch.randn(7, 3, H)
    assert_close(encoder.latents(*packed, noise), mean + deviation * noise)
    assert_close(encoder.latents(*packed, noise[2]), mean + deviation * noise[2])
    with pytest.raises(ValueError, match="noise"):
        encoder.latents(*packed, noise[:, :2])


def test_point_latents_take_no_noise_and_have_no_distribution():
    encoder = ContextEncoder(E, H)
    packed = pack_choices(*users([4]))
    with pytest.raises(ValueError, match="noise"):
        encoder.latents(*packed, torch.zeros(1, H))
    with pytest.raises(ValueError, match="sampled=False"):
        encoder.distribution(encoder(*packed))


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"embedding_width": 0}, "embedding_width"),
        ({"latent_width": -8}, "latent_width"),
        ({"latent_width": True}, "latent_width"),
        ({"latent_width": 16.0}, "latent_width"),
        ({"heads": 3}, "heads"),
        ({"heads": 0}, "heads"),
        ({"inner": "deep"}, "inner"),
        ({"pooling": "max"}, "pooling"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"sampled": 1}, "sampled"),
    ],
)
def test_encoder_refuses(arguments, name):
    with pytest.raises((ValueError, TypeError), match=name):
        ContextEncoder(**({"embedding_width": E, "latent_width": H} | arguments))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "pairs, choices, offsets, name",
    [
        (torch.zeros(3, 2, E + 1), torch.zeros(3).long(), torch.tensor([0, 3]), "pairs"),
        (torch.zeros(3, 2, E).double(), torch.zeros(3).long(), torch.tensor([0, 3]), "pairs"),
        (torch.zeros(3, 2, E), torch.full((3,), 2), torch.tensor([0, 3]), "choices"),
        (torch.zeros(3, 2, E), torch.zeros(2).long(), torch.tensor([0, 3]), "choices"),
        (torch.zeros(3, 2, E), torch.zeros(3).long(), torch.tensor([0, 2]), "offsets"),
        (torch.zeros(3, 2, E), torch.zeros(3).long(), torch.tensor([0, 2, 1, 3]), "offsets"),
    ],
)
def test_encoder_refuses_inputs(training, pairs, choices, offsets, name):
    encoder = ContextEncoder(E, H).train(training)
    with pytest.raises((ValueError, TypeError), match=name):
        encoder(pairs, choices, offsets)


# ---------------------------------------------------------------- modulator


def test_modulator_begins_at_init():
    init = torch.tensor([0.0, 1.0, 0.0])
    modulator = Modulator(H, 3, init=init)
    assert torch.equal(modulator(torch.randn(4, H)), init.expand(4, 3))
    assert torch.equal(Modulator(H, 3)(torch.randn(4, H)), torch.zeros(4, 3))


def test_modulator_weights_are_drawn_by_column():
    torch.manual_seed(0)
    weight = Modulator(4096, 3, std=torch.tensor([0.0, 0.1, 2.0])).weight
    assert_close(weight.std(1), torch.tensor([0.0, 0.1, 2.0]), rtol=0.1, atol=0)
    assert_close(Modulator(4096, 2, std=0.1).weight.std(1), torch.tensor([0.1, 0.1]), rtol=0.1, atol=0)


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"width": -1}, "width"),
        ({"latent_width": 0}, "latent_width"),
        ({"init": torch.zeros(4)}, "init"),
        ({"init": torch.zeros(3).long()}, "init"),
        ({"std": -1.0}, "std"),
        ({"std": torch.zeros(2)}, "std"),
        ({"std": float("nan")}, "std"),
    ],
)
def test_modulator_refuses(arguments, name):
    with pytest.raises((ValueError, TypeError), match=name):
        Modulator(**({"latent_width": H, "width": 3} | arguments))


@torch.no_grad()
def test_encoder_and_modulator_are_what_writes_the_bank():
    torch.manual_seed(0)
    encoder, modulator = ContextEncoder(E, H, inner="linear", sampled=True).eval(), Modulator(H, 6, std=1.0)
    packed, noise, bank = pack_choices(*users([4, 0, 2])), torch.randn(3, H), torch.zeros(5, 6)
    latents = context_rows_(
        bank, torch.tensor([4, 1, 2]), *packed, encoder.weights(), modulation=modulator.weight,
        modulation_bias=modulator.bias, noise=noise,
    )
    assert_close(latents, encoder.latents(*packed, noise))
    assert_close(bank[[4, 1, 2]], modulator(latents))
    assert not bank[[0, 3]].any()


# ---------------------------------------------------------------- rewards


def models():
    torch.manual_seed(0)
    found = [BTL(E, H), DPL(E, H), NPBTL(E, H), NPBTL(E, H, inner="linear", pooling="mean", sampled=True)]
    for model in found:
        nn.init.normal_(model.norm.running_mean)
    return [model.eval() for model in found]


def arguments(model, targets):
    return (targets, *(pack_choices(*users([3, 0])) if isinstance(model, NPBTL) else ()))


each_model = pytest.mark.parametrize("model", models(), ids=["btl", "dpl", "np-btl", "np-btl-sampled"])


@each_model
@torch.no_grad()
def test_rewards(model):
    targets = torch.randn(2, 7, 2, E)
    rewards = model(*arguments(model, targets))
    assert rewards.shape == ((2, 7, 2, 2) if isinstance(model, DPL) else (2, 7, 2))
    log_probs = model.log_probs(rewards)
    assert log_probs.shape == (2, 7, 2)
    assert_close(log_probs.exp().sum(-1), torch.ones(2, 7))
    swapped = model(*arguments(model, targets.flip(2)))
    assert_close(model.log_probs(swapped), log_probs.flip(-1))
    option = rewards[..., 0] if isinstance(model, DPL) else rewards
    assert torch.equal(log_probs[..., 0] > log_probs[..., 1], option[..., 0] > option[..., 1])


@torch.no_grad()
def test_dpl_deviations_are_positive_and_soften():
    model = models()[1]
    rewards = model(torch.randn(2, 7, 2, E))
    assert bool((rewards[..., 1] > 0).all())
    certain, unsure = rewards.clone(), rewards.clone()
    certain[..., 1], unsure[..., 1] = 0.1, 10.0
    assert bool((model.log_probs(certain).amax(-1) > model.log_probs(unsure).amax(-1)).all())


@torch.no_grad()
def test_np_btl_decodes_target_joined_with_latent():
    model = models()[2]
    targets, latents = torch.randn(2, 7, 2, E), torch.randn(3, 2, H)
    encoded = model.target1(model.target0(targets).relu()).expand(3, 2, 7, 2, H)
    joined = torch.cat([encoded, latents[:, :, None, None].expand_as(encoded)], -1)
    hidden = F.linear(joined, model.decoder0.weight)
    normed = (hidden - model.norm.running_mean) * torch.rsqrt(model.norm.running_var + model.norm.eps)
    expected = model.decoder1((normed * model.norm.weight + model.norm.bias).relu()).squeeze(-1)
    assert_close(model.rewards(targets, latents), expected)
    assert_close(model.rewards(targets, latents[1]), expected[1])


@torch.no_grad()
def test_np_btl_samples():
    model = models()[3]
    targets, packed, noise = torch.randn(2, 7, 2, E), pack_choices(*users([3, 0])), torch.randn(4, 2, H)
    rewards = model(targets, *packed, noise)
    assert rewards.shape == (4, 2, 7, 2)
    assert_close(rewards[2], model(targets, *packed, noise[2]))


@each_model
def test_training_moves_the_normalisation_and_every_weight(model):
    model = type(model)(**model.config).train()
    before = model.norm.running_mean.clone()
    rewards = model(
        *arguments(model, torch.randn(2, 7, 2, E)),
        *([torch.randn(2, H)] if "sampled" in model.config and model.config["sampled"] else []),
    )
    (rewards * torch.randn_like(rewards)).sum().backward()
    assert not torch.equal(before, model.norm.running_mean)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_np_btl_learns_who_likes_what():
    torch.manual_seed(0)
    model = NPBTL(1, H, dropout=0.0)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        pairs = torch.rand(16, 12, 2, 1)
        taste = torch.randint(0, 2, (16, 1))  # 0 likes large numbers, 1 small ones
        choices = (pairs[..., 1, 0] > pairs[..., 0, 0]).long() ^ taste
        rewards = model(pairs, *pack_choices(list(pairs[:, :3]), list(choices[:, :3])))
        log_probs = model.log_probs(rewards)
        loss = -log_probs.gather(-1, choices.unsqueeze(-1)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    unseen = (log_probs.argmax(-1) == choices)[:, 3:].float().mean()
    assert unseen > 0.75  # without contexts, 0.5


@each_model
def test_rewards_refuse_other_targets(model):
    with pytest.raises(ValueError, match="targets"):
        model(*arguments(model, torch.randn(2, 7, 2, E + 1)))
    with pytest.raises(TypeError, match="targets"):
        model(*arguments(model, torch.randn(2, 7, 2, E).double()))


def test_np_btl_refuses_latents_of_other_users():
    with pytest.raises(ValueError, match="latents"):
        models()[2].rewards(torch.randn(2, 7, 2, E), torch.randn(3, H))


# ---------------------------------------------------------------- files


def weights_of(folder):
    (path,) = folder.glob("model-*.safetensors")
    return path


@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(model, dtype, tmp_path):
    model = type(model)(**model.config).to(dtype)
    model.save_pretrained(tmp_path / "new" / "folder")
    for load in (type(model).from_pretrained, RewardModel.from_pretrained):
        again = load(tmp_path / "new" / "folder")
        assert type(again) is type(model) and again.config == model.config and not again.training
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor) and again.state_dict()[name].dtype == tensor.dtype
        assert all(parameter.requires_grad for parameter in again.parameters())
    names = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert names == ["config.json", weights_of(tmp_path / "new" / "folder").name]


def test_load_refuses_another_kind(tmp_path):
    BTL(E, H).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="config.json.*'model'.*btl"):
        DPL.from_pretrained(tmp_path)


@pytest.fixture
def saved(tmp_path):
    NPBTL(E, H).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 3}, "version 1 or 2, got 3"),
        ({"version": None}, "'version'"),
        ({"version": True}, "'version'"),
        ({"model": "other"}, "'model'"),
        ({"model": ["np-btl"]}, "'model'"),
        ({"surprise": 1}, "'surprise'"),
        ({"latent_width": 0}, "'latent_width'"),
        ({"latent_width": 10**30}, "'latent_width'"),
        ({"latent_width": True}, "'latent_width'"),
        ({"latent_width": "16"}, "'latent_width'"),
        ({"latent_width": 2**20}, r"expected shape \[1048576, 5\], got \[16, 5\]"),
        ({"embedding_width": E + 1}, r"expected shape \[16, 6\], got \[16, 5\]"),
        ({"heads": 3}, "heads"),
        ({"inner": "linear"}, "encoder.inner1.bias"),
        ({"inner": "deep"}, "inner"),
        ({"sampled": True}, "encoder.outer1"),
        ({"sampled": 1}, "'sampled'"),
        ({"standardized": 1}, "'standardized'"),
        ({"dropout": 2.0}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"dropout": "0.1"}, "'dropout'"),
    ],
)
def test_load_refuses_a_changed_config(saved, change, message):
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message) as caught:
        RewardModel.from_pretrained(saved)
    assert str(saved) in str(caught.value)


def test_load_refuses_a_config_without_a_field(saved):
    path = saved / "config.json"
    whole = json.loads(path.read_text())
    for name in set(whole) - {"weights", "standardized"}:  # as older files have none
        path.write_text(json.dumps({key: value for key, value in whole.items() if key != name}))
        with pytest.raises(CheckpointError, match=f"{name}.*missing"):
            RewardModel.from_pretrained(saved)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"version": ' + b"9" * 10_000 + b"}", b" " * (2 << 20)],
    ids=["empty", "half", "list", "null", "bytes", "deep", "long number", "large"],
)
def test_load_refuses_a_config_that_is_none(saved, text):
    (saved / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match="config.json"):
        RewardModel.from_pretrained(saved)


@pytest.mark.parametrize("name", ["config.json", "model-"])
def test_load_refuses_a_missing_file(saved, name):
    next(saved.glob(f"{name}*")).unlink()
    with pytest.raises(CheckpointError, match=name):
        RewardModel.from_pretrained(saved)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_load_refuses_truncated_weights(saved, keep):
    path = weights_of(saved)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=path.name):
        RewardModel.from_pretrained(saved)


def test_load_refuses_other_weights(saved):
    path = weights_of(saved)
    whole = load_file(path)

    def refused(tensors, message):
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=message):
            RewardModel.from_pretrained(saved)

    refused({"a": torch.zeros(3)}, "missing")
    refused({k: v for k, v in whole.items() if k != "norm.bias"}, "'norm.bias' is missing")
    refused(whole | {"more": torch.zeros(3)}, "'more' is not expected")
    refused(whole | {"norm.bias": torch.zeros(H + 1)}, r"'norm.bias': expected shape \[16\], got \[17\]")
    refused(whole | {"norm.bias": torch.zeros(H).long()}, "'norm.bias': expected dtype")
    refused(whole | {"norm.bias": torch.zeros(H).half()}, "'norm.bias': expected dtype")
    refused(whole | {"norm.num_batches_tracked": torch.tensor(0.0)}, "num_batches_tracked")


def test_a_failed_save_leaves_what_was_there(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr("fssa_fast.files.save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        BTL(E, H).save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
