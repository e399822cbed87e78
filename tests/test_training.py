"""NP-DPO training: the data, the log-probabilities, the steps, and that a run can be stopped and goes on the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import EOS, LATENT, PAD, WIDTH, make_choices, make_loras, make_model, make_policy, make_tokenizer
from transformers import TrainerCallback

from fssa_fast import Choice, EncoderConfig, SteerablePolicy, SteeringConfig
from fssa_fast.evaluation.policies import each_held_out
from fssa_fast.training import (
    NPDPOArguments,
    NPDPOTrainer,
    OpposedData,
    Preference,
    PreferenceData,
    policy_log_probs,
)
from fssa_fast.training.data import collate, encode_answer
from fssa_fast.training.policy import ReferenceCache, np_dpo_loss, scale_steps

AXIS = F.normalize(torch.arange(1.0, WIDTH + 1), dim=0)


def make_preferences(sign: int, groups: int = 6) -> list[Preference]:
    """A user who wants, of each prompt's answers, the one of low (sign 1) or of high words (sign -1)."""
    found = []
    draw = torch.Generator().manual_seed(5)
    for i in range(groups):
        noise = 0.1 * torch.randn(2, WIDTH, generator=draw)
        pair = torch.stack([AXIS * sign, -AXIS * sign]) + noise
        low, high = f"w{6 + i} w7 w8", f"w{50 + i} w60 w61"
        chosen, rejected = (low, high) if sign > 0 else (high, low)
        for j in range(2):
            found.append(Preference(f"w{20 + i} w{30 + j}", chosen, rejected, f"topic{i}", pair))
    return found


def make_data(length: int = 64, **options: Any) -> PreferenceData:
    users = {"low": make_preferences(1), "high": make_preferences(-1)}
    return PreferenceData(users, make_tokenizer(), length=length, **{"max_context": 4, "targets": 2, **options})


def train_policy(**options: Any) -> SteerablePolicy:
    model = make_model()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = EncoderConfig(WIDTH, LATENT, inner="linear", heads=2, dropout=0.1)
        config = SteeringConfig(encoder, True, make_loras(model, "scale_shift"))
        return SteerablePolicy(model, config, tokenizer=make_tokenizer(), modulation_std=0.1, **options)


def make_trainer(policy: SteerablePolicy, folder: Path, data: Any = None, callbacks: Any = None, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
        "seed": 3,
    }
    args = NPDPOArguments(**{**settings, **options})
    return NPDPOTrainer(policy, args, make_data() if data is None else data, callbacks=callbacks)


# ---------------------------------------------------------------- data


def test_every_choice_is_held_out_once() -> None:
    users = {"low": make_preferences(1), "high": make_preferences(-1, groups=2)}
    found = each_held_out(users, max_context=3, seed=5)
    assert {name: [example.targets for example in own] for name, own in found.items()} == {
        name: [[choice] for choice in own] for name, own in users.items()
    }
    for example in (example for own in found.values() for example in own):
        groups = {choice.group for choice in example.context}
        assert len(example.context) == min(3, len(users[example.user]) - 2) and example.targets[0].group not in groups
    assert each_held_out(users, max_context=3, seed=5) == found


def test_contexts_and_targets_never_share_a_group() -> None:
    preferences = make_preferences(1)
    # Every choice has its own embedding, so that a context tells where it is from.
    marked = [
        Preference(p.prompt, p.chosen, p.rejected, p.group, torch.full((2, WIDTH), float(i)))
        for i, p in enumerate(preferences)
    ]
    group_of_prompt = {tuple(make_tokenizer()(p.prompt)["input_ids"]): p.group for p in marked}
    data = PreferenceData({"low": marked}, make_tokenizer(), length=200, max_context=3, targets=2, seed=1)
    sizes, contexts = set(), set()
    for example in (data[i] for i in range(len(data))):
        context = {marked[int(pair[0, 0])].group for pair in example["pairs"]}
        targets = {group_of_prompt[tuple(row.ids[: row.start])] for both in example["rows"] for row in both}
        assert targets and not context & targets and 1 <= len(example["rows"]) <= 2
        assert len(example["pairs"]) == len({float(pair[0, 0]) for pair in example["pairs"]})
        sizes.add(len(example["pairs"]))
        contexts |= context
    assert sizes == {0, 1, 2, 3} and contexts == {p.group for p in marked}


