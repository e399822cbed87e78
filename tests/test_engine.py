"""The engine: every request gets the tokens that it gets alone, whoever else comes, leaves, changes or fails."""

from __future__ import annotations

import gc
import os
import random
import threading
import time

import pytest
import torch
from tiny import EOS, VOCABULARY, make_choices, make_ids, make_model, make_policy, make_tokenizer

from fssa_fast import BASE, PRIOR, BankFull, SteerablePolicy, UnknownUser
from fssa_fast._native import load_native
from fssa_fast.generation import Engine, EngineClosed, QueueFull
from fssa_fast.generation.blocks import BlockPool, prefix_keys

NAMES = ("a", "b", "c")
native = pytest.mark.skipif(load_native()[0] is None, reason="bit-identical by the native steps only: not built")


def make(dtype: torch.dtype = torch.float32, capacity: int = 24) -> SteerablePolicy:
    model = make_model(max_position_embeddings=256, dtype=dtype)
    model.generation_config.eos_token_id = EOS
    policy = make_policy(model, capacity=capacity, tokenizer=make_tokenizer())
    for seed, name in enumerate(NAMES):
        policy.users.add(name, make_choices(seed))
    return policy


def open_engine(policy: SteerablePolicy, **options) -> Engine:
    return policy.engine(**{"max_rows": 4, "max_tokens": 512, "step_tokens": 16, "background": False, **options})


def prompt(seed: int, length: int = 9) -> list[int]:
    return make_ids(1, length, seed)[0].tolist()


def alone(policy: SteerablePolicy, **request) -> list[int]:
    return open_engine(policy, max_rows=1, max_tokens=256, step_tokens=64).run([request])[0].tokens


def no_memory(*args):
    raise MemoryError("no memory")


def test_greedy_is_what_transformers_generates():
    policy, rows = make(), [prompt(seed) for seed in range(4)]
    users = [BASE, PRIOR, "a", "b"]
    ids = torch.tensor(rows)
    expected = policy.generate(ids, users, max_new_tokens=12, do_sample=False, pad_token_id=0)[:, ids.shape[1] :]
    with open_engine(policy) as engine:
        results = engine.run(
            [{"prompt": row, "user": user, "max_new_tokens": 12} for row, user in zip(rows, users, strict=True)]
        )
    for result, row in zip(results, expected.tolist(), strict=True):
        end = row.index(EOS) + 1 if EOS in row else len(row)
        assert result.tokens == row[:end]
        assert result.reason == ("end" if EOS in row else "length")
        assert result.text == policy.tokenizer.decode(row[:end], skip_special_tokens=True)


@native
@pytest.mark.parametrize("seed", range(int(os.environ.get("FSSA_INTERLEAVINGS", "12"))))
def test_random_interleavings(seed):
    """Join, leave, cancel, update, remove, blends, prefixes in common, little memory, failing steps: as if alone.

    FSSA_INTERLEAVINGS says how many; 10,000 take about half an hour.
    """
    draw, policy = random.Random(seed), make()
    frozen = make()  # the users as they were before anything changed; versions are added under their own names
    engine = open_engine(policy, max_rows=draw.randint(1, 5), max_tokens=draw.choice((128, 192, 512)), max_length=120)
    version = dict.fromkeys(NAMES, 0)
    name_of = {name: name for name in NAMES}
    shared, requests = [prompt(100 + i, 70) for i in range(2)], []
    for _ in range(60):
        act = draw.random()
        if act < 0.35:
            name = draw.choice([*name_of, BASE, PRIOR])
            blend = draw.random() < 0.2
            own = prompt(draw.randrange(1000), draw.randint(1, 20))
            request = {
                "prompt": draw.choice(shared)[: draw.randint(1, 70)] + own if draw.random() < 0.6 else own,
                "user": {name: 0.5, PRIOR: 0.7} if blend else name,
                "strength": draw.choice((1.0, 1.0, 0.5)),
                "max_new_tokens": draw.randint(1, 24),
                "temperature": draw.choice((0.0, 0.0, 0.8)),
                "seed": draw.randrange(100),
                "top_p": draw.choice((1.0, 0.9)),
            }
            then = name_of.get(name, name)
            try:
                handle = engine.submit(**request)
            except BankFull:
                continue
            requests.append((handle, {**request, "user": {then: 0.5, PRIOR: 0.7} if blend else then}))
        elif act < 0.45 and name_of:
            name = draw.choice(list(name_of))
            version[name] += 1
            choices, kept = make_choices(1000 + 10 * version[name] + NAMES.index(name)), f"{name}{version[name]}"
            try:
                policy.users.update(name, choices)
            except BankFull:
                continue
            frozen.users.add(kept, choices)
            name_of[name] = kept
        elif act < 0.5 and len(name_of) > 1:
            name = draw.choice(list(name_of))
            policy.users.remove(name)
            del name_of[name]
        elif act < 0.55 and requests:
            draw.choice(requests)[0].cancel()
        elif act < 0.58:
            engine._fused.forward = no_memory
            engine.step()
            del engine._fused.forward
        else:
            engine.step()
    while engine.step():
        pass
    assert len(requests) > 3  # something was compared
    for handle, request in requests:
        if isinstance(handle._error, MemoryError):
            continue
        result, expected = handle.result(0), alone(frozen, **request)
        if result.reason == "cancelled":
            assert result.tokens == expected[: len(result.tokens)]
        else:
            assert result.tokens == expected
    assert engine._running.pool.available == engine._cache.blocks - 1 and not len(engine._running)
    assert not policy.bank._pins and len(policy.bank._free) == policy.bank.capacity - len(policy.users)


