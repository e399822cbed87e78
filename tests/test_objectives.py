"""The objectives against their formulas, written out."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from fssa_fast.training import objectives
from fssa_fast.training.objectives import np_btl, np_dpo, response_log_probs

U, P, H = 3, 5, 4


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def choices_of(seed=1):
    return torch.randint(0, 2, (U, P), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- rewards


def test_btl():
    rewards, choices = draw(U, P, 2), choices_of()
    expected = -sum(
        math.log(1 / (1 + math.exp(rewards[u, p, 1 - choices[u, p]] - rewards[u, p, choices[u, p]])))
        for u in range(U)
        for p in range(P)
    ) / (U * P)
    assert_close(objectives.btl(rewards, choices).item(), expected)


def test_dpl():
    rewards, choices = draw(U, P, 2, 2), choices_of()
    rewards[..., 1] = rewards[..., 1].abs() + 0.1
    mean, deviation = rewards.unbind(-1)
    t = (mean[..., 0] - mean[..., 1]) / deviation.square().sum(-1).sqrt() * (1 - 2 * choices)
    expected = torch.log1p(torch.exp(-t * math.sqrt(2 * math.pi))).mean()
    assert_close(objectives.dpl(rewards, choices), expected)


def test_extreme_margins_stay_finite():
    rewards = torch.tensor([[[1e4, -1e4], [-1e4, 1e4]]], requires_grad=True)
    loss = objectives.btl(rewards, torch.tensor([[0, 0]]))
    loss.backward()
    assert_close(loss.item(), 1e4)
    assert torch.isfinite(rewards.grad).all()


@pytest.mark.parametrize("kl, first", [("context-target", 0), ("target-context", 1)])
def test_np_btl(kl, first):
    rewards, choices = draw(2, U, P, 2), choices_of()
    q = [(draw(U, H, seed=s), draw(U, H, seed=s + 1).abs() + 0.1) for s in (2, 4)]
    result = np_btl(rewards, choices, context=q[0], target=q[1], kl_weight=0.5, kl=kl)
    nll = (objectives.btl(rewards[0], choices) + objectives.btl(rewards[1], choices)) / 2
    divergence = kl_divergence(Normal(*q[first]), Normal(*q[1 - first])).sum(-1).mean()
    assert_close(result.nll, nll)
    assert_close(result.kl, divergence)
    assert_close(result.loss, nll + 0.5 * divergence)


def test_np_btl_of_points_is_btl():
    rewards, choices = draw(U, P, 2), choices_of()
    result = np_btl(rewards, choices)
    assert result.kl is None and result.loss is result.nll
    assert_close(result.loss, objectives.btl(rewards, choices))


def test_reward_objectives_are_differentiable():
    choices = choices_of()
    spread = torch.tensor([0.0, 3.0], dtype=torch.float64)
    assert gradcheck(lambda r: objectives.btl(r, choices), draw(U, P, 2).requires_grad_())
    assert gradcheck(lambda r: objectives.dpl(r + spread, choices), draw(U, P, 2, 2).requires_grad_())
    fixed = draw(U, H), torch.ones(U, H, dtype=torch.float64)

    def loss(rewards, mean, deviation):
        return np_btl(rewards, choices, context=(mean, deviation.exp()), target=fixed).loss

    assert gradcheck(
        loss, tuple(t.requires_grad_() for t in (draw(2, U, P, 2), draw(U, H, seed=1), draw(U, H, seed=2)))
    )


@pytest.mark.parametrize(
    "choices",
    [torch.zeros(U, P + 1).long(), torch.zeros(U, P, 1).long(), torch.zeros(P).long(), torch.zeros(U, P),
     torch.full((U, P), 2), torch.full((U, P), -1)],
)  # fmt: skip
def test_rewards_refuse_choices(choices):
    with pytest.raises(ValueError, match="choices"):
        objectives.btl(draw(U, P, 2), choices)
    with pytest.raises(ValueError, match="choices"):
        np_btl(draw(4, U, P, 2), choices)


def test_np_btl_refuses():
    q = (draw(U, H), torch.ones(U, H, dtype=torch.float64))
    with pytest.raises(ValueError, match="context, target"):
        np_btl(draw(U, P, 2), choices_of(), context=q)
    with pytest.raises(ValueError, match="kl: expected one of"):
        np_btl(draw(U, P, 2), choices_of(), context=q, target=q, kl="reverse")


# ---------------------------------------------------------------- policies


def test_np_dpo():
    policy, reference = draw(U, P, 2), draw(U, P, 2, seed=1)
    result = np_dpo(policy, reference, beta=0.3)
    margin = 0.3 * ((policy[..., 0] - policy[..., 1]) - (reference[..., 0] - reference[..., 1]))
    assert_close(result.margin, margin)
    assert_close(result.loss, torch.log1p(torch.exp(-margin)).mean())
    assert_close(result.accuracy, (margin > 0).double().mean())
    assert result.likelihood is None


def test_np_dpo_of_the_base_model_itself():
    policy = draw(U, 2)
    result = np_dpo(policy, policy)
    assert_close(result.loss.item(), math.log(2))
    assert result.accuracy == 0


def test_np_dpo_likelihood():
    policy, reference = draw(U, 2), draw(U, 2, seed=1)
    tokens = torch.tensor([3, 1, 7])
    plain, result = np_dpo(policy, reference), np_dpo(policy, reference, likelihood_weight=0.5, chosen_tokens=tokens)
    assert_close(result.likelihood, -(policy[:, 0] / tokens).mean())
    assert_close(result.loss, plain.loss + 0.5 * result.likelihood)
    with pytest.raises(ValueError, match="chosen_tokens"):
        np_dpo(policy, reference, likelihood_weight=0.5)
    with pytest.raises(ValueError, match="chosen_tokens"):
        np_dpo(policy, reference, likelihood_weight=0.5, chosen_tokens=tokens[:2])


def test_np_dpo_refuses():
    with pytest.raises(ValueError, match="policy"):
        np_dpo(draw(U, 3), draw(U, 3))
    with pytest.raises(ValueError, match="reference"):
        np_dpo(draw(U, 2), draw(P, 2))
    with pytest.raises(TypeError, match="reference"):
        np_dpo(draw(U, 2), draw(U, 2).float())


B, T, D, V = 4, 9, 6, 11


def batch():
    hidden, head = draw(B, T, D), draw(V, D, seed=1)
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(2))
    return hidden, head, ids, torch.tensor([1, 4, 3, 8]), torch.tensor([9, 6, 3, 9])


def written_out(hidden, head, ids, start, end):
    log_probs = torch.log_softmax(hidden @ head.T, -1)
    return torch.stack(
        [
            sum((log_probs[b, t - 1, ids[b, t]] for t in range(start[b], end[b])), log_probs.new_zeros(()))
            for b in range(B)
        ]
    )


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_response_log_probs(chunk):
    hidden, head, ids, start, end = batch()
    leaves = [hidden.requires_grad_(), head.requires_grad_()]
    ours, theirs = response_log_probs(hidden, head, ids, start, end, chunk=chunk), written_out(*batch())
    assert_close(ours.detach(), theirs)
    assert ours[2] == 0  # an empty response
    weights = draw(B, seed=3)
    grads = torch.autograd.grad(ours @ weights, leaves)
    expected = torch.autograd.grad(written_out(hidden, head, ids, start, end) @ weights, leaves)
    for grad, want in zip(grads, expected, strict=True):
        assert_close(grad, want)


def test_logits_exist_for_a_chunk_of_response_tokens_at_a_time():
    hidden, head, ids, start, end = batch()
    hidden.requires_grad_()
    seen = []

    def record(states):
        seen.append(len(states))
        return states @ head.T

    tokens = int((end - start).sum())
    response_log_probs(hidden, record, ids, start, end, chunk=4).sum().backward()
    assert max(seen) <= 4 and sum(seen) == tokens  # a frozen head's: once, gradient and all
    seen.clear()
    head.requires_grad_()
    total = response_log_probs(hidden, record, ids, start, end, chunk=4)
    assert max(seen) <= 4 and sum(seen) == tokens
    total.sum().backward()
    assert max(seen) <= 4 and sum(seen) == 2 * tokens  # made again, not kept


def test_the_gradient_through_a_frozen_head_is_that_through_a_learning_one():
    hidden, head, ids, start, end = batch()
    weights = draw(B, seed=3)

    def gradient(head, states):
        capped = lambda h: 3 * torch.tanh(h @ head.T / 3)  # noqa: E731
        total = response_log_probs(states, capped, ids, start, end, chunk=4)
        return torch.autograd.grad((total * weights).sum(), states)[0]

    exact = gradient(head.double(), hidden.double().requires_grad_())
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        frozen, states = head.detach().to(dtype), hidden.detach().to(dtype).requires_grad_()
        ours, other = gradient(frozen, states), gradient(frozen.clone().requires_grad_(), states)
        error, allowed = ((found - exact).abs().max() for found in (ours, other))
        assert error <= 2 * allowed + 1e-15


def test_no_gradient_is_made_where_none_is_wanted():
    hidden, head, ids, start, end = batch()
    assert not response_log_probs(hidden, head, ids, start, end).requires_grad
    with torch.no_grad():
        assert not response_log_probs(hidden.requires_grad_(), head, ids, start, end).requires_grad


def test_only_responses_matter():
    hidden, head, ids, start, end = batch()
    expected = response_log_probs(hidden, head, ids, start, end)
    for b in range(B):
        hidden[b, end[b] - 1 :] = float("nan")
        hidden[b, : start[b] - 1] = float("nan")
        ids[b, end[b] :] = ids[b, : start[b]] = -100
    assert torch.equal(response_log_probs(hidden, head, ids, start, end), expected)


def test_all_responses_empty():
    hidden, head, ids, start, _ = batch()
    hidden.requires_grad_()
    total = response_log_probs(hidden, head, ids, start, start)
    assert torch.equal(total, torch.zeros(B, dtype=torch.float64))


def test_low_precision_sums_in_float32():
    hidden, head, ids, start, end = batch()
    ours = response_log_probs(hidden.bfloat16(), head.bfloat16(), ids, start, end)
    assert ours.dtype == torch.float32
    own = written_out(hidden.bfloat16(), head.bfloat16(), ids, start, end)
    exact = written_out(hidden.bfloat16().double(), head.bfloat16().double(), ids, start, end)
    assert (ours.double() - exact).abs().max() <= 2 * (own.double() - exact).abs().max() + 1e-3


@pytest.mark.parametrize(
    "change, name",
    [
        ({"hidden": draw(B, D)}, "hidden"),
        ({"input_ids": torch.zeros(B, T + 1).long()}, "input_ids"),
        ({"input_ids": torch.zeros(B, T)}, "input_ids"),
        ({"response_start": torch.zeros(B, 1).long()}, "response_start"),
        ({"response_end": torch.full((B + 1,), 3)}, "response_end"),
        ({"response_start": torch.tensor([0, 4, 3, 8])}, "0 and 9 in row 0"),
        ({"response_end": torch.tensor([9, 6, 2, 9])}, "3 and 2 in row 2"),
        ({"response_end": torch.tensor([9, 6, 3, 10])}, "8 and 10 in row 3"),
        ({"head": draw(V, D + 1)}, "head"),
        ({"head": draw(V, D).float()}, "head"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_response_log_probs_refuses(change, name):
    names = ("hidden", "head", "input_ids", "response_start", "response_end")
    with pytest.raises((ValueError, TypeError), match=name):
        response_log_probs(**(dict(zip(names, batch(), strict=True)) | change))
