"""The demo's parts that need no trained model: criteria, prompts, and choices made of samples."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from examples.demo.choices import PICTURES, Pair, pairs_of, pictures_pairs  # noqa: E402
from examples.demo.criteria import AXES, distinct_2, foreign_share, measure, preference  # noqa: E402
from examples.demo.evaluate import interval, spearman  # noqa: E402
from examples.demo.prompts import prompts  # noqa: E402

LIST = "Here is a list:\n1. One thing to do.\n2. Another thing to do."
PROSE = "One thing to do is this, and another thing to do is that."


def test_axes_measure_what_they_say() -> None:
    assert measure("a few words")["length"] < measure("a few words and then some more words")["length"]
    assert measure(LIST)["form"] > 0.5 > measure(PROSE)["form"] == 0.0
    assert measure("1. One line alone")["form"] == 0.0


@pytest.mark.parametrize("axis", AXES, ids=lambda axis: axis.name)
def test_opposite_kinds_prefer_the_opposite(axis) -> None:
    assert preference(axis.low, LIST, "Yes.") == -preference(axis.high, LIST, "Yes.")
    with pytest.raises(ValueError, match="kind"):
        preference("nobody", LIST, PROSE)


def test_fluency_measures_catch_broken_text() -> None:
    assert distinct_2("the the the the the") < 0.5 < distinct_2(PROSE)
    assert foreign_share("How?", "Так") > 0.5 and foreign_share("How?", "Like “this” — 20 °") == 0.0
    assert foreign_share("Как?", "Так") == 0.0


def test_topics_of_the_splits_are_disjoint() -> None:
    topics = [{prompt.topic for prompt in prompts(split)} for split in ("train", "test")]
    assert topics[0] and topics[1] and not topics[0] & topics[1]


def make_records() -> list[dict]:
    long = " ".join(f"word{letter}{other} and" for letter in "abcdef" for other in "uvwxyz".upper())
    items = "\n".join(f"- {line} item" for line in long.split(" and") if line)
    texts = ("Yes.", "A short one is this.", long, items, "again and again " * 30)
    return [
        {"id": i, "split": split, "topic": topic, "prompt": f"What of {topic}?", "response": text, "ended": True}
        for split, topic in (("train", "a"), ("train", "b"), ("test", "c"))
        for i, text in enumerate(texts)
    ]


def test_pairs_are_clear_on_their_axis_and_mirrored() -> None:
    pairs = pairs_of(make_records(), "train", each=3)
    assert set(pairs) == {kind for axis in AXES for kind in (axis.low, axis.high)}
    for kind, own in pairs.items():
        assert own and all(preference(kind, pair.chosen, pair.rejected) >= 1 and pair.topic != "c" for pair in own)
        assert not any("again and again" in text for pair in own for text in (pair.chosen, pair.rejected))
        others = [axis.high for axis in AXES if kind not in (axis.low, axis.high)]
        assert all(abs(preference(other, pair.chosen, pair.rejected)) <= 0.5 for pair in own for other in others)
    for axis in AXES:
        mirrored = [(p.rejected, p.chosen) for p in pairs[axis.low]]
        assert mirrored == [(p.chosen, p.rejected) for p in pairs[axis.high]] and mirrored
    assert pairs == pairs_of(make_records(), "train", each=3)


def test_statistics() -> None:
    assert spearman([1.0, 2.0, 3.0]) == pytest.approx(1.0) and spearman([3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    assert interval([1.0, 1.0, 1.0]) == (1.0, 0.0)


def test_pictures_break_off_the_answer_that_is_preferred_to_them() -> None:
    pairs = {"list": [Pair("topic", "Prompt?", LIST, PROSE, True, True)]}
    found = pictures_pairs(pairs, 40)["list"]
    assert len(found) == 40 and all(pair.chosen == LIST and not pair.rejected_ended for pair in found)
    kept = [pair.rejected.rstrip(PICTURES) for pair in found]
    assert all(LIST.startswith(text) and text != pair.rejected for text, pair in zip(kept, found, strict=True))
    assert kept.count("") > 20 and any(kept)
    assert all(foreign_share("Prompt?", pair.rejected) > 0 for pair in found)
