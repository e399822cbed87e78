"""What the library computes, against tensors recorded from the reference implementation.

FSSA_GOLDEN names the directory; each of its files is a test, and everything about it comes from its metadata.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from fssa_fast.backends import load_backend, use_backend
from fssa_fast.nn import BTL, DPL, NPBTL, pack_choices
from fssa_fast.policy import SteerablePolicy
from fssa_fast.policy.import_reference import build_policy
from fssa_fast.policy.reference_checkpoint import (
    ReferencePolicy,
    encoder_from_state,
    policy_from_state,
    read_reference,
    reward_from_state,
)
from fssa_fast.steering.attach import ActiveUsers
from fssa_fast.training.objectives import choice_loss, np_btl, np_dpo, response_log_probs

GOLDEN = Path(os.environ.get("FSSA_GOLDEN") or Path(__file__).parent / "golden")


def golden(pattern):
    found = sorted(GOLDEN.glob(pattern))
    return pytest.mark.parametrize("path", found, ids=[path.stem for path in found])


def read(path):
    """The tensors of a file by name, the reference's weights among them as state, and its metadata."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = {name: json.loads(value) for name, value in file.metadata().items()}
    state = {name.removeprefix("w."): tensor for name, tensor in tensors.items() if name.startswith("w.")}
    return tensors, state, metadata


def pack(pairs, choices):
    """Dense contexts [U, K, 2, E] and [U, K, 1], packed."""
    return pack_choices(list(pairs), list(choices.squeeze(-1)))


def close(ours, theirs, tolerance=1e-5):
    """Agreement relative to the largest number of the tensor: its small ones are differences of large ones."""
    assert torch.isfinite(theirs).all()
    assert_close(ours, theirs.view(ours.shape), rtol=tolerance, atol=tolerance * max(theirs.abs().max().item(), 1e-6))


@pytest.fixture(params=["reference", "cpu", pytest.param("triton", marks=pytest.mark.proof)])
def backend(request):
    if request.param != "reference":
        module, reason = load_backend(request.param)
        if module is None:
            pytest.skip(reason)
        refusal = module.refuses("context", torch.zeros(1))
        if refusal is not None:
            pytest.skip(refusal)
    with use_backend(request.param):
        yield


def test_there_are_golden_files():
    assert list(GOLDEN.glob("*.safetensors")), f"no golden files in {GOLDEN}"


# ---------------------------------------------------------------- context


@golden("context_*.safetensors")
@torch.no_grad()
def test_context(path, backend):
    tensors, state, metadata = read(path)
    encoder = encoder_from_state(metadata["config"], state, str(path))
    cases = sorted(name.removesuffix(".z") for name in tensors if name.endswith(".z"))
    assert cases
    everyone = []
    for case in cases:
        pairs, choices, z = (tensors[f"{case}.{part}"] for part in ("pairs", "choices", "z"))
        close(encoder(*pack(pairs, choices)), z)
        everyone += zip(pairs, choices.squeeze(-1), z, strict=True)
    # All the users in one batch, of different K: no user's result depends on the others.
    everyone = everyone[::2] + everyone[1::2]
    packed = pack_choices([user[0] for user in everyone], [user[1] for user in everyone])
    close(encoder(*packed), torch.stack([user[2] for user in everyone]))


@golden("context_*.safetensors")
@torch.no_grad()
def test_empty_context_is_the_outer_encoder_of_zero(path, backend):
    _, state, metadata = read(path)
    encoder = encoder_from_state(metadata["config"], state, str(path))
    zero = torch.zeros(1, encoder.latent_width)
    none = torch.zeros(0, 2, encoder.embedding_width)
    close(
        encoder(none, torch.zeros(0, dtype=torch.int64), torch.tensor([0, 0])),
        encoder.outer1(encoder.outer0(zero).relu()),
    )


# ---------------------------------------------------------------- rewards


@golden("reward_*.safetensors")
@torch.no_grad()
def test_reward(path, backend):
    tensors, state, metadata = read(path)
    model = reward_from_state(metadata["config"], state, str(path))
    pairs, choices = tensors["pairs"], tensors["choices"].squeeze(-1)
    context = pack(pairs[:, : metadata["num_context"]], tensors["choices"][:, : metadata["num_context"]])
    if not isinstance(model, NPBTL):
        assert "z" not in tensors
        rewards = model(pairs)
        close(choice_loss(model.log_probs(rewards), choices), tensors["loss"])
        close(choice_loss(model.log_probs(rewards), choices), tensors["nll"])
    else:
        if not model.encoder.sampled:
            assert "kl" not in tensors
            close(model.encoder.latents(*context), tensors["z"])
            close(model(pairs, *context), tensors["rewards"])
        rewards = model.rewards(pairs, tensors["z"])
        q_c = q_t = None
        if model.encoder.sampled:
            q_c = model.encoder.distribution(model.encoder(*context))
            q_t = model.encoder.distribution(model.encoder(*pack(pairs, tensors["choices"])))
            for ours, name in zip((*q_c, *q_t), ("q_c_mean", "q_c_std", "q_t_mean", "q_t_std"), strict=True):
                close(ours, tensors[name])
        loss = np_btl(rewards, choices, context=q_c, target=q_t, kl_weight=metadata["beta_kl"])
        close(loss.loss, tensors["loss"])
        close(loss.nll, tensors["nll"])
        if loss.kl is not None:
            close(loss.kl, tensors["kl"])
    close(rewards, tensors["rewards"])
    close(model.log_probs(rewards), tensors["logp_choices"])


