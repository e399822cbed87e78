"""The objectives, as pure functions of tensors; each returns scalars to minimise, averaged over everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fssa_fast.arguments import check_choices, check_tensor
from fssa_fast.nn.reward import btl_log_probs, dpl_log_probs

KL = ("context-target", "target-context")

Distribution = tuple[Tensor, Tensor]


# ---------------------------------------------------------------- rewards


def choice_loss(log_probs: Tensor, choices: Tensor) -> Tensor:
    """Mean negative log-probability of the choices made.

    Args:
        log_probs: [..., U, P, 2], that each option is preferred; leading dimensions are samples of the latent.
        choices: integers [U, P], 0 or 1, the option chosen.

    Returns: a scalar. Raises: ValueError naming the argument.
    """
    if log_probs.dim() < 3 or choices.shape != log_probs.shape[-3:-1] or choices.is_floating_point():
        raise ValueError(
            f"choices: expected integers of shape {list(log_probs.shape[-3:-1])}, got {choices.dtype} "
            f"{list(choices.shape)}"
        )
    check_choices(choices)
    which = choices.long().unsqueeze(-1).expand(*log_probs.shape[:-1], 1)
    return -log_probs.gather(-1, which).mean()


def btl(rewards: Tensor, choices: Tensor) -> Tensor:
    """`-log p` of choices [U, P] under rewards [U, P, 2], by Bradley, Terry and Luce. Raises as `choice_loss`."""
    return choice_loss(btl_log_probs(rewards), choices)


def dpl(rewards: Tensor, choices: Tensor) -> Tensor:
    """`-log p` of choices [U, P] under means and deviations [U, P, 2, 2] of rewards. Raises as `choice_loss`."""
    return choice_loss(dpl_log_probs(rewards), choices)


def kl_divergence(p: Distribution, q: Distribution) -> Tensor:
    """`KL(p || q)` [U] of two normal distributions with independent columns, each (mean, deviation) of [U, H]."""
    (p_mean, p_deviation), (q_mean, q_deviation) = p, q
    ratio, distance = p_deviation / q_deviation, (p_mean - q_mean) / q_deviation
    return (0.5 * (ratio.square() + distance.square() - 1) - ratio.log()).sum(-1)


class NPBTLLoss(NamedTuple):
    """What `np_btl` returns, scalars: loss = nll + kl_weight * kl."""

    loss: Tensor
    nll: Tensor
    kl: Tensor | None  # None where latents are not sampled


def np_btl(
    rewards: Tensor,
    choices: Tensor,
    *,
    context: Distribution | None = None,
    target: Distribution | None = None,
    kl_weight: float = 1.0,
    kl: str = "context-target",
) -> NPBTLLoss:
    """The loss of a neural process over rewards.

    Semantics: `nll = mean over S, U, P of -log p(choice)`; with sampled latents `loss = nll + kl_weight * mean over U
    of KL`, where KL is `KL(q(z|C) || q(z|T))` for kl = "context-target" and `KL(q(z|T) || q(z|C))`, which the
    neural-process bound has, for kl = "target-context".

    Args:
        rewards: [U, P, 2], or [S, U, P, 2] for S samples of each latent.
        choices: integers [U, P].
        context, target: q(z|C) and q(z|T), each (mean, deviation) of [U, H]; both, or neither for point latents.

    Raises: ValueError naming the argument.
    """
    if (context is None) != (target is None):
        raise ValueError("context, target: expected both distributions or neither, got one")
    if kl not in KL:
        raise ValueError(f"kl: expected one of {KL}, got {kl!r}")
    nll = btl(rewards, choices)
    if context is None or target is None:
        return NPBTLLoss(nll, nll, None)
    first, second = (context, target) if kl == "context-target" else (target, context)
    divergence = kl_divergence(first, second).mean()
    return NPBTLLoss(nll + kl_weight * divergence, nll, divergence)


# ---------------------------------------------------------------- policies


def response_log_probs(
    hidden: Tensor,
    head: Tensor | Callable[[Tensor], Tensor],
    input_ids: Tensor,
    response_start: Tensor,
    response_end: Tensor,
    *,
    chunk: int = 256,
) -> Tensor:
    """Log-probability of each row's response, summed over its tokens.

    Semantics: `sum over t in [response_start[b], response_end[b]) of log p(input_ids[b, t] | input_ids[b, :t])`, the
    token at t being predicted from the hidden state at t - 1.

    Logits are made for response tokens only, `chunk` at a time, and are not kept: memory is that of `chunk` rows of the
    vocabulary, whatever B and T are. Where the head is frozen they are made once, and the gradient with them; where it
    learns too, again in the backward pass.

    Args:
        hidden: the model's last hidden states, after its final norm, [B, T, D].
        head: the language model head's weight [V, D], or a function from [n, D] to logits [n, V] (a head with a bias,
            with a cap or a scale on its logits).
        input_ids: integers [B, T].
        response_start, response_end: integers [B], 1 <= start <= end <= T.
        chunk: tokens whose logits exist at one time, >= 1.

    Returns: [B], float32 (float64 where hidden is). An empty response has 0.
    Raises: ValueError, TypeError naming the argument.
    """
    check_tensor("hidden", hidden, (None, None, None))
    rows, length, width = hidden.shape
    for name, ids, shape in (
        ("input_ids", input_ids, (rows, length)),
        ("response_start", response_start, (rows,)),
        ("response_end", response_end, (rows,)),
    ):
        if tuple(ids.shape) != shape or ids.is_floating_point():
            raise ValueError(f"{name}: expected integers of shape {list(shape)}, got {ids.dtype} {list(ids.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk: expected an integer >= 1, got {chunk}")
    bad = (response_start < 1) | (response_end < response_start) | (response_end > length)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"response_start, response_end: expected 1 <= start <= end <= T = {length}, got "
            f"{int(response_start[row])} and {int(response_end[row])} in row {row}"
        )
    if isinstance(head, Tensor):
        check_tensor("head", head, (None, width), hidden)
    position = torch.arange(1, length, device=hidden.device)
    in_response = (position >= response_start.unsqueeze(1)) & (position < response_end.unsqueeze(1))
    states, labels = hidden[:, :-1][in_response], input_ids[:, 1:][in_response].long()

    def logits_of(states: Tensor) -> Tensor:
        return F.linear(states, head) if isinstance(head, Tensor) else head(states)

    if torch.is_grad_enabled() and logits_of(states[:0].detach()).requires_grad:
        parts = [
            checkpoint(_log_probs_of, logits_of, s, t, use_reentrant=False, preserve_rng_state=False)
            for s, t in zip(states.split(chunk), labels.split(chunk), strict=True)
        ]
        per_token = torch.cat(parts)
    else:
        per_token = _FrozenHeadLogProbs.apply(states, labels, logits_of, chunk)
    # Back to one row a response: a sum over a row does not depend on its neighbours, as an indexed add on a GPU would.
    return per_token.new_zeros(in_response.shape).masked_scatter(in_response, per_token).sum(1)


def _log_probs_of(logits_of: Callable[[Tensor], Tensor], states: Tensor, labels: Tensor) -> Tensor:
    logits = logits_of(states)
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


class _FrozenHeadLogProbs(torch.autograd.Function):
    """Log-probability [n] of each label given its state, `chunk` of them at a time.

    A token's log-probability depends on its own state alone, so its gradient, but for a factor that the backward pass
    brings, is known as soon as its logits are.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, labels: Tensor, logits_of: Callable[[Tensor], Tensor], chunk: int) -> Tensor:
        values, gradients = [], []
        for part, wanted in zip(states.split(chunk), labels.split(chunk), strict=True):
            if not ctx.needs_input_grad[0]:
                values.append(_log_probs_of(logits_of, part, wanted))
                continue
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                logits = logits_of(part)
            wide = logits.detach().float() if logits.dtype.itemsize < 4 else logits.detach()
            index, total = wanted.unsqueeze(-1), wide.logsumexp(-1, keepdim=True)
            values.append((wide.gather(-1, index) - total).squeeze(-1))
            slope = (wide - total).exp_().neg_()  # the gradient of log softmax at a label: 1 there, minus softmax
            slope.scatter_add_(-1, index, torch.ones_like(total))
            gradients += torch.autograd.grad(logits, part, slope.to(logits.dtype))
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return grads[0].unsqueeze(-1).to(slopes.dtype) * slopes, None, None, None