@native
def test_little_memory_puts_requests_back_and_changes_nothing():
    policy = make()
    requests = [{"prompt": prompt(i, 20), "user": NAMES[i % 3], "max_new_tokens": 60, "seed": i} for i in range(6)]
    engine = open_engine(policy, max_tokens=160, max_length=96)
    engine._ends.clear()
    results = engine.run(requests)
    assert engine.preempted > 0
    roomy = open_engine(policy, max_tokens=2048)
    roomy._ends.clear()
    assert [r.tokens for r in results] == [r.tokens for r in roomy.run(requests)]
    assert all(len(r.tokens) == 60 for r in results)


@native
def test_prefixes_are_found_again_for_the_same_row_only():
    policy, tokens = make(), prompt(5, 80)
    engine = open_engine(policy)

    def computed(user, **options) -> int:
        before = engine._fused.forward
        counted = []

        def forward(ids, *args):
            counted.append(len(ids))
            return before(ids, *args)

        engine._fused.forward = forward
        try:
            result = engine.run([{"prompt": tokens, "user": user, "max_new_tokens": 1, **options}])[0]
        finally:
            del engine._fused.forward
        assert result.tokens == alone(policy, prompt=tokens, user=user, max_new_tokens=1, **options)
        return sum(counted)

    assert computed("a") == 80
    assert computed("a") == 80 - 64
    assert computed("b") == 80
    assert computed("a", strength=0.5) == 80
    assert computed({"a": 1.0}) == 16  # the same row by another spelling
    policy.users.update("a", make_choices(77))
    assert computed("a") == 80
    policy.users.remove("a")
    policy.users.add("a", make_choices(0))  # the name and the row that were first
    assert computed("a") == 16
    assert computed(BASE) == 80


def test_sampling_by_seed():
    policy = make()
    request = {"prompt": prompt(1), "user": "a", "temperature": 1.0, "max_new_tokens": 20}
    results = open_engine(policy).run([{**request, "seed": seed} for seed in (1, 1, 2)])
    assert results[0].tokens == results[1].tokens != results[2].tokens
    greedy = alone(policy, prompt=prompt(1), user="a", max_new_tokens=20)
    assert alone(policy, **{**request, "top_k": 1}) == greedy
    assert alone(policy, **{**request, "top_p": 1e-6}) == greedy


def test_stop_strings_and_streams():
    policy = make()
    policy.model.generation_config.eos_token_id = None
    request = {"prompt": "w7 w8 w9", "user": "a", "max_new_tokens": 16}
    engine = open_engine(policy)
    full = engine.run([request])[0]
    assert full.reason == "length" and len(full.tokens) == 16
    words = full.text.split()
    stop = " ".join(words[5:7])
    handle = engine.submit(**request, stop=[stop, "never"])
    pieces = list(handle.text())
    result = handle.result()
    at = full.text.index(stop)
    assert result.reason == "stop" and result.text == full.text[:at] == "".join(pieces)
    assert len(pieces) > 1
    assert list(engine.submit(**request)) == full.tokens
    assert engine.run([{**request, "prompt": [{"role": "user", "content": "w7"}]}])[0].tokens