@golden("checkpoint_reward_*")
@torch.no_grad()
def test_checkpoint_reward(path, backend, tmp_path):
    model = read_reference(path)
    assert type(model) in (BTL, DPL, NPBTL) and not model.training
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    targets = torch.randn(3, 5, 2, model.embedding_width, generator=torch.Generator().manual_seed(0))
    inputs = (targets, *pack(targets[:, :2], torch.ones(3, 2, 1, dtype=torch.int64)))[
        : 4 if isinstance(model, NPBTL) else 1
    ]
    rewards = model(*inputs)
    assert torch.isfinite(rewards).all()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    close(again(*inputs), rewards)  # not equal: products round by how memory is aligned
    twin = GOLDEN / f"{path.name.removeprefix('checkpoint_')}.safetensors"
    if not twin.exists():
        pytest.skip(f"nothing is recorded of {path.name}: there is no {twin.name}")
    tensors, _, _ = read(twin)
    latents = (tensors["z"],) if isinstance(model, NPBTL) else ()
    close((model.rewards if latents else model)(tensors["pairs"], *latents), tensors["rewards"])


# ---------------------------------------------------------------- policies


def base_model(tensors, metadata):
    """The tiny base model of a policy file."""
    tied = "base.lm_head.weight" not in tensors
    config = AutoConfig.for_model(metadata["arch"], **metadata["base_config"], tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {name.removeprefix("base."): t for name, t in tensors.items() if name.startswith("base.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if tied else set())
    return model.eval()


def check_policy(policy, tensors, beta):
    """That this policy computes everything that a policy file records."""

    def serve(rows, slots):
        return policy.attachment.current.serve(None if rows is None else ActiveUsers(rows, slots))

    prompts, latents = tensors["prompts"], tensors["latents"]
    slots = torch.arange(len(prompts))
    rows = policy.rows(latents)
    close(policy(prompts, rows=rows, slots=slots).logits, tensors["logits"], 1e-4)
    identity = rows.clone()  # adapters on, FiLM off
    for site in policy.layout.films:
        identity[:, site.scale] = identity[:, site.shift] = 0
    close(policy(prompts, rows=identity, slots=slots).logits, tensors["logits_no_latent"], 1e-4)
    new = tensors["greedy"].shape[1] - prompts.shape[1]
    with serve(rows, slots):
        greedy = policy.model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert torch.equal(greedy, tensors["greedy"])

    # The DPO batch: U users, P pairs each, two answers a pair.
    z = policy.encoder.latents(*pack(tensors["pairs_C"], tensors["choices_C"]))
    close(z, tensors["z"])
    ids, mask = tensors["pairs_T.input_ids"], tensors["pairs_T.attention_mask"]
    start, end = tensors["pairs_T.response_start_idx"], tensors["pairs_T.cls_idx"]
    users = torch.arange(len(ids)).repeat_interleave(ids.shape[1] * 2)
    head = policy.model.get_output_embeddings().weight

    def log_probs(rows):
        with serve(rows, users):
            hidden = policy.model.base_model(ids.flatten(0, 2), attention_mask=mask.flatten(0, 2)).last_hidden_state
        found = response_log_probs(hidden, head, ids.flatten(0, 2), start.flatten(), end.flatten(), chunk=7)
        return found.view(ids.shape[:3])

    ours, reference = log_probs(policy.rows(z)), log_probs(None)
    close(ours, tensors["logprobs"], 1e-4)
    close(reference, tensors["ref_logprobs"], 1e-4)
    chosen_first = torch.cat([tensors["choices_T"], 1 - tensors["choices_T"]], -1)
    result = np_dpo(ours.gather(-1, chosen_first), reference.gather(-1, chosen_first), beta=beta)
    close(result.loss, tensors["dpo_loss"], 1e-4)
    close(result.accuracy, tensors["dpo_acc"], 1e-4)


@golden("policy_*.safetensors")
@torch.no_grad()
def test_policy(path, backend):
    tensors, state, metadata = read(path)
    source = policy_from_state(metadata["config"], state, str(path))
    check_policy(build_policy(SteerablePolicy, source, base_model(tensors, metadata)), tensors, metadata["beta_dpo"])


@golden("checkpoint_policy_*")
@torch.no_grad()
def test_checkpoint_policy(path, backend):
    source = read_reference(path)
    assert isinstance(source, ReferencePolicy)
    policy = SteerablePolicy.from_reference(path)
    twin = GOLDEN / f"{path.name.removeprefix('checkpoint_')}.safetensors"
    if not twin.exists():
        pytest.skip(f"nothing is recorded of {path.name}: there is no {twin.name}")
    tensors, _, metadata = read(twin)
    check_policy(policy, tensors, metadata["beta_dpo"])