class NPDPOLoss(NamedTuple):
    """What `np_dpo` returns."""

    loss: Tensor  # scalar: preference + likelihood_weight * likelihood
    accuracy: Tensor  # scalar: share of pairs whose chosen answer has the larger implicit reward
    margin: Tensor  # [...]: implicit reward of the chosen answer minus that of the rejected one
    likelihood: Tensor | None  # scalar: mean over pairs of -log p a token of the chosen answer


def np_dpo(
    policy: Tensor,
    reference: Tensor,
    *,
    beta: float = 0.1,
    likelihood_weight: float = 0.0,
    chosen_tokens: Tensor | None = None,
) -> NPDPOLoss:
    """Direct preference optimisation of a policy that is given each user's latent.

    Semantics: `margin = beta ((policy_c - policy_r) - (reference_c - reference_r))`, `loss = mean(-logsigmoid(margin))
    + likelihood_weight * mean(-policy_c / chosen_tokens)`, c and r the chosen and the rejected answer. The second term
    keeps the loss from being met by lowering the likelihood of both answers.

    Args:
        policy, reference: log-probability of the chosen and the rejected answer, [..., 2], under the policy and under
            the base model.
        chosen_tokens: the chosen answers' numbers of tokens, [...], where likelihood_weight is not 0.

    Raises: ValueError, TypeError naming the argument.
    """
    check_tensor("policy", policy, (*policy.shape[:-1], 2))
    check_tensor("reference", reference, policy.shape, policy)
    if likelihood_weight and (chosen_tokens is None or chosen_tokens.shape != policy.shape[:-1]):
        raise ValueError(
            f"chosen_tokens: expected shape {list(policy.shape[:-1])} where likelihood_weight is not 0, got "
            f"{None if chosen_tokens is None else list(chosen_tokens.shape)}"
        )
    rewards = beta * (policy - reference)
    margin = rewards[..., 0] - rewards[..., 1]
    loss, likelihood = -F.logsigmoid(margin).mean(), None
    if likelihood_weight and chosen_tokens is not None:
        likelihood = -(policy[..., 0] / chosen_tokens).mean()
        loss = loss + likelihood_weight * likelihood
    return NPDPOLoss(loss, (margin > 0).to(margin.dtype).mean(), margin, likelihood)
