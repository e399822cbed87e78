"""Choices as arrays: users and groups that never meet, examples drawn alike again, files and the errors they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fssa_fast.data.choices import ChoiceData, ChoiceExamples, Example, held_out_examples, pack_examples, split_users
from fssa_fast.data.files import choice_data, read_choices
from fssa_fast.data.lines import DataError
from fssa_fast.data.make import Columns, make_choices, read_items
from fssa_fast.data.people import helpful_harmless, polis, stated_choice


def make_data(users: int = 6, questions: int = 9, alternatives: int = 3) -> ChoiceData:
    """Everyone answers every question; the alternatives of one are a group."""
    options = torch.randn(questions * alternatives, 4, generator=torch.Generator().manual_seed(0))
    rng, choices = np.random.default_rng(0), []
    for _ in range(users):
        own = []
        for question in range(questions):
            best = question * alternatives + int(rng.integers(alternatives))
            others = [question * alternatives + i for i in range(alternatives)]
            own += [(best, other) for other in others if other != best]
        choices.append(np.array(own))
    return ChoiceData(
        options,
        np.repeat(np.arange(questions), alternatives),
        tuple(f"user {i}" for i in range(users)),
        tuple(choices),
    )


def groups_of(data: ChoiceData, indices: Any) -> set[int]:
    return set(data.groups[indices].flatten().tolist())


# ---------------------------------------------------------------- examples


def test_context_and_targets_share_no_group() -> None:
    data, sizes = make_data(), set()
    examples = ChoiceExamples(data, length=300, max_context=5, targets=4, seed=1)
    for example in (examples[i] for i in range(300)):
        assert not groups_of(data, example.context) & groups_of(data, example.targets)
        own = {tuple(pair) for pair in data.choices[example.user].tolist()}
        assert {tuple(p) for p in [*example.context.tolist(), *example.targets.tolist()]} <= own
        assert example.targets.shape == (4, 2) and len(np.unique(example.context, axis=0)) == len(example.context)
        sizes.add(len(example.context))
    assert sizes == {0, 1, 2, 3, 4, 5}


def test_an_example_is_a_function_of_seed_and_index() -> None:
    data = make_data()
    one, two, other = (ChoiceExamples(data, length=20, seed=seed) for seed in (1, 1, 2))

    def key(example: Example) -> Any:
        return example.user, example.context.tolist(), example.targets.tolist()

    backwards = {i: key(two[i]) for i in reversed(range(20))}
    assert all(key(one[i]) == backwards[i] for i in range(20))
    assert sum(key(one[i]) == key(other[i]) for i in range(20)) < 3
    with pytest.raises(IndexError, match="got 20"):
        one[20]


def test_held_out_contexts_nest_and_targets_stay() -> None:
    data = make_data()
    examples = held_out_examples(data, max_context=7, max_targets=5, repeats=3, seed=4)
    assert len(examples) == 18 and {e.user for e in examples} == set(range(6))
    for example in examples:
        assert not groups_of(data, example.context) & groups_of(data, example.targets)
        assert 1 <= len(example.targets) <= 5 and len(example.context) <= 7
        assert len(np.unique(example.targets, axis=0)) == len(example.targets)


def test_batches_are_as_encoders_take_them() -> None:
    data = make_data()
    examples = ChoiceExamples(data, length=8, targets=3, seed=2)
    drawn = [examples[i] for i in range(8)]
    batch = pack_examples(data, drawn)
    counts = [len(e.context) for e in drawn]
    assert batch["offsets"].diff().tolist() == counts and len(set(counts)) > 1
    start = batch["offsets"][3]
    assert torch.equal(batch["pairs"][start : start + counts[3]], data.options[torch.from_numpy(drawn[3].context)])
    assert torch.equal(batch["targets"][5], data.options[torch.from_numpy(drawn[5].targets)])
    assert not batch["choices"].any()


def test_users_are_split_once() -> None:
    parts = split_users(50, 3)
    assert [len(p) for p in parts] == [35, 5, 10] and sorted(sum(parts, [])) == list(range(50))
    assert parts == split_users(50, 3) and parts != split_users(50, 4)


def test_users_of_whom_nothing_can_be_predicted() -> None:
    data = make_data(3)
    few = ChoiceData(data.options, data.groups, data.users, (data.choices[0], data.choices[1][:2], data.choices[2][:0]))
    assert few.predictable().users == ("user 0",)  # two choices, both of one question: one is the other's context


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": torch.full((27, 4), torch.nan)}, "options: .*NaN"),
        ({"options": torch.zeros(27, 4, dtype=torch.float64)}, "options: .*float64"),
        ({"groups": np.zeros(3, dtype=int)}, "groups"),
        ({"users": ("a", "b")}, "users, choices"),
        ({"users": ("a", "a", "b")}, "users: .*twice"),
        ({"choices": (np.array([[0, 27]]),) * 3}, "choices of 'user 0'"),
        ({"choices": (np.array([[1, 1]]),) * 3}, "two different options"),
    ],
)
def test_bad_arrays_are_named(change: dict[str, Any], message: str) -> None:
    data = make_data(3)
    fields = {"options": data.options, "groups": data.groups, "users": data.users, "choices": data.choices}
    with pytest.raises(ValueError, match=message):
        ChoiceData(**{**fields, **change})


# ---------------------------------------------------------------- files of choices


def write(path: Path, *lines: dict[str, Any] | str | bytes) -> Path:
    """A file of these lines."""
    raw = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path


def pair(user: str = "ann", chosen: Any = "x", rejected: Any = "y", **others: Any) -> dict[str, Any]:
    return {"user": user, "chosen": chosen, "rejected": rejected, **others}


def test_choices_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "c.jsonl",
        pair("ann", [0, 1], [1, 0.5], group="q1"),
        pair("ann", [2, 1], [3, 0], group="q2"),
        "",
        pair("bob", [1, 0.5], [0, 1], group="q1"),
        pair("bob", [3, 0], [2, 1], group="q2"),
    )
    data = choice_data(read_choices(path), path=path)
    assert data.users == ("ann", "bob") and data.groups.tolist() == [0, 0, 1, 1]
    assert data.options.tolist() == [[0, 1], [1, 0.5], [2, 1], [3, 0]]
    assert [own.tolist() for own in data.choices] == [[[0, 1], [2, 3]], [[1, 0], [3, 2]]]
    texts = write(tmp_path / "t.jsonl", pair("ann", "a", "b", prompt="p"), pair("ann", "c", "d", prompt="q"))
    asked: list[Any] = []
    embedded = choice_data(
        read_choices(texts),
        lambda pairs: asked.extend(pairs) or torch.eye(4),
        path=texts,  # type: ignore[func-returns-value]
    )
    assert asked == [("p", "a"), ("p", "b"), ("q", "c"), ("q", "d")] and embedded.groups.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([pair(), pair(rejected="x")], "line 2: a tie"),
        ([pair(), {"user": "ann", "chosen": "x"}], "line 2: 'rejected' is missing"),
        ([pair(chosen=None)], "line 1: 'chosen' is missing"),
        ([pair(user=3)], "line 1: 'user': expected a text"),
        ([pair(rating=3)], "line 1: unknown key 'rating'"),
        ([pair(), b'{"user": "ann", "chosen": "caf\xe9", "rejected": "x"}'], "line 2: expected UTF-8, got byte 0xe9"),
        ([pair(), '{"user": '], "line 2: not JSON"),
        ([pair(), "[1]"], "line 2: expected an object"),
        ([pair(), pair(chosen=[1.0])], "line 2: expected a text, as before, got 1 features"),
        ([pair(chosen=[1, 2], rejected=[1])], "line 1: expected 2 features"),
        (['{"user": "ann", "chosen": [NaN], "rejected": [1]}'], "line 1: 'chosen': expected a text or .*finite"),
        ([pair(group="g"), pair(chosen="z", rejected="x", group="h")], "line 2: expected group 'g' .* in line 1"),
        ([], "expected choices, got none"),
    ],
)
def test_bad_files_are_named(lines: list[Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", *lines)
    with pytest.raises(DataError, match=f"bad.jsonl.*{message}|bad.jsonl: {message}"):
        read_choices(path)


def test_a_user_with_one_choice_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", *(pair("ann", [i], [i + 0.5]) for i in range(3)), pair("bob", [0], [1]))
    with pytest.raises(DataError, match="line 4: expected choices of two groups or more of every user, got 1 .*'bob'"):
        choice_data(read_choices(path), path=path)
    with pytest.raises(DataError, match="no embedder"):
        choice_data(read_choices(write(tmp_path / "t.jsonl", pair(), pair(chosen="a", rejected="b"))), path=path)


# ---------------------------------------------------------------- making choices


def table(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def made(folder: Path) -> list[tuple[str, Any, Any]]:
    return [(c.user, c.chosen, c.rejected) for c in read_choices(folder / "choices.jsonl")]


def test_ratings_votes_and_rankings(tmp_path: Path) -> None:
    text = "user,item,value\nann,x,2\nann,y,1\nann,z,1\nann,w,2\nbob,x,-1\nbob,y,1\nbob,z,0\nbob,w,2\n"
    ratings = table(tmp_path / "r.csv", text)
    record = make_choices(ratings, tmp_path / "ratings", "ratings")
    assert made(tmp_path / "ratings") == [
        ("ann", "x", "y"), ("ann", "x", "z"), ("ann", "w", "y"), ("ann", "w", "z"),
        ("bob", "y", "x"), ("bob", "z", "x"), ("bob", "w", "x"), ("bob", "y", "z"), ("bob", "w", "y"),
        ("bob", "w", "z"),
    ]  # fmt: skip
    assert record == json.loads((tmp_path / "ratings" / "choices.json").read_text()) and record["users"] == 2
    assert len(record["source"]["sha256"]) == 64 and record["choices"]["count"] == 10
    make_choices(ratings, tmp_path / "rankings", "rankings")
    assert made(tmp_path / "rankings")[0] == ("ann", "y", "x")
    cast = table(tmp_path / "v.csv", text + "cy,x,5\ncy,y,-2\ncy,z,-3\ncy,w,1\n")
    make_choices(cast, tmp_path / "votes", "votes")
    assert made(tmp_path / "votes") == [("cy", "x", "y"), ("cy", "x", "z"), ("cy", "w", "y"), ("cy", "w", "z")]
    make_choices(ratings, tmp_path / "margin", "ratings", margin=0.5)
    assert len(made(tmp_path / "margin")) == 10
    make_choices(ratings, tmp_path / "few", "ratings", max_pairs=5)
    assert len(made(tmp_path / "few")) == 9


def test_users_who_cannot_be_learnt_from_are_all_found_in_one_pass_with_their_reasons(tmp_path: Path) -> None:
    rows = [(user, item, value) for user in ("ann", "bob") for item, value in zip("wxyz", (1, 2, 3, 4), strict=True)]
    rows += [(f"alike{i}", item, 3) for i in range(5) for item in "wxyz"] + [("one", "x", 5)]
    rows += [("few", "x", 1), ("few", "y", 2)]
    rows += [(f"star{i}", item, value) for i in range(3) for item, value in (("x", 1), ("y", 0), ("z", 0))]
    path = table(tmp_path / "r.csv", "user,item,value\n" + "".join(f"{u},{i},{v}\n" for u, i, v in rows))
    record = make_choices(path, tmp_path / "out", "ratings")
    assert record["users"] == 2 and record["users left out"] == {
        "no two things rated differently": [*(f"alike{i}" for i in range(5)), "one"],
        "fewer than 2 choices": ["few"],
        "no choice that can be predicted from another": ["star0", "star1", "star2"],
    }
    read = read_choices(tmp_path / "out" / "choices.jsonl")
    assert choice_data(read, lambda texts: torch.zeros(len(texts), 2)).users == ("ann", "bob")
    only = table(tmp_path / "o.csv", "user,item,value\n" + "".join(f"{u},{i},{v}\n" for u, i, v in rows[8:]))
    with pytest.raises(DataError, match="got none; 6 with no two .*, 1 with fewer .*, 3 with no choice that can be"):
        make_choices(only, tmp_path / "none", "ratings")


def test_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"user": ["ann"] * 4, "item": ["x", "y", "z", "w"], "value": [2, 1, 1, 2]}
    dataset = datasets.Dataset.from_dict(rows)
    dataset.save_to_disk(tmp_path / "d")
    record = make_choices(tmp_path / "d", tmp_path / "o", "ratings")
    assert made(tmp_path / "o") == [("ann", "x", "y"), ("ann", "x", "z"), ("ann", "w", "y"), ("ann", "w", "z")]
    again = datasets.Dataset.from_dict(rows | {"value": [2, 1, 1, 3]})
    again.save_to_disk(tmp_path / "e")
    assert record["source"]["sha256"] != make_choices(tmp_path / "e", tmp_path / "o", "ratings")["source"]["sha256"]
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match="expected one split, the directory of 'train' or 'test'"):
        make_choices(tmp_path / "splits", tmp_path / "o", "ratings")
    make_choices(tmp_path / "splits" / "test", tmp_path / "o", "ratings")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="expected a directory written by a dataset's save_to_disk"):
        make_choices(tmp_path / "empty", tmp_path / "o", "ratings")


def test_pairs_and_items(tmp_path: Path) -> None:
    items = read_items(table(tmp_path / "i.csv", "item,price,time\nx,1,2\ny,3,4\nz,5,6\nw,7,8\n"))
    assert items == {"x": (1.0, 2.0), "y": (3.0, 4.0), "z": (5.0, 6.0), "w": (7.0, 8.0)}
    lines = write(tmp_path / "p.jsonl", {"who": "a", "won": "x", "lost": "y"}, {"who": "a", "won": "w", "lost": "z"})
    make_choices(lines, tmp_path / "out", "pairs", columns=Columns("who", chosen="won", rejected="lost"), items=items)
    assert made(tmp_path / "out") == [("a", (1.0, 2.0), (3.0, 4.0)), ("a", (7.0, 8.0), (5.0, 6.0))]
    named = read_items(table(tmp_path / "n.csv", "item,text\nx,Boil it.\n"), text="text")
    assert named == {"x": "Boil it."}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user,item,value\nann,x,1\nann,y,\n", "line 3: 'value': expected a value"),
        ("user,item,value\nann,x,nan\n", "line 2: 'value': expected a finite number, got 'nan'"),
        ("user,item,value\nann,x,1\nann,x,2\n", "line 3: expected each item once"),
        ("user,item,value\nann,w,1\n", "line 2: unknown item 'w'"),
        ("user,item\nann,x\n", "line 2: column 'value' is missing"),
        ("user,item,value\nann,x\n", "line 2: expected 3 fields"),
        ("user,item,value\nann,x,1\nann,y,1\n", "got none; 1 with no two things"),
    ],
)
def test_bad_tables_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        make_choices(table(tmp_path / "t.csv", text), tmp_path / "o", "ratings", items={"x": "a", "y": "b"})


# ---------------------------------------------------------------- published data sets, in miniature


def test_polis(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    votes = rng.choice([1, -1, 0, -128], size=(60, 30), p=[0.45, 0.45, 0.05, 0.05]).astype(np.int8)
    votes[:, 0], votes[:, 1] = 1, -1  # popularity alone decides between these two
    np.savez(tmp_path / "votes.npz", town=votes)
    np.save(tmp_path / "minilm_f16.npy", rng.standard_normal((31, 6)).astype(np.float16))
    write(tmp_path / "statements.jsonl", {"conv": "other", "col": 0}, *({"conv": "town", "col": i} for i in range(30)))
    parts = polis(tmp_path, conversation="town", margin=0.2, votes=5)
    assert sum(len(part.users) for part in parts) > 50 and not set(parts[0].users) & set(parts[2].users)
    for part in parts:
        for name, own in zip(part.users, part.choices, strict=True):
            row = votes[int(name.split("/")[1])]
            assert (row[own[:, 0]] == 1).all() and (row[own[:, 1]] == -1).all() and not (own[:, 0] == 0).any()
    with pytest.raises(ValueError, match="conversation: expected one of .*town"):
        polis(tmp_path, conversation="village")


def test_stated_choice(tmp_path: Path) -> None:
    header = "user,situation,choice,price_a,time_a,change_a,comfort_a,price_b,time_b,change_b,comfort_b\n"
    rows = [f"{u},{s},{(u + s) % 2},{u},{s},0,1,{s},{u + 1},1,0" for u in range(1, 21) for s in range(1, 6)]
    table(tmp_path / "train_pairs.csv", header + "\n".join(rows) + "\n")
    parts = stated_choice(tmp_path, "train")
    assert [len(p.users) for p in parts] == [14, 2, 4] and all(len(c) == 5 for p in parts for c in p.choices)
    whole = parts[0]
    assert len(set(whole.groups.tolist())) == 100 and torch.allclose(whole.options.mean(0), torch.zeros(4), atol=1e-5)
    for name, own in zip(whole.users, whole.choices, strict=True):
        # Options are in the file's order, two a line: the first of a line was chosen where `choice` is 0.
        assert [int(chosen % 2) for chosen, _ in own] == [(int(name) + s) % 2 for s in range(1, 6)]
    table(tmp_path / "train_pairs.csv", header + "1,1,2,0,0,0,0,0,0,0,0\n")
    with pytest.raises(ValueError, match="line 2: 'choice': expected 0 or 1, got '2'"):
        stated_choice(tmp_path, "train")
    alternatives = [
        f"{u},{s},{a},{int(a == s % 4)},{a},{u},{s},0,1,{a % 2}" for u in range(10) for s in range(4) for a in range(4)
    ]
    header = "user,situation,alt,chosen,pf,cl,loc,wk,tod,seas\n"
    table(tmp_path / "electricity_choices.csv", header + "\n".join(alternatives) + "\n")
    train = stated_choice(tmp_path, "electricity")[0]
    assert all(own.shape == (12, 2) for own in train.choices)
    table(tmp_path / "electricity_choices.csv", header + "\n".join(alternatives[:3]).replace(",0,0,", ",9,0,") + "\n")
    with pytest.raises(ValueError, match="expected one choice"):
        stated_choice(tmp_path, "electricity")
    with pytest.raises(ValueError, match="panel"):
        stated_choice(tmp_path, "boats")


def test_helpful_harmless(tmp_path: Path) -> None:
    both = [{"helpful": 0, "harmless": 1}, {"helpful": 1, "harmless": 1}, {"helpful": 0}, {"harmless": 1}]
    lines = [
        {"prompt": f"p{i // 2}", "choice": both[i % 4], "response_a": "", "response_b": "a" * i} for i in range(200)
    ]
    write(tmp_path / "pairs.jsonl", *lines)
    np.save(tmp_path / "minilm_f16.npy", np.random.default_rng(0).standard_normal((400, 3)).astype(np.float16))
    parts = helpful_harmless(tmp_path)
    prompts = [set(part.groups[np.concatenate(part.choices)].flatten().tolist()) for part in parts]
    assert not prompts[0] & prompts[2] and not prompts[0] & prompts[1] and all(prompts)
    for part in parts:
        assert part.users == ("helpful", "harmless")
        for which, own in enumerate(part.choices):
            kinds = {int(i // 2 % 4) for i in own[:, 0]}
            assert kinds == {0}
            assert (own[:, 0] % 2 == which).all()
        assert part.options.shape == (400, 4)
        assert (part.options[1::2, 3].diff() > 0).all() and (part.options[::2, 3] == part.options[1, 3]).all()
