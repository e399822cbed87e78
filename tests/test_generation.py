"""Generation: one user a row, whatever `generate` is asked to do, in one thread or several."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, EOS, PAD, make_choices, make_ids, make_model, make_policy, make_tokenizer

from fssa_fast import BASE, PRIOR, BackendError, SteerablePolicy, UnknownUser, use_backend
from fssa_fast.generation.generate import tokenize

MIXED = ["alice", BASE, PRIOR, "bob"]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
CHAT = [{"role": "user", "content": "w7 w8"}]


def served(name: str = "llama", **options: Any) -> SteerablePolicy:
    policy = make_policy(make_model(name), tokenizer=make_tokenizer(), **options)
    policy.users.add_many({"alice": make_choices(1), "bob": make_choices(2)})
    return policy


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_rows_are_those_of_each_user_alone(name: str) -> None:
    policy, ids = served(name), make_ids(1).expand(4, -1)
    together = policy.generate(ids, MIXED, **GREEDY)
    assert together.shape == (4, 15) and len({tuple(row) for row in together.tolist()}) > 1
    alone = [policy.generate(ids[:1], [user], **GREEDY) for user in MIXED]
    assert torch.equal(together, torch.cat(alone))
    with torch.random.fork_rng():
        base = make_model(name).generate(ids[:1], **GREEDY)
    assert torch.equal(together[1:2], base)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2"])
def test_padding_on_the_left_changes_nothing(name: str) -> None:
    policy = served(name)
    long, short = make_ids(1, 9), make_ids(1, 4, seed=3)
    ids = torch.cat([long, torch.cat([torch.full((1, 5), PAD), short], 1)])
    mask = (ids != PAD).long()
    together = policy.generate(ids, ["bob", "alice"], attention_mask=mask, **GREEDY)
    assert torch.equal(together[0], policy.generate(long, ["bob"], **GREEDY)[0])
    assert torch.equal(together[1, 5:], policy.generate(short, ["alice"], **GREEDY)[0])


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_the_static_cache_gives_the_same(name: str) -> None:
    policy, ids = served(name), make_ids(4)
    dynamic = policy.generate(ids, MIXED, **GREEDY)
    assert torch.equal(policy.generate(ids, MIXED, cache_implementation="static", **GREEDY), dynamic)
    assert torch.equal(policy.generate(ids, MIXED, use_cache=False, **GREEDY), dynamic)


def test_beams_are_those_of_each_row_alone() -> None:
    policy, ids = served(), make_ids(4)
    options = {**GREEDY, "num_beams": 3}
    together = policy.generate(ids, MIXED, **options)
    alone = [policy.generate(ids[i : i + 1], [user], **options) for i, user in enumerate(MIXED)]
    assert torch.equal(together, torch.cat(alone))
    both = policy.generate(ids, MIXED, **options, num_return_sequences=2)
    assert torch.equal(both[::2], together)
    assert not torch.equal(together, policy.generate(ids, [BASE] * 4, **options))


def test_several_sequences_a_prompt_are_all_of_its_user() -> None:
    policy, ids = served(), make_ids(1).expand(2, -1)
    options = {"max_new_tokens": 6, "do_sample": True, "eos_token_id": None, "top_k": 1}  # as good as greedy
    found = policy.generate(ids, ["alice", BASE], num_return_sequences=3, **options)
    assert torch.equal(found[:3], policy.generate(ids[:1], ["alice"], **GREEDY)[:, :13].expand(3, -1))
    assert torch.equal(found[3:], policy.generate(ids[:1], [BASE], **GREEDY)[:, :13].expand(3, -1))


def test_repeats_set_in_a_generation_config_count() -> None:
    policy, ids = served(), make_ids(2)
    config = policy.model.generation_config
    config.num_beams, config.num_return_sequences = 3, 2
    found = policy.generate(ids, ["alice", BASE], **GREEDY)
    config.num_beams = config.num_return_sequences = 1
    assert torch.equal(found, policy.generate(ids, ["alice", BASE], num_beams=3, num_return_sequences=2, **GREEDY))


def test_sampling_with_a_seed() -> None:
    policy, ids = served(), make_ids(4)
    options = {"max_new_tokens": 8, "do_sample": True, "eos_token_id": None}

    def sample(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return policy.generate(ids, MIXED, **options)

    first = sample(0)
    assert torch.equal(sample(0), first) and not torch.equal(sample(1), first)
    torch.manual_seed(0)
    plain = make_model().generate(ids, **options)
    assert torch.equal(first[1], plain[1]) and not torch.equal(first[0], plain[0])


def test_what_generate_returns_for_ids_is_the_models() -> None:
    policy, ids = served(), make_ids(2)
    out = policy.generate(ids, ["alice", BASE], return_dict_in_generate=True, output_scores=True, **GREEDY)
    assert out.sequences.shape == (2, 15) and len(out.scores) == 8


# ---------------------------------------------------------------- texts and chats


def test_texts_and_chats_in_one_batch() -> None:
    policy = served()
    prompts = ["w7 w8 w9 w10 w11", CHAT, "w12"]
    batch = tokenize(policy, prompts)
    assert batch["input_ids"].tolist() == [[7, 8, 9, 10, 11], [PAD, 4, 7, 8, 5], [PAD, PAD, PAD, PAD, 12]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [0] + [1] * 4, [0] * 4 + [1]]
    users = ["alice", "bob", BASE]
    answers = policy.generate(prompts, users, **GREEDY)
    for prompt, user, answer in zip(prompts, users, answers, strict=True):
        ids = tokenize(policy, [prompt])["input_ids"]
        wanted = policy.generate(ids, [user], **GREEDY)[:, ids.shape[1] :]
        assert answer == policy.tokenizer.decode(wanted[0], skip_special_tokens=True) and answer
    several = policy.generate(prompts, users, **{**GREEDY, "num_beams": 2, "num_return_sequences": 2})
    assert [len(texts) for texts in several] == [2, 2, 2]
    out = policy.generate(prompts, users, **GREEDY, return_dict_in_generate=True)
    assert out == answers


def test_answers_end_at_the_end_token() -> None:
    policy = served()
    policy.model.get_output_embeddings().weight.data[EOS] *= 20  # likely, for some rows
    ids = tokenize(policy, ["w7 w8"] * 3)["input_ids"]
    users = ["alice", PRIOR, BASE]
    found = policy.generate(ids, users, max_new_tokens=20, do_sample=False, pad_token_id=PAD)
    for row, text in zip(found[:, 2:].tolist(), policy.generate(["w7 w8"] * 3, users, max_new_tokens=20), strict=True):
        kept = row[: row.index(EOS)] if EOS in row else row
        assert text == policy.tokenizer.decode(kept, skip_special_tokens=True)
    assert (found == EOS).any()


def test_a_tokenizer_without_a_padding_token() -> None:
    policy = served()
    wanted = policy.generate(["w7 w8 w9", "w7"], ["alice", "bob"], **GREEDY)
    policy.tokenizer = make_tokenizer(pad_token=None)
    assert policy.tokenizer.pad_token_id is None
    assert policy.generate(["w7 w8 w9", "w7"], ["alice", "bob"], **GREEDY) == wanted


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("prompts", "users", "error", "message"),
    [
        (["w7"], ["alice", "bob"], ValueError, "users: .*1 prompts, got 2"),
        (["w7", "w8"], ["alice"], ValueError, "users: .*2 prompts, got 1"),
        ([], [], ValueError, "prompts: .*none"),
        (["w7", ""], ["alice", "bob"], ValueError, r"prompts\[1\]: .*empty"),
        (["w7"], ["nobody"], UnknownUser, "'nobody'"),
        (["w7", "w8"], "ab", TypeError, "users: .*'ab'"),
        ("w7", ["alice", "bob"], TypeError, "prompts: .*'w7'"),
        (CHAT, ["alice"], TypeError, r"prompts\[0\]: .*list of messages"),
        ([[7, 8]], ["alice"], TypeError, r"prompts\[0\]: .*\[7, 8\]"),
        ([None], ["alice"], TypeError, r"prompts\[0\]: .*None"),
        (torch.tensor([7, 8]), ["alice", "bob"], ValueError, r"prompts: .*\[2\]"),
        (torch.ones(1, 3), ["alice"], ValueError, "prompts: .*float32"),
        (torch.ones(1, 0, dtype=torch.long), ["alice"], ValueError, r"prompts: .*\[1, 0\]"),
        (make_ids(2), ["alice"], ValueError, "users: .*2 prompts, got 1"),
    ],
)
def test_bad_prompts_and_users_are_named(prompts: Any, users: Any, error: type[Exception], message: str) -> None:
    policy = served()
    policy.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(error, match=message):
        policy.generate(prompts, users, **GREEDY)
    assert not policy.bank._pins


def test_masks_are_checked() -> None:
    policy = served()
    with pytest.raises(ValueError, match=r"attention_mask: .*\[1, 7\], got \[1, 6\]"):
        policy.generate(make_ids(1), ["alice"], attention_mask=torch.ones(1, 6), **GREEDY)
    with pytest.raises(ValueError, match="attention_mask: expected None"):
        policy.generate(["w7"], ["alice"], attention_mask=torch.ones(1, 1), **GREEDY)


# ---------------------------------------------------------------- streams


def test_a_stream_is_the_answer_in_pieces() -> None:
    policy = served()
    for prompt, user in (("w7 w8", "alice"), (CHAT, "bob"), ("w7 w8", BASE)):
        pieces = list(policy.stream(prompt, user, **GREEDY))
        assert len(pieces) > 1 and "".join(pieces).strip() == policy.generate([prompt], [user], **GREEDY)[0]
    assert not policy.bank._pins


def test_leaving_a_stream_ends_its_thread() -> None:
    policy = served()
    before = threading.active_count()
    stream = policy.stream("w7 w8", "alice", max_new_tokens=100, do_sample=False, eos_token_id=None)
    first = next(stream)
    assert first and policy.bank.pinned(policy.users.slot("alice"))
    stream.close()
    assert threading.active_count() == before and not policy.bank._pins
    for piece in policy.stream("w7 w8", "alice", **GREEDY):
        assert piece == first
        break


@pytest.mark.parametrize(
    ("prompt", "user", "options", "error", "message"),
    [
        ("w7", "nobody", {}, UnknownUser, "'nobody'"),
        ("", "alice", {}, ValueError, "empty"),
        ("w7", "alice", {"num_beams": 2}, ValueError, "beam"),
        ("w7", "alice", {"no_such_option": 2}, ValueError, "no_such_option"),
    ],
)
def test_a_stream_raises_what_generate_raises(prompt: str, user: str, options: Any, error: Any, message: str) -> None:
    policy = served()
    before = threading.active_count()
    with pytest.raises(error, match=message):
        list(policy.stream(prompt, user, **{**GREEDY, **options}))
    assert threading.active_count() == before and not policy.bank._pins
    policy.tokenizer = None
    with pytest.raises(ValueError, match="tokenizer"):
        next(policy.stream(prompt, user))


def test_a_stream_runs_with_the_backend_chosen_outside() -> None:
    if torch.cuda.is_available():
        pytest.skip("the backend that this test cannot have is here")
    policy = served()
    with use_backend("cuda"), pytest.raises(BackendError):
        list(policy.stream("w7", "alice", **GREEDY))
    with use_backend("reference"):
        assert list(policy.stream("w7", "alice", **GREEDY))


# ---------------------------------------------------------------- threads


def in_threads(*works: Any) -> list[Any]:
    """The results of functions run at the same time, begun together."""
    results: list[Any] = [None] * len(works)
    gate = threading.Barrier(len(works))

    def run(i: int) -> None:
        gate.wait()
        try:
            results[i] = works[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_generations_at_once_do_not_see_each_others_users() -> None:
    policy, ids = served(), make_ids(3)
    groups = (["alice", BASE, "bob"], ["bob", "alice", PRIOR])
    wanted = [policy.generate(ids, users, **GREEDY) for users in groups]
    assert not torch.equal(*wanted)
    for _ in range(4):
        found = in_threads(*(lambda users=users: policy.generate(ids, users, **GREEDY) for users in groups))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_thread_without_users_is_the_base_model() -> None:
    policy, ids = served(), make_ids(2)
    with torch.no_grad():
        plain = policy.model(ids).logits
    inside, done = threading.Event(), threading.Event()

    def steered() -> torch.Tensor:
        with torch.no_grad(), policy.steer(["alice", "bob"]):
            inside.set()
            assert done.wait(60)
            return policy.model(ids).logits

    def without() -> torch.Tensor:
        assert inside.wait(60)
        try:
            with torch.no_grad():
                return policy.model(ids).logits
        finally:
            done.set()

    with_users, base = in_threads(steered, without)
    assert torch.equal(base, plain) and not torch.allclose(with_users, plain)


def test_steering_can_be_nested_and_ends_with_its_block() -> None:
    policy, ids = served(), make_ids(1)

    def now() -> torch.Tensor:
        with torch.no_grad():
            return policy.model(ids).logits

    plain = now()
    with policy.steer(["alice"]):
        outer = now()
        with policy.steer([BASE]):
            assert torch.equal(now(), plain)
        with pytest.raises(RuntimeError, match="told"), policy.steer(["bob"]):
            raise RuntimeError("told")
        assert torch.equal(now(), outer) and not torch.allclose(outer, plain)
    assert torch.equal(now(), plain)