def test_opposed_examples_are_the_two_sides_of_a_pair() -> None:
    users = {"low": make_preferences(1), "high": make_preferences(-1)}
    marked = {
        name: [
            Preference(p.prompt, p.chosen, p.rejected, p.group, torch.full((2, WIDTH), float(i)))
            for i, p in enumerate(own)
        ]
        for name, own in users.items()
    }
    group_of_prompt = {tuple(make_tokenizer()(p.prompt)["input_ids"]): p.group for p in marked["low"]}
    data = OpposedData(marked, make_tokenizer(), length=80, max_context=3, seed=1)
    sizes, seen = set(), set()
    for i in range(0, len(data), 2):
        one, other = data[i], data[i + 1]
        ((chosen, rejected),), ((theirs, ours),) = one["rows"], other["rows"]
        assert (chosen, rejected) == (ours, theirs) and chosen != rejected
        seen.add(chosen.key)
        group = group_of_prompt[tuple(chosen.ids[: chosen.start])]
        for example in (one, other):
            sizes.add(len(example["pairs"]))
            assert group not in {marked["low"][int(pair[0, 0])].group for pair in example["pairs"]}
    assert sizes == {0, 1, 2, 3} and len(seen) > 10
    again = OpposedData(marked, make_tokenizer(), length=80, max_context=3, seed=1)
    assert all(again[i]["rows"] == data[i]["rows"] and torch.equal(again[i]["pairs"], data[i]["pairs"]) for i in (7, 3))
    with pytest.raises(IndexError, match="got 80"):
        data[80]
    with pytest.raises(ValueError, match="users: .*opposite"):
        OpposedData({"low": users["low"]}, make_tokenizer(), length=8)


def test_an_example_is_a_function_of_seed_and_index() -> None:
    def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
        return torch.equal(a["pairs"], b["pairs"]) and a["rows"] == b["rows"]

    one, two, other = make_data(seed=1), make_data(seed=1), make_data(seed=2)
    torch.manual_seed(9)
    order = list(range(len(one)))
    backwards = {i: two[i] for i in reversed(order)}
    assert all(same(one[i], backwards[i]) for i in order)
    assert sum(same(one[i], other[i]) for i in order) < len(order) // 4
    assert sum(same(one[i], one[i + 1]) for i in order[:-1]) < len(order) // 4


def test_a_pass_over_the_data_ends() -> None:
    assert len(list(make_data(length=5))) == 5
    for index in (-1, 5):
        with pytest.raises(IndexError, match=f"got {index}"):
            make_data(length=5)[index]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PreferenceData({}, make_tokenizer(), length=1), "users: .*none"),
        (lambda: PreferenceData({"a": make_preferences(1, 1)}, make_tokenizer(), length=1), "users: .*'a'"),
        (lambda: PreferenceData({"a": []}, make_tokenizer(), length=1), "users: .*'a'"),
        (lambda: make_data(max_context=-1), "max_context"),
        (lambda: make_data(targets=0), "targets"),
        (lambda: make_data(min_context=5), "min_context: .*4, got 5"),
        (
            lambda: encode_answer(make_tokenizer(), "w7 w8", "w9", True, 2),
            "prompt: expected fewer than 2 tokens, got 2",
        ),
        (lambda: encode_answer(make_tokenizer(), "", "w9", True, 9), "prompt"),
        (lambda: encode_answer(make_tokenizer(), "w7", "", False, 9), "answer"),
        (lambda: encode_answer(make_tokenizer(eos_token=None), "w7", "w9", True, 9), "tokenizer"),
    ],
)
def test_bad_data_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_answers_as_tokens() -> None:
    tokenizer = make_tokenizer()
    row = encode_answer(tokenizer, "w7 w8", "w9 w10", True, 9)
    assert (row.ids, row.start) == ([7, 8, 9, 10, EOS], 2)
    assert encode_answer(tokenizer, "w7 w8", "w9 w10", False, 9).ids == [7, 8, 9, 10]
    assert encode_answer(tokenizer, "w7 w8", "w9 w10", True, 4).ids == [7, 8, 9, 10]
    chat = encode_answer(tokenizer, [{"role": "user", "content": "w7"}], "w9", True, 9)
    assert (chat.ids, chat.start) == ([4, 7, 5, 9, EOS], 3)
    keys = {
        encode_answer(tokenizer, *arguments, 9).key
        for arguments in (("w7", "w9", True), ("w7", "w9", False), ("w7", "w10", True), ("w8", "w9", True))
    }
    assert len(keys) == 4


