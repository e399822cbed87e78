"""What one request, its user, its process or the device does wrong, and who else notices: nobody who need not."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_engine import alone, make, open_engine, prompt
from tiny import make_model, make_policy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fssa_fast import PRIOR
from fssa_fast.generation import EngineClosed, Grammar, QueueFull
from fssa_fast.generation.text import TextStream, decoded


def test_a_tokenizer_that_raises_ends_only_its_request(monkeypatch):
    """While a cancelled request is dropped, and in close."""
    policy = make()
    engine = open_engine(policy)
    engine._ends.clear()
    dropped, good, left = (engine.submit(prompt(i), "a", max_new_tokens=6) for i in range(3))
    late = engine.submit(prompt(5), "b", max_new_tokens=200)
    engine.step()
    whole = policy.tokenizer.decode

    def decode(tokens, **options):
        if tokens == engine_tokens:
            raise OSError("no tokenizer")
        return whole(tokens, **options)

    engine_tokens = engine._open[dropped].answer
    monkeypatch.setattr(policy.tokenizer, "decode", decode)
    dropped.cancel()
    engine.step()
    with pytest.raises(OSError):
        dropped.result(0)
    assert len(good.result().tokens) == len(left.result().tokens) == 6
    monkeypatch.setattr(policy.tokenizer, "decode", lambda *args, **options: 1 / 0)
    engine.close()
    with pytest.raises(ZeroDivisionError):
        late.result(0)
    assert not policy.bank._pins


def test_a_cache_that_raises_ends_only_its_request(monkeypatch):
    policy = make()
    engine = open_engine(policy)
    bad, good = engine.submit(prompt(1), "a", max_new_tokens=6), engine.submit(prompt(2), "b", max_new_tokens=6)
    assign = engine._cache.assign
    monkeypatch.setattr(engine._cache, "assign", lambda at, blocks: 1 / 0 if at == 0 else assign(at, blocks))
    assert good.result().tokens == alone(policy, prompt=prompt(2), user="b", max_new_tokens=6)
    with pytest.raises(ZeroDivisionError):
        bad.result(0)
    assert not policy.bank._pins and engine._running.pool.available == engine._cache.blocks - 1


def test_a_device_that_is_lost_closes_the_engine_for_all(monkeypatch):
    policy = make()
    engine = open_engine(policy, max_rows=1, background=True)

    def lost(*args):
        raise torch.AcceleratorError("the device is lost")

    monkeypatch.setattr(engine._fused, "forward", lost)
    handle = engine.submit(prompt(1), "a")
    with pytest.raises(torch.AcceleratorError):
        handle.result(60)
    with pytest.raises(EngineClosed, match="lost"):
        engine.submit(prompt(1), "a")
    engine.close()
    assert not policy.bank._pins


def test_users_take_turns():
    """A quiet user's request comes next, however many of another's wait; and a user may not fill the queue."""
    engine = open_engine(make(), max_rows=1, max_waiting_per_user=5)
    flood = [engine.submit(prompt(i), "a", max_new_tokens=2) for i in range(5)]
    with pytest.raises(QueueFull, match="user: expected at most 5 waiting requests of a"):
        engine.submit(prompt(9), "a")
    engine.step()
    quiet = engine.submit(prompt(7), "b", max_new_tokens=2)
    quiet.result()
    assert sum(handle.done for handle in flood) <= 2


EXIT = """
import sys
sys.path.insert(0, "tests")
from test_engine import make, open_engine, prompt
engine = open_engine(make(), background=True)
engine._ends.clear()
next(iter(engine.submit(prompt(1), "a", max_new_tokens=200)))
"""


def test_an_engine_left_open_ends_with_the_interpreter():
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", EXIT], cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=120
        )
        assert run.returncode == 0 and not run.stderr, run.stderr


def test_a_forked_process_is_refused_at_once():
    engine = open_engine(make())
    handle = engine.submit(prompt(1), "a", max_new_tokens=2)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # instead of hanging
        refused = 0
        for use in (lambda: engine.submit(prompt(1), "a"), engine.step, lambda: engine.run([]), engine.close,
                    handle.result, handle.cancel, lambda: next(iter(handle)), lambda: handle.done):  # fmt: skip
            try:
                use()
            except EngineClosed:
                refused += 1
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 8
    assert handle.result().tokens


@pytest.mark.parametrize(
    "request_, error",
    [
        ({"prompt": b"text"}, TypeError),
        ({"prompt": "\ud800"}, ValueError),
        ({"prompt": [{"role": "user"}]}, TypeError),
        ({"prompt": [{"role": "user", "content": ["w7"]}]}, TypeError),
        ({"stop": (text for text in ["a"])}, ValueError),
        ({"stop": ["a"] * 17}, ValueError),
        ({"stop": ["a" * 257]}, ValueError),
        ({"temperature": 1e-40}, ValueError),
    ],
)
def test_nothing_is_accepted_silently(request_, error):
    with pytest.raises(error, match="expected"):
        open_engine(make()).submit(**{"prompt": [5, 6], "user": "a", **request_})


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(["hello there"] * 5, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentence_piece() -> PreTrainedTokenizerFast:
    vocabulary = [("<unk>", 0.0), *((f"<0x{i:02X}>", -20.0) for i in range(256)), ("▁", -2.0)]
    vocabulary += [(piece, -3.0) for piece in ("▁hello", "▁there", "lo", "a", "e", ".")]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("make_tokenizer", [byte_level, sentence_piece])
def test_pieces_of_text_join_to_the_text(make_tokenizer):
    """Of words, of characters of several bytes, and of tokens at random, most of them no text at all."""
    tokenizer = make_tokenizer()
    draw = torch.Generator().manual_seed(1)
    texts = [tokenizer("hello there é 🙂🙂 漢字 hello.")["input_ids"]]
    texts += [torch.randint(len(tokenizer), (120,), generator=draw).tolist() for _ in range(40)]
    for ids in texts:
        stream = TextStream(tokenizer)
        joined, whole = "".join(stream.add(token) for token in ids), decoded(tokenizer, ids)
        assert whole.startswith(joined) and len(stream._tokens) <= 120
    assert len(stream._tokens) < 120


def test_an_answer_has_the_form_of_its_grammar():
    pytest.importorskip("llguidance")
    model = make_model(max_position_embeddings=256, vocab_size=320)
    policy = make_policy(model, capacity=4, tokenizer=byte_level())
    engine = open_engine(policy)
    asked = {"temperature": 1.0, "max_new_tokens": 40, "seed": 1}
    free, three = (
        engine.submit("hello", PRIOR, **asked),
        engine.submit("hello", PRIOR, grammar=Grammar.regex("[a-c]{3}")),
    )
    schema = Grammar.json_schema({"enum": [{"there": 1}, "hello"]})
    formed = engine.submit("hello", PRIOR, grammar=schema, **asked).result()
    assert formed.reason == "end" and json.loads(formed.text) in ({"there": 1}, "hello")
    assert re.fullmatch("[a-c]{3}", three.result().text)
    assert free.result().tokens == alone(policy, prompt="hello", user=PRIOR, **asked)
    with pytest.raises(ValueError, match="grammar"):
        engine.submit("hello", PRIOR, grammar=Grammar.regex("("))


def test_several_answers_share_the_blocks_of_their_prompt():
    policy = make()
    engine = open_engine(policy)
    asked = {"temperature": 1.0, "max_new_tokens": 4}
    results = [h.result() for h in engine.submit_many(prompt(1, 70), "a", 3, seed=5, logprobs=1, **asked)]
    assert [result.cached_tokens for result in results] == [0, 64, 64]
    assert all(len(result.logprobs) == len(result.tokens) and result.prompt_tokens == 70 for result in results)
    assert results[1].tokens == alone(policy, prompt=prompt(1, 70), user="a", seed=6, **asked)