def test_users_and_ends():
    policy = make()
    engine = open_engine(policy)
    handle = engine.submit(prompt(1), "a", max_new_tokens=100, timeout=0.0)
    other = engine.submit(prompt(1), "a", max_new_tokens=5)
    assert handle.result().reason == "deadline" and other.result().tokens
    handle = engine.submit(prompt(1), "b", max_new_tokens=100)
    engine.step()
    handle.cancel()
    handle.cancel()
    engine.step()
    assert handle.done and handle.result().reason == "cancelled" and len(handle.result().tokens) <= 1
    with pytest.raises(TimeoutError):
        engine.submit(prompt(1), "b", max_new_tokens=200).result(timeout=0)
    engine.close()
    with pytest.raises(EngineClosed):
        engine.submit(prompt(1), "b")


@pytest.mark.parametrize(
    "request_, error, message",
    [
        ({"prompt": []}, ValueError, "empty prompt"),
        ({"prompt": ""}, ValueError, "empty prompt"),
        ({"prompt": [VOCABULARY]}, ValueError, r"token ids in \[0, 64\)"),
        ({"prompt": [5] * 250}, ValueError, "at most 256 tokens with the answer, got 250"),
        ({"user": "nobody"}, UnknownUser, "nobody"),
        ({"user": {"a": 1.0, "nobody": 1.0}}, UnknownUser, "nobody"),
        ({"user": {}}, ValueError, "at least one name"),
        ({"user": {"a": float("nan")}}, ValueError, "finite"),
        ({"strength": float("inf")}, ValueError, "finite"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"top_k": -1}, ValueError, "top_k"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"stop": "text"}, ValueError, "stop"),
        ({"stop": [""]}, ValueError, "stop"),
        ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens: expected an integer"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 0.5}, ValueError, "seed"),
        ({"top_k": 1.5}, ValueError, "top_k"),
        ({"temperature": "hot"}, ValueError, "temperature"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"timeout": float("nan")}, ValueError, "timeout"),
        ({"timeout": "soon"}, ValueError, "timeout"),
        ({"strength": "much"}, ValueError, "strength"),
        ({"user": {"a": 3e38, PRIOR: 3e38}}, ValueError, "finite"),
        ({"prompt": 7}, TypeError, "prompt"),
        ({"prompt": [5, 6.5]}, TypeError, "prompt"),
    ],
)
def test_bad_requests_leave_nothing_behind(request_, error, message):
    policy = make()
    engine = open_engine(policy)
    with pytest.raises(error, match=message):
        engine.submit(**{"prompt": [5, 6], "user": "a", **request_})
    assert not policy.bank._pins and not engine.step()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_rows": 0}, "max_rows"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"step_tokens": 3}, "step_tokens: expected at least max_rows, 4, got 3"),
        ({"max_length": 0}, "max_length: expected 1 to 256"),
        ({"max_length": 257}, "max_length: expected 1 to 256"),
        ({"max_tokens": 64, "max_length": 65}, "max_length: expected 1 to 64"),
    ],
)
def test_bad_engines(options, message):
    with pytest.raises(ValueError, match=message):
        open_engine(make(), **options)


def test_a_conversation_goes_on_from_what_was_computed():
    policy = make()
    engine = open_engine(policy)
    engine._ends.clear()
    first = prompt(3, 40)
    answer = engine.run([{"prompt": first, "user": "a", "max_new_tokens": 60}])[0].tokens
    then = [*first, *answer, *prompt(4, 5)]
    handle = engine.submit(then, "a", max_new_tokens=2)
    engine._admit()
    assert next(iter(engine._running)).computed == 96  # whole blocks of prompt and answer
    fresh = alone(policy, prompt=then, user="a", max_new_tokens=2)
    assert handle.result().tokens == fresh[: len(handle.result().tokens)]


def test_one_request_that_cannot_go_on_fails_alone():
    policy = make()
    engine = open_engine(policy)
    bad = engine.submit(prompt(1), "a", max_new_tokens=6, temperature=1.0)
    good = engine.submit(prompt(1), "a", max_new_tokens=6)
    engine._open[bad].seed = "none"
    with pytest.raises(TypeError):
        bad.result()
    assert good.result().tokens == alone(policy, prompt=prompt(1), user="a", max_new_tokens=6)