def test_collate() -> None:
    data = make_data(seed=4)
    examples = [data[i] for i in range(5)]
    batch = collate(examples, pad=PAD)
    rows = [(u, row) for u, example in enumerate(examples) for both in example["rows"] for row in both]
    counts = [len(example["pairs"]) for example in examples]
    assert batch["offsets"].tolist() == [sum(counts[:i]) for i in range(6)] and len(set(counts)) > 1
    assert torch.equal(batch["pairs"], torch.cat([example["pairs"] for example in examples]))
    assert batch["choices"].shape == (sum(counts),) and not batch["choices"].any()
    assert batch["slots"].tolist() == [u for u, _ in rows] and batch["slots"].dtype == torch.int32
    for i, (_, row) in enumerate(rows):
        length = len(row.ids)
        assert batch["input_ids"][i, :length].tolist() == row.ids and (batch["input_ids"][i, length:] == PAD).all()
        assert batch["attention_mask"][i].sum() == length and batch["attention_mask"][i, :length].all()
        assert (batch["response_start"][i], batch["response_end"][i]) == (row.start, length)
        assert batch["keys"][i] == row.key
    first = [row.ids for _, row in rows[:2]]
    assert first[0] != first[1] and first[0][:2] == first[1][:2]  # chosen, then rejected, of one prompt


# ---------------------------------------------------------------- log-probabilities and the loss


def naive(policy: SteerablePolicy, batch: dict[str, Any], row: int) -> torch.Tensor:
    """A row's log-probability, by itself and without padding, from the whole forward."""
    length, start = int(batch["response_end"][row]), int(batch["response_start"][row])
    ids = batch["input_ids"][row : row + 1, :length]
    log_probs = policy.model(ids).logits[0].log_softmax(-1)
    return sum((log_probs[t - 1, ids[0, t]] for t in range(start, length)), torch.zeros(()))


