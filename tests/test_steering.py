"""Attaching: nothing of the base changes, and what is computed is what a slow formula says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, LATENT, WIDTH, make_choices, make_config, make_ids, make_loras, make_model, make_policy
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from fssa_fast import BASE, PRIOR, ConfigError, EncoderConfig, LoraConfig, SteerablePolicy, SteeringConfig, UnknownUser
from fssa_fast.steering.attach import ActiveUsers
from fssa_fast.steering.sites import blocks_of, default_targets
from fssa_fast.training import policy_log_probs

COMBINATIONS = {
    "film": (True, ()),
    "plain": (False, ("none",)),
    "scale": (False, ("scale",)),
    "scale_shift": (False, ("scale_shift",)),
    "film and plain": (True, ("none",)),
    "one block's film and all adapters": ((1,), ("none", "scale", "scale_shift")),
}
MIXED = ["alice", BASE, PRIOR, "bob"]


@torch.no_grad()
def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    return model(ids, **options).logits


def with_users(policy: SteerablePolicy) -> SteerablePolicy:
    policy.users.add("alice", make_choices(1))
    policy.users.add("bob", make_choices(2, 5))
    return policy


# ---------------------------------------------------------------- what the base keeps


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_base_keeps_its_state_and_gets_it_back(name: str) -> None:
    model, ids = make_model(name), make_ids()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = logits(model, ids)
    policy = make_policy(model)
    assert set(model.state_dict()) == set(before)  # what it saves of itself is itself
    assert any(".fssa." in key for key, _ in model.named_parameters())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert not any(p.requires_grad for key, p in model.named_parameters() if ".fssa." not in key)
    assert torch.equal(logits(model, ids), plain)  # no users, no steering
    with policy.steer([PRIOR] * 3):
        assert not torch.allclose(logits(model, ids), plain)
    assert policy.detach() is model
    assert set(model.state_dict()) == set(before)
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(logits(model, ids), plain)
    make_policy(model).detach()  # it can be attached again


def test_a_detached_policy_serves_nobody_rather_than_the_base_model(tmp_path: Any) -> None:
    policy = make_policy()
    policy.detach()
    ids = make_ids()
    for use in (
        lambda: policy.steer([PRIOR] * 3).__enter__(),
        lambda: policy(ids, slots=torch.ones(3, dtype=torch.int32)),
        lambda: policy.generate(ids, [PRIOR] * 3, max_new_tokens=1),
        lambda: policy.save_pretrained(tmp_path),
        policy.detach,
    ):
        with pytest.raises(RuntimeError, match="detached"):
            use()


def test_attaching_twice_is_refused_and_changes_nothing() -> None:
    model = make_model()
    policy = with_users(make_policy(model))
    ids = make_ids(1)
    with policy.steer(["alice"]):
        before = logits(model, ids)
    with pytest.raises(ValueError, match="^model: .*carries one"):
        make_policy(model)
    with policy.steer(["alice"]):
        assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loras": (LoraConfig(("q_proj", "q_porj")),)}, "targets: 'q_porj' .*q_proj"),
        ({"film": (0, 2)}, r"film: .*\[0, 2\), got 2"),
        ({"film": (-1,)}, r"film: .*got -1"),
    ],
)
def test_unknown_places_are_named(change: dict[str, Any], message: str) -> None:
    model = make_model()
    with pytest.raises(ConfigError, match=message):
        SteerablePolicy(model, SteeringConfig(EncoderConfig(WIDTH, LATENT, heads=2), **change))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoraConfig(()), "targets"),
        (lambda: LoraConfig("q_proj"), "targets: .*'q_proj'"),
        (lambda: LoraConfig(["q_proj"]), "targets"),
        (lambda: LoraConfig(rank=0), "rank: .*0"),
        (lambda: LoraConfig(rank=True), "rank: .*True"),
        (lambda: LoraConfig(rank=2.0), "rank: .*2.0"),
        (lambda: LoraConfig(alpha=float("nan")), "alpha: .*nan"),
        (lambda: LoraConfig(modulation="shift"), "modulation: .*'shift'"),
        (lambda: SteeringConfig(EncoderConfig(WIDTH), False, ()), "film, loras"),
        (lambda: SteeringConfig(EncoderConfig(WIDTH), (), ()), "film, loras"),
        (lambda: SteeringConfig(EncoderConfig(WIDTH), (1, 1)), r"film: .*\(1, 1\)"),
        (lambda: SteeringConfig(EncoderConfig(WIDTH), [1]), r"film: .*\[1\]"),
        (lambda: SteeringConfig(EncoderConfig(WIDTH), (True,)), "film"),
        (lambda: SteeringConfig(EncoderConfig(WIDTH), True, LoraConfig()), "loras"),
    ],
)
def test_impossible_configurations_are_named(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("encoder", "options", "message"),
    [
        (EncoderConfig(WIDTH, LATENT, heads=3), {}, "heads"),
        (EncoderConfig(0, LATENT, heads=2), {}, "embedding_width"),
        (EncoderConfig(WIDTH, LATENT, inner="conv", heads=2), {}, "inner"),  # type: ignore[arg-type]
        (EncoderConfig(WIDTH, LATENT, heads=2), {"capacity": 0}, "capacity"),
        (EncoderConfig(WIDTH, LATENT, heads=2), {"modulation_std": -1.0}, "std"),
    ],
)
def test_a_failed_construction_leaves_the_model_alone(encoder: Any, options: dict[str, Any], message: str) -> None:
    model = make_model()
    keys = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        SteerablePolicy(model, SteeringConfig(encoder, True, (LoraConfig(),)), **options)
    assert set(model.state_dict()) == keys and all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


# ---------------------------------------------------------------- who gets what


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_mixed_batch_gives_each_row_its_own(name: str) -> None:
    model, ids = make_model(name), make_ids(4)
    plain = logits(model, ids)
    policy = with_users(make_policy(model))
    with policy.steer(MIXED) as slots:
        assert slots.dtype == torch.int32 and slots.tolist() == [policy.users.slot(user) for user in MIXED]
        mixed = logits(model, ids)
    assert torch.equal(mixed[1], plain[1])
    moved = (mixed - plain).abs().amax((1, 2))
    assert (moved[[0, 2, 3]] > 0.1).all() and not torch.allclose(mixed[0], mixed[3])
    for row, user in enumerate(MIXED):
        with policy.steer([user]):
            torch.testing.assert_close(logits(model, ids[row : row + 1])[0], mixed[row], rtol=1e-4, atol=1e-4)
    order = [2, 0, 3, 1]
    with policy.steer([MIXED[i] for i in order]):
        torch.testing.assert_close(logits(model, ids[order]), mixed[order], rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model, ids), plain)


def merged(model: Any, policy: SteerablePolicy, row: Tensor) -> Any:
    """A plain model that answers as the user with this row of the bank: weights merged, FiLM in wrapped blocks."""
    for site, a, b in (entry for n in range(len(policy.steering.loras)) for entry in policy.attachment.adapter(n)):
        gamma = row[site.gamma].expand(site.rank).double()
        change = site.scaling * b.detach().double().T @ torch.diag(gamma) @ a.detach().double()
        shift = torch.zeros(site.rank).double() if site.beta is None else row[site.beta].double()
        shift = site.scaling * b.detach().double().T @ shift
        projection = model.get_submodule(site.path)
        projection.weight.data += change.T if isinstance(projection, Conv1D) else change
        projection.bias = nn.Parameter(shift if projection.bias is None else projection.bias.data + shift)
    blocks = blocks_of(model)[1]
    for site in policy.layout.films:
        index = int(site.path.rsplit(".", 1)[1])
        blocks[index] = Filmed(blocks[index], row[site.scale], row[site.shift])
    return model


class Filmed(nn.Module):
    def __init__(self, block: nn.Module, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.block, self.scale, self.shift = block, scale, shift

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.block(*args, **kwargs) * (1 + self.scale) + self.shift


CASES = [(name, "one block's film and all adapters") for name in ARCHITECTURES] + [("llama", c) for c in COMBINATIONS]


@pytest.mark.parametrize(("name", "combination"), CASES)
def test_the_attached_model_is_the_merged_model(name: str, combination: str) -> None:
    film, modulations = COMBINATIONS[combination]
    model, ids = make_model(name, dtype=torch.float64), make_ids(4)
    policy = with_users(make_policy(model, film, modulations))
    policy.users.scale("bob", 0.5)
    with policy.steer(MIXED) as slots:
        mixed = logits(model, ids)
    for row, slot in enumerate(slots.tolist()):
        slow = merged(make_model(name, dtype=torch.float64), policy, policy.bank.rows[slot])
        torch.testing.assert_close(logits(slow, ids[row : row + 1])[0], mixed[row], rtol=1e-6, atol=1e-6)
    differ = not all(modulation == "none" for modulation in modulations) or film
    if differ:
        assert not torch.allclose(mixed[0], logits(model, ids)[0], atol=1e-3)


def test_adapters_may_name_different_projections() -> None:
    model = make_model(dtype=torch.float64)
    loras = (LoraConfig(("q_proj", "down_proj"), 2), LoraConfig(("o_proj",), 3, 3.0, "scale"))
    config = SteeringConfig(EncoderConfig(WIDTH, LATENT, heads=2), False, loras)
    policy = with_users(SteerablePolicy(model, config, modulation_std=0.5))
    for _, child in policy.attachment.children():
        for b in child.b:
            nn.init.normal_(b, std=0.3)
    ids = make_ids(1)
    with policy.steer(["alice"]):
        steered = logits(model, ids)
    slow = merged(make_model(dtype=torch.float64), policy, policy.bank.rows[policy.users.slot("alice")])
    torch.testing.assert_close(logits(slow, ids), steered, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(steered, logits(model, ids))


def test_a_fresh_policy_changes_nothing() -> None:
    model, ids = make_model(), make_ids(2)
    plain = logits(model, ids)
    policy = SteerablePolicy(model, make_config(model), modulation_std=0.3)
    policy.users.add("alice", make_choices(1))
    with policy.steer(["alice", PRIOR]):
        assert torch.equal(logits(model, ids), plain)


def test_rows_and_slots_of_forward() -> None:
    policy = with_users(make_policy())
    ids = make_ids(2)
    with torch.no_grad(), policy.steer(["alice", BASE]) as slots:
        wanted = policy.model(ids).logits
        assert torch.equal(policy(ids, slots=slots).logits, wanted)
        assert torch.equal(policy(ids, rows=policy.bank.rows.clone(), slots=slots.long()).logits, wanted)
        per_token = slots[:, None].expand(2, 7).contiguous()
        torch.testing.assert_close(policy(ids, slots=per_token).logits, wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(policy(ids).logits, policy(ids, slots=torch.zeros_like(slots)).logits)


@pytest.mark.parametrize(
    ("rows", "slots", "error", "message"),
    [
        (None, torch.tensor([2, 66], dtype=torch.int32), IndexError, "slots: .*66"),
        (None, torch.tensor([2, -1], dtype=torch.int32), IndexError, "slots: .*-1"),
        (None, torch.tensor([1], dtype=torch.int32), ValueError, "users: .*2 rows, got 1"),
        (None, torch.tensor([1, 1, 1]), ValueError, "users: .*2 rows, got 3"),
        (None, torch.ones(2, 3, dtype=torch.int32), ValueError, "slots: .*\\[2, 3\\]"),
        (None, torch.ones(2), TypeError, "slots: .*float32"),
        (None, [1, 1], TypeError, "slots: .*\\[1, 1\\]"),
        (lambda rows: rows[:, :-1], torch.tensor([1, 1]), ValueError, "rows: expected shape"),
        (lambda rows: torch.cat([rows, rows], 1), torch.tensor([1, 1]), ValueError, "rows: expected shape"),
        (lambda rows: rows[0], torch.tensor([1, 1]), ValueError, "rows: expected shape"),
        (lambda rows: rows.long(), torch.tensor([1, 1]), TypeError, "rows: .*int64"),
        (lambda rows: rows, None, ValueError, "slots: .*None"),
    ],
)
def test_bad_rows_and_slots_are_named(rows: Any, slots: Any, error: type[Exception], message: str) -> None:
    policy = make_policy()
    with pytest.raises(error, match=message):
        policy(make_ids(2), rows=rows and rows(policy.bank.rows), slots=slots)
    with torch.no_grad():  # and the next forward is not marked by it
        assert torch.equal(policy(make_ids(2)).logits, make_model()(make_ids(2)).logits)


@pytest.mark.parametrize(
    ("users", "error", "message"),
    [
        (["nobody"], UnknownUser, "'nobody'"),
        ("alice", TypeError, "users: .*'alice'"),
        ([None], TypeError, "users: .*None"),
        (["alice", "alice"], ValueError, "users: .*1 rows, got 2"),
        ([], ValueError, "users: .*1 rows, got 0"),
    ],
)
def test_bad_users_are_named(users: Any, error: type[Exception], message: str) -> None:
    policy = with_users(make_policy())
    with pytest.raises(error, match=message), policy.steer(users):
        policy.model(make_ids(1))
    assert not policy.bank.pinned(policy.users.slot("alice"))


# ---------------------------------------------------------------- what else a model goes through


def test_a_deep_copy_of_the_model_steers_by_its_own_adapters() -> None:
    policy = with_users(make_policy())
    model, ids = policy.model, make_ids(1)
    active = ActiveUsers(policy.bank.rows, torch.tensor([policy.users.slot("alice")]))
    with policy.steer(["alice"]):
        steered = logits(model, ids)
        twin = copy.deepcopy(model)
        plain = logits(twin, ids)  # whom the original serves is not the copy's affair
    assert torch.equal(plain, logits(model, ids))
    current = next(module.fssa.current for module in twin.modules() if hasattr(module, "fssa"))
    with current.serve(active):
        assert torch.equal(logits(twin, ids), steered)
        assert torch.equal(logits(model, ids), plain)
    for name, parameter in model.named_parameters():
        if ".fssa.b." in name:
            parameter.data.zero_()
    with current.serve(active):
        assert torch.equal(logits(twin, ids), steered)


def test_recorded_hidden_states_are_the_steered_ones() -> None:
    policy = with_users(make_policy(film=(0,), modulations=()))
    policy.attachment.check()
    ids, seen = make_ids(1), []
    blocks = blocks_of(policy.model)[1]
    handle = blocks[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    with policy.steer(["alice"]):
        with torch.no_grad():
            states = policy.model(ids, output_hidden_states=True).hidden_states
    handle.remove()
    assert torch.equal(states[1], seen[0])
    with torch.no_grad():
        base = policy.model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(states[0], base[0]) and not torch.allclose(states[1], base[1])


def test_a_bfloat16_base() -> None:
    exact = with_users(make_policy(make_model(dtype=torch.bfloat16).float()))
    model, ids = make_model(dtype=torch.bfloat16), make_ids(4)
    plain = logits(model, ids)
    policy = with_users(make_policy(model))
    assert policy.bank.rows.dtype == torch.bfloat16 and policy.encoder.inner0.weight.dtype == torch.float32
    with policy.steer(MIXED), exact.steer(MIXED):
        steered, wanted = logits(model, ids), logits(exact.model, ids)
    assert steered.dtype == torch.bfloat16 and torch.equal(steered[1], plain[1])
    # Eight bits of mantissa through two blocks: the steered rows err no more than three times as the base's do.
    base_error = (plain.float() - logits(exact.model, ids)).abs().amax() / wanted[1].abs().amax()
    error = (steered.float() - wanted).abs().amax((1, 2)) / wanted.abs().amax((1, 2))
    assert (error <= 3 * base_error + 0.01).all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probs_are_those_of_the_whole_forward(name: str) -> None:
    policy = with_users(make_policy(make_model(name)))
    ids = make_ids(3, 9)
    lengths = torch.tensor([9, 7, 5])
    mask = (torch.arange(9) < lengths[:, None]).long()
    start = torch.tensor([2, 4, 4])
    batch = {"input_ids": ids, "attention_mask": mask, "response_start": start, "response_end": lengths}
    with torch.no_grad(), policy.steer(["alice", BASE, PRIOR]) as slots:
        got = policy_log_probs(policy, batch, None, slots, chunk=3)
        log_probs = policy.model(ids, attention_mask=mask).logits.log_softmax(-1)
    wanted = [sum(log_probs[b, t - 1, ids[b, t]] for t in range(start[b], lengths[b])) for b in range(3)]
    torch.testing.assert_close(got, torch.stack(wanted), rtol=1e-4, atol=1e-4)


def test_models_that_scale_their_logits_are_refused_where_the_head_is_used_alone() -> None:
    policy = make_policy()
    policy.model.config.logits_scaling = 4.0
    with pytest.raises(ValueError, match="model: .*logits_scaling"):
        policy.logits(torch.zeros(1, 32))


# ---------------------------------------------------------------- gradients


def loss_of(policy: SteerablePolicy, seeds: tuple[int, ...]) -> Tensor:
    pairs = torch.stack([torch.stack([c.chosen, c.rejected]) for s in seeds for c in make_choices(s)])  # type: ignore[misc]
    offsets = torch.arange(0, 3 * len(seeds) + 1, 3)
    latents = policy.encoder.latents(pairs, torch.zeros(len(pairs), dtype=torch.long), offsets)
    slots = torch.arange(len(seeds), dtype=torch.int32)
    out = policy(make_ids(len(seeds)), rows=policy.rows(latents), slots=slots, use_cache=False)
    return out.logits.log_softmax(-1)[..., 5].mean()


def gradients(policy: SteerablePolicy) -> dict[str, Tensor]:
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_all_that_is_trained_and_nothing_of_the_base(dtype: torch.dtype) -> None:
    policy = make_policy(make_model(dtype=dtype))
    loss_of(policy, (1, 2)).backward()
    found = gradients(policy)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert set(found) == trained and all(g.isfinite().all() and g.abs().max() > 0 for g in found.values())
    assert trained == {
        n for n, _ in policy.named_parameters() if n.startswith(("encoder", "modulator")) or ".fssa." in n
    }


@pytest.mark.parametrize("keep_products", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_gradient_checkpointing_recomputes_for_the_right_users(name: str, keep_products: bool) -> None:
    def run(checkpointed: bool) -> dict[str, Tensor]:
        policy = make_policy(make_model(name, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0))
        if checkpointed:
            policy.gradient_checkpointing_enable({"keep_products": keep_products})
        policy.train()
        policy.encoder.eval()  # its dropout is not what is asked about
        first, second = loss_of(policy, (1, 2)), loss_of(policy, (3, 4))  # two forwards, then one backward
        with policy.steer([PRIOR]):  # and other users about while it runs
            (first + 2 * second).backward()
        return gradients(policy)

    plain, checkpointed = run(False), run(True)
    assert set(plain) == set(checkpointed)
    for key in plain:
        torch.testing.assert_close(checkpointed[key], plain[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mean", [1.0, 0.0])
def test_a_latent_of_zeros_begins_as_the_plain_adapter_or_as_the_base_model(mean: float) -> None:
    model = make_model()
    config = make_config(model, modulations=("scale_shift",))
    policy = SteerablePolicy(model, config, modulation_std=0.3, modulation_mean=mean)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".fssa.b." in name:
                parameter.normal_()
    ids, slots = make_ids(2, 7), torch.zeros(2, dtype=torch.int32)

    def logits(latent: Tensor) -> Tensor:
        return policy(ids, rows=policy.rows(latent), slots=slots).logits

    assert torch.equal(logits(torch.zeros(1, LATENT)), policy.model(ids).logits) == (mean == 0)
    assert not torch.equal(logits(torch.ones(1, LATENT)), policy.model(ids).logits)


def test_products_that_are_kept_are_not_computed_again() -> None:
    def products(keep: bool) -> int:
        policy = make_policy()
        policy.gradient_checkpointing_enable({"keep_products": keep})
        policy.train()
        with Products() as counted:
            loss_of(policy, (1, 2)).backward()
        return counted.number

    assert products(True) < products(False)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **kwargs or {})


def test_reentrant_checkpoints_are_refused() -> None:
    with pytest.raises(ValueError, match="use_reentrant"):
        make_policy().gradient_checkpointing_enable({"use_reentrant": True})


def test_the_default_targets_are_projections_of_the_model() -> None:
    assert default_targets(make_model("llama")) == ("q_proj", "v_proj")
    assert default_targets(make_model("gpt2")) == ("c_attn",)
    assert default_targets(make_model("phi3")) == ("qkv_proj",)
    assert make_loras(make_model(), "none")[0].targets == ("q_proj", "v_proj")
