"""The text embedder: what is pooled, what is remembered, and that a policy gets the one it was trained with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import VOCABULARY, WIDTH, make_model, make_policy, make_tokenizer
from transformers import BertConfig, BertModel

from fssa_fast import Choice, SteerablePolicy, TextEmbedder

TEXTS = [("w7", "w8 w9"), ("", "w10"), ("w11 w12", "w13 w14 w15 w16"), ("w7", "w9 w8")]


def make_bert(seed: int = 0, **changes: Any) -> BertModel:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(**{**sizes, "vocab_size": VOCABULARY, "max_position_embeddings": 32, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertModel(config, add_pooling_layer=False)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_embedder(seed: int = 0, **options: Any) -> TextEmbedder:
    return TextEmbedder(make_bert(seed), make_tokenizer(), **options)


def count_forwards(embedder: TextEmbedder) -> list[int]:
    """The number of texts in each forward from now on."""
    seen: list[int] = []
    embedder.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return seen


@torch.no_grad()
def by_hand(embedder: TextEmbedder, prompt: str, response: str) -> torch.Tensor:
    batch = embedder.tokenizer(f"{prompt}\n{response}", return_tensors="pt")
    return embedder.model(**batch).last_hidden_state[0]


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling(pooling: Any, normalize: bool) -> None:
    embedder = make_embedder(pooling=pooling, normalize=normalize)
    found = embedder.encode(TEXTS)
    assert found.shape == (4, WIDTH) and found.dtype == torch.float32 and embedder.width == WIDTH
    for vector, text in zip(found, TEXTS, strict=True):
        hidden = by_hand(embedder, *text)
        wanted = {"mean": hidden.mean(0), "first": hidden[0], "last": hidden[-1]}[pooling]
        torch.testing.assert_close(vector, F.normalize(wanted, dim=0) if normalize else wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[3], atol=1e-3)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_padding_changes_nothing(pooling: Any) -> None:
    together = make_embedder(pooling=pooling).encode(TEXTS)
    small = make_embedder(pooling=pooling, batch=1)
    seen = count_forwards(small)
    torch.testing.assert_close(small.encode(TEXTS), together, rtol=1e-4, atol=1e-5)
    assert seen == [1, 1, 1, 1]


@pytest.mark.parametrize("pooling", ["first", "last"])
def test_the_first_and_the_last_token_whichever_side_is_padded(pooling: Any) -> None:
    # A causal model with rotary positions does not see where the padding is.
    embedder = TextEmbedder(make_model().model, make_tokenizer(padding_side="left"), pooling=pooling)
    right = TextEmbedder(make_model().model, make_tokenizer(padding_side="right"), pooling=pooling)
    torch.testing.assert_close(embedder.encode(TEXTS), right.encode(TEXTS), rtol=1e-4, atol=1e-5)


def test_what_is_known_is_not_computed_again() -> None:
    embedder = make_embedder(batch=3)
    seen = count_forwards(embedder)
    first = embedder.encode(TEXTS + TEXTS[:2])
    assert seen == [3, 1] and torch.equal(first[:2], first[4:])
    assert torch.equal(embedder.encode(TEXTS[::-1]), first[:4].flip(0)) and seen == [3, 1]
    embedder.encode([("w7", "w8"), TEXTS[0]])
    assert seen == [3, 1, 1]
    assert embedder.encode([]).shape == (0, WIDTH)


def test_the_cache_has_an_end() -> None:
    embedder = make_embedder(cache=2)
    seen = count_forwards(embedder)
    found = embedder.encode(TEXTS)
    assert len(found) == 4 and len(embedder._cache) == 2
    embedder.encode(TEXTS[2:])
    assert seen == [4]
    assert torch.allclose(embedder.encode(TEXTS[:2]), found[:2], atol=1e-5) and seen == [4, 2]


def test_templates() -> None:
    embedder = make_embedder(template="w20 {response} {{w21}} {prompt}")
    same = make_embedder(template="{response}")
    torch.testing.assert_close(embedder.encode([("w7", "w8")]), same.encode([("", "w20 w8 {w21} w7")]))


@pytest.mark.parametrize(
    "template",
    [
        "{prompt}",
        "",
        "{response} {user}",
        "{response.__class__}",
        "{response[0]}",
        "{response} {}",
        "{response} {0}",
        "{response:>1000000000}",
        "{response:{prompt}}",
        "{response!r}",
        "{response} {",
        "{response} }",
    ],
)
def test_templates_with_other_fields_are_refused(template: str) -> None:
    with pytest.raises(ValueError, match="^template: "):
        make_embedder(template=template)


def test_bad_pooling_and_empty_texts_are_named() -> None:
    with pytest.raises(ValueError, match="^pooling: .*'max'"):
        make_embedder(pooling="max")
    with pytest.raises(ValueError, match="^texts: "):
        make_embedder().encode([("w7", "w8"), ("", "")])


# ---------------------------------------------------------------- with a policy


def test_choices_as_texts() -> None:
    policy = make_policy(embedder=make_embedder())
    policy.users.add("texts", [Choice("w8", "w9", "w7"), Choice("w10", "w11 w12")])
    a, b, c, d = policy.embedder.encode([("w7", "w8"), ("w7", "w9"), ("", "w10"), ("", "w11 w12")])
    policy.users.add("vectors", [Choice(a, b), Choice(c, d)])
    policy.users.add("both", [Choice(a, b), Choice("w10", "w11 w12")])
    for name in ("vectors", "both"):
        assert torch.equal(policy.users[name].pairs, policy.users["texts"].pairs)
    policy.users.add("other prompt", [Choice("w8", "w9", "w13"), Choice("w10", "w11 w12")])
    assert not torch.allclose(policy.users["other prompt"].pairs[0], policy.users["texts"].pairs[0], atol=1e-3)


def test_an_embedder_of_another_width() -> None:
    model = make_model()
    bert = TextEmbedder(make_bert(hidden_size=16), make_tokenizer())
    with pytest.raises(ValueError, match="^embedder: expected width 8.*got 16"):
        make_policy(model, embedder=bert)
    assert all(p.requires_grad for p in model.parameters())


def test_the_embedder_of_a_saved_policy(tmp_path: Path) -> None:
    make_bert().save_pretrained(tmp_path / "bert")
    make_tokenizer().save_pretrained(tmp_path / "bert")
    source = make_embedder(pooling="last", template="{prompt} w20 {response}", normalize=False, max_tokens=20)
    embedder = TextEmbedder.from_config(replace(source.config, name_or_path=str(tmp_path / "bert")))
    policy = make_policy(embedder=embedder)
    policy.save_pretrained(tmp_path / "policy")
    choices = [Choice("w8", "w9", "w7")]
    wanted = policy.users.add("a", choices).pairs
    for given in (None, str(tmp_path / "bert"), source):
        loaded = SteerablePolicy.from_pretrained(tmp_path / "policy", make_model(), embedder=given)
        assert loaded.embedder is not None and replace(loaded.embedder.config, name_or_path="") == source.config
        assert torch.equal(loaded.users.add("a", choices).pairs, wanted)
    options = {"pooling": "last", "template": "{prompt} w20 {response}", "normalize": False, "max_tokens": 20}
    for change, message in (
        ({"pooling": "mean"}, "pooling 'last'.*'mean'"),
        ({"template": "{response}"}, "template"),
        ({"normalize": True}, "normalize False.*True"),
        ({"max_tokens": 21}, "max_tokens 20.*21"),
        ({"seed": 1}, "weights.*others"),
    ):
        model = make_model()
        with pytest.raises(ValueError, match=f"^embedder: expected .*{message}"):
            SteerablePolicy.from_pretrained(
                tmp_path / "policy",
                model,
                embedder=make_embedder(**{**options, **change}),  # type: ignore[arg-type]
            )
        assert all(p.requires_grad for p in model.parameters())
    make_bert(seed=1).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="^embedder: .*others"):
        SteerablePolicy.from_pretrained(tmp_path / "policy", make_model(), embedder=str(tmp_path / "other"))