@torch.no_grad()
def test_the_loss_of_a_batch_by_hand() -> None:
    policy = make_policy(tokenizer=make_tokenizer())
    data = make_data(seed=4)
    examples = [data[i] for i in range(3)]
    batch = collate(examples, PAD)
    ours, base = [], []
    for row, slot in enumerate(batch["slots"].tolist()):
        base.append(naive(policy, batch, row))
        choices = [Choice(*pair) for pair in examples[slot]["pairs"]]
        policy.users.add("user", choices)
        with policy.steer(["user"]):
            ours.append(naive(policy, batch, row))
        policy.users.remove("user")
    mine = torch.stack(ours).view(-1, 2)
    margin = 0.3 * ((mine - torch.stack(base).view(-1, 2)) @ torch.tensor([1.0, -1.0]))
    tokens = (batch["response_end"] - batch["response_start"]).view(-1, 2)[:, 0]
    likelihood = -(mine[:, 0] / tokens).mean()
    args = NPDPOArguments(output_dir="nowhere", beta=0.3, likelihood_weight=0.5, chunk=4, report_to="none")
    out = np_dpo_loss(policy, batch, ReferenceCache(), args)
    torch.testing.assert_close(out.loss, -F.logsigmoid(margin).mean() + 0.5 * likelihood, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.margin.flatten(), margin, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        policy_log_probs(policy, batch, None, None).view(-1, 2), torch.stack(base).view(-1, 2), rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_the_reference_is_the_base_model_at_rest_and_computed_once() -> None:
    policy = make_policy(make_model("gpt2"))  # a model with dropout
    data = make_data(seed=4)
    batch = collate([data[i] for i in range(3)], PAD)
    wanted = torch.stack([naive(policy, batch, row) for row in range(len(batch["keys"]))])
    policy.train()
    cache, forwards = ReferenceCache(), []
    policy.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    policy.model.base_model.register_forward_pre_hook(lambda *_: forwards.append(1))
    found = cache.log_probs(policy, batch, 512)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert policy.model.training and forwards
    count = len(forwards)
    other = collate([data[i] for i in (2, 0)], PAD)
    again = cache.log_probs(policy, other, 512)
    assert len(forwards) == count
    known = dict(zip(batch["keys"], found.tolist(), strict=True))
    assert again.tolist() == [known[key] for key in other["keys"]]
    fresh = ReferenceCache().log_probs(policy, other, 512)  # bit for bit, whichever batch met it first
    assert torch.equal(fresh, again)


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_scale_steps(kind: Any) -> None:
    def run(ratio: torch.Tensor | None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        parameter, other = torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(2))
        start = parameter.detach().clone()
        optimizer = kind([parameter, other], lr=0.1)
        if ratio is not None:
            scale_steps(optimizer, parameter, ratio)
        parameter.grad, other.grad = torch.randn(3, 2), torch.randn(2)
        optimizer.step()
        return [start, parameter.detach(), other.detach()]

    start, plain, other = run(None)
    _, scaled, same = run(torch.tensor([1.0, 0.5, 0.0]))
    assert torch.equal(other, same) and torch.equal(scaled[0], plain[0]) and torch.equal(scaled[2], start[2])
    torch.testing.assert_close(scaled[1] - start[1], 0.5 * (plain[1] - start[1]))
    assert (plain != start).all()


def test_film_columns_learn_at_their_share(tmp_path: Path) -> None:
    def change(ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
        policy = train_policy()
        with torch.no_grad():  # so that every column has a gradient at the first step
            for name, parameter in policy.named_parameters():
                if ".fssa.b." in name:
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        before = policy.modulator.weight.detach().clone()
        trainer = make_trainer(
            policy, tmp_path, max_steps=1, film_learning_rate_ratio=ratio, lr_scheduler_type="constant"
        )
        trainer.train()
        moved = (policy.modulator.weight.detach() - before).abs()
        film = policy.layout.adapter_columns() == 0
        return moved[film], moved[~film]

    (full_film, full_lora), (small_film, small_lora) = change(1.0), change(0.1)
    assert full_film.max() > 1e-3
    torch.testing.assert_close(small_lora, full_lora)
    torch.testing.assert_close(small_film, 0.1 * full_film, rtol=1e-2, atol=1e-6)


def test_the_optimizer_is_scaled_once(tmp_path: Path) -> None:
    trainer = make_trainer(train_policy(), tmp_path, film_learning_rate_ratio=0.1)
    first = trainer.create_optimizer()
    assert trainer.create_optimizer() is first
    assert len(first._optimizer_step_post_hooks) == 2  # the modulator's weight and its bias


class Gradients(TrainerCallback):
    """Keeps the gradients of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize(
    "checkpointed",
    [
        {},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"keep_products": True}},
    ],
)
def test_accumulated_gradients_are_those_of_the_whole_batch(checkpointed: dict[str, Any], tmp_path: Path) -> None:
    def gradients(batch: int, accumulated: int, **options: Any) -> dict[str, torch.Tensor]:
        policy, seen = train_policy(), Gradients()
        policy.encoder.dropout = 0.0
        data = make_data(targets=1)  # as many pairs in every example
        trainer = make_trainer(
            policy,
            tmp_path,
            data,
            [seen],
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            max_steps=1,
            max_grad_norm=0.0,
            **options,
        )
        trainer.train()
        return seen.steps[0]

    whole = gradients(2, 1)
    parts = gradients(1, 2, **checkpointed)
    assert set(whole) == set(parts) and any(g.abs().max() > 1e-4 for g in whole.values())
    for name, wanted in whole.items():
        torch.testing.assert_close(parts[name], wanted, rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------- whole runs


def base_state(policy: SteerablePolicy) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in policy.model.state_dict().items() if ".fssa." not in name}


def test_training_separates_two_users_and_leaves_the_base_alone(tmp_path: Path) -> None:
    policy = train_policy()
    before = base_state(policy)
    trainer = make_trainer(policy, tmp_path, max_steps=40, likelihood_weight=0.2, save_strategy="steps", save_steps=40)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]

    def mean(name: str, steps: slice) -> float:
        values = [entry[name] for entry in logged[steps]]
        return sum(values) / len(values)

    first, last = slice(5), slice(-5, None)
    assert len(logged) == 40 and mean("loss", last) < 0.7 * mean("loss", first)
    # Not 1: some contexts are empty, and then nobody can tell.
    assert mean("accuracy", last) > 0.8 and mean("margin", last) > 0.5 and mean("likelihood", last) > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_state(policy).items())

    checkpoint = tmp_path / "checkpoint-40"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"steering.json", "optimizer.pt", "trainer_state.json"} <= names
    assert not {name for name in names if name.startswith(("model", "pytorch_model"))}
    (weights,) = checkpoint.glob("steering-*.safetensors")
    assert weights.stat().st_size < 100_000
    loaded = SteerablePolicy.from_pretrained(checkpoint, make_model(), tokenizer=make_tokenizer())
    theirs = dict(loaded.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in policy.named_parameters())

    for name, sign in (("low", 1), ("high", -1)):
        loaded.users.add(name, [Choice(*p.pair) for p in make_preferences(sign)[:6:2]])
    held = [encode_answer(loaded.tokenizer, "w22 w31", answer, True, 64) for answer in ("w8 w7 w8", "w52 w60 w61")]
    batch = {
        "input_ids": torch.tensor([row.ids for row in held]),
        "attention_mask": torch.ones(2, 6, dtype=torch.long),
        "response_start": torch.tensor([2, 2]),
        "response_end": torch.tensor([6, 6]),
    }
    preference = {}
    with torch.no_grad():
        for name in ("low", "high"):
            with loaded.steer([name, name]) as slots:
                low, high = policy_log_probs(loaded, batch, None, slots).tolist()
            preference[name] = low - high
    assert preference["low"] > 1 > -1 > preference["high"]


class Stop(TrainerCallback):
    """Ends a run as a killed one ends: at once, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine"}
    whole = train_policy()
    make_trainer(whole, tmp_path / "whole", **options).train()

    killed = make_trainer(train_policy(), tmp_path / "killed", callbacks=[Stop(5)], **options)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert sorted(p.name for p in (tmp_path / "killed").glob("checkpoint-*")) == ["checkpoint-3"]
    resumed = train_policy()
    torch.manual_seed(77)  # another process, whose random state is its own
    trainer = make_trainer(resumed, tmp_path / "killed", **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8
    theirs, fresh = dict(whole.named_parameters()), dict(train_policy().named_parameters())
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
    assert any(not torch.equal(p, fresh[name]) for name, p in resumed.named_parameters())


def test_sampled_latents_train(tmp_path: Path) -> None:
    model = make_model()
    config = SteeringConfig(EncoderConfig(WIDTH, LATENT, heads=2, sampled=True), False, make_loras(model, "scale"))
    policy = SteerablePolicy(model, config, tokenizer=make_tokenizer(), modulation_std=0.1)
    before = copy.deepcopy(policy.encoder.state_dict())
    make_trainer(policy, tmp_path, max_steps=3).train()
    assert all(torch.isfinite(p).all() for p in policy.parameters())
    assert any(not torch.equal(t, before[name]) for name, t in policy.encoder.state_dict().items())


def test_users_follow_the_training_after_refresh(tmp_path: Path) -> None:
    policy = train_policy()
    policy.users.add("a", make_choices(1))
    make_trainer(policy, tmp_path, max_steps=3).train()
    policy.users.refresh()
    fresh = policy.users.add("b", make_choices(1))
    assert torch.equal(policy.bank.rows[policy.users.slot("a")], policy.bank.rows[fresh.slot])


def test_a_policy_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^policy: .*tokenizer"):
        make_trainer(make_policy(), tmp_path)