def test_a_thread_that_dies_leaves_nobody_waiting():
    engine = open_engine(make(), background=True)
    engine._drop = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        engine.submit(prompt(1), "a").result(60)
    with pytest.raises(EngineClosed):
        engine.submit(prompt(1), "a")


def test_full_queue_and_run_beyond_it():
    engine = open_engine(make(), max_waiting=2)
    for _ in range(2):
        engine.submit(prompt(1), "a", max_new_tokens=3)
    with pytest.raises(QueueFull, match="at most 2 waiting"):
        engine.submit(prompt(1), "a")
    assert len(engine.run([{"prompt": prompt(i), "user": "b", "max_new_tokens": 3} for i in range(9)])) == 9


def test_one_bad_user_fails_alone():
    policy = make()
    policy.bank.rows[policy.users.slot("b")] = float("nan")
    engine = open_engine(policy)
    good, bad = engine.submit(prompt(1), "a", max_new_tokens=6), engine.submit(prompt(1), "b", max_new_tokens=6)
    with pytest.raises(FloatingPointError, match="finite logits"):
        bad.result()
    assert good.result().tokens == alone(policy, prompt=prompt(1), user="a", max_new_tokens=6)
    assert alone(policy, prompt=prompt(2, 90), user="c", max_new_tokens=6)


def test_a_step_that_fails_ends_its_requests_and_no_other():
    policy = make()
    engine = open_engine(policy, max_rows=1)
    first, second = (engine.submit(prompt(i), "a", max_new_tokens=6) for i in range(2))
    engine._fused.forward = no_memory
    engine.step()
    del engine._fused.forward
    with pytest.raises(MemoryError):
        first.result()
    assert second.result().tokens == alone(policy, prompt=prompt(1), user="a", max_new_tokens=6)


def test_many_threads_submit():
    policy, found = make(), {}
    with open_engine(policy, background=True) as engine:

        def work(number: int) -> None:
            request = {"prompt": prompt(number), "user": NAMES[number % 3], "max_new_tokens": 8}
            found[number] = (request, engine.submit(**request).result(60).tokens)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for request, tokens in found.values():
        assert tokens == alone(policy, **request)
    assert len(found) == 12


def test_close_ends_what_runs():
    engine = open_engine(make(), background=True)
    engine._ends.clear()
    handle = engine.submit(prompt(1), "a", max_new_tokens=240)
    next(iter(handle))
    engine.close()
    assert handle.result(10).reason in ("cancelled", "length")


def test_blocks_are_shared_and_kept():
    pool, keys = BlockPool(4), prefix_keys(b"user", list(range(70)), 32)
    assert len(keys) == 2 and keys != prefix_keys(b"other", list(range(70)), 32)
    first = [pool.take(), pool.take()]
    for block, key in zip(first, keys, strict=True):
        pool.learn(block, key)
    assert pool.find(keys) == first and pool.available == 1
    pool.give_back(first)
    assert pool.available == 1
    pool.give_back(first)
    assert pool.available == 3
    assert {pool.take() for _ in range(3)} == {1, 2, 3}
    assert pool.find(keys) == []


def test_nothing_of_the_engine_is_left():
    policy = make()
    engine = open_engine(policy)
    engine.run([{"prompt": prompt(1), "user": "a", "max_new_tokens": 3}])
    began = time.monotonic()
    engine.close()
    del engine
    gc.collect()
    policy.unfuse()
    assert policy.fused is None and time.monotonic() - began < 30


@native
def test_two_engines_of_one_policy_do_not_write_each_others_buffers():
    """Both have the same fused form, and each a thread of its own."""
    policy = make()
    requests = [{"prompt": prompt(i, 5 + i), "user": NAMES[i % 3], "max_new_tokens": 24} for i in range(12)]
    wanted = [alone(policy, **request) for request in requests]
    with open_engine(policy, background=True) as one, open_engine(policy, background=True) as other:
        handles = [(engine.submit(**request), tokens) for request, tokens in zip(requests, wanted, strict=True)
                   for engine in (one, other)]  # fmt: skip
        assert all(handle.result(60).tokens == tokens for handle, tokens in handles)
