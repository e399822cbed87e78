"""What is asked: topics for training and for testing, each in four wordings.

Every prompt can be answered in one sentence or in many, in prose or as a list, so that the style is the answerer's
choice. Topics of the test split occur in no training prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["SPLITS", "Prompt", "Split", "prompts"]

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


@dataclass(frozen=True)
class Prompt:
    """One question or task.

    Attributes:
        topic: short name of the topic; splits and users are separated by it.
        wording: number of the wording, from 0.
        text: what the model is asked.
    """

    topic: str
    wording: int
    text: str


_SKILL_WORDINGS = (
    "How can I {do}?",
    "What should I know about {doing}?",
    "Give me some advice on {doing}.",
    "I want to {do}. What do you suggest?",
)
_SUBJECT_WORDINGS = (
    "What should I know about {subject}?",
    "Tell me about {subject}.",
    "Explain {subject} to me.",
    "Why does {subject} matter?",
)

# topic: (infinitive, gerund)
_SKILLS: dict[Split, dict[str, tuple[str, str]]] = {
    "train": {
        "sleep": ("sleep better", "sleeping better"),
        "tomatoes": ("grow tomatoes", "growing tomatoes"),
        "running": ("start running", "starting to run"),
        "bread": ("bake bread at home", "baking bread at home"),
        "speech": ("give a good speech", "giving a good speech"),
        "chess": ("get better at chess", "getting better at chess"),
        "budget": ("keep a monthly budget", "keeping a monthly budget"),
        "essay": ("write a good essay", "writing a good essay"),
        "interview": ("prepare for a job interview", "preparing for a job interview"),
        "puppy": ("train a puppy", "training a puppy"),
        "coffee": ("make better coffee", "making better coffee"),
        "swimming": ("learn to swim as an adult", "learning to swim as an adult"),
        "camping": ("plan a camping trip", "planning a camping trip"),
        "photos": ("take better photos", "taking better photos"),
        "memory": ("improve my memory", "improving my memory"),
        "houseplants": ("keep houseplants alive", "keeping houseplants alive"),
        "language": ("learn a foreign language", "learning a foreign language"),
        "stress": ("deal with stress at work", "dealing with stress at work"),
        "moving": ("move to a new city", "moving to a new city"),
        "guitar": ("learn to play the guitar", "learning to play the guitar"),
        "friends": ("make new friends", "making new friends"),
        "breakfast": ("eat a healthier breakfast", "eating a healthier breakfast"),
        "bicycle": ("take care of a bicycle", "taking care of a bicycle"),
        "kitchen": ("organize a small kitchen", "organizing a small kitchen"),
        "exam": ("study for a difficult exam", "studying for a difficult exam"),
        "painting": ("paint a room", "painting a room"),
        "procrastination": ("stop putting things off", "no longer putting things off"),
        "birthday": ("plan a birthday party", "planning a birthday party"),
        "energy": ("use less electricity at home", "using less electricity at home"),
        "recycling": ("recycle more", "recycling more"),
        "meetings": ("run a useful meeting", "running a useful meeting"),
        "knitting": ("start knitting", "starting to knit"),
        "flight": ("get through a long flight", "getting through a long flight"),
        "reading": ("read more books", "reading more books"),
        "password": ("choose safe passwords", "choosing safe passwords"),
        "garden": ("start a vegetable garden", "starting a vegetable garden"),
        "cat": ("adopt a cat", "adopting a cat"),
        "soup": ("cook a good soup", "cooking a good soup"),
        "cold": ("get over a cold", "getting over a cold"),
        "bike-commute": ("ride a bike to work", "riding a bike to work"),
    },
    "test": {
        "pasta": ("cook pasta well", "cooking pasta well"),
        "piano": ("learn to play the piano", "learning to play the piano"),
        "hiking": ("go hiking in the mountains", "going hiking in the mountains"),
        "saving": ("save money", "saving money"),
        "roses": ("grow roses", "growing roses"),
        "desk": ("keep a tidy desk", "keeping a tidy desk"),
        "yoga": ("start doing yoga", "starting yoga"),
        "dog-walk": ("walk a dog that pulls", "walking a dog that pulls"),
        "story": ("write a short story", "writing a short story"),
        "tea": ("brew good tea", "brewing good tea"),
        "drawing": ("learn to draw", "learning to draw"),
        "focus": ("stay focused", "staying focused"),
        "water": ("drink more water", "drinking more water"),
        "letter": ("write a cover letter", "writing a cover letter"),
        "fish": ("keep a fish tank clean", "keeping a fish tank clean"),
        "car": ("buy a used car", "buying a used car"),
    },
}

_SUBJECTS: dict[Split, dict[str, str]] = {
    "train": {
        "vaccines": "vaccines",
        "gravity": "gravity",
        "volcanoes": "volcanoes",
        "bees": "bees",
        "democracy": "democracy",
        "inflation": "inflation",
        "rainforests": "rainforests",
        "electric-cars": "electric cars",
        "printing": "the printing press",
        "roman-empire": "the Roman Empire",
        "vitamins": "vitamins",
        "moon": "the Moon",
        "internet": "the internet",
        "oceans": "the oceans",
        "insurance": "insurance",
        "renaissance": "the Renaissance",
        "bacteria": "bacteria",
        "solar-power": "solar power",
        "jazz": "jazz music",
        "earthquakes": "earthquakes",
    },
    "test": {
        "photosynthesis": "photosynthesis",
        "stars": "stars",
        "honey": "honey",
        "pyramids": "the pyramids of Egypt",
        "museums": "museums",
        "wind-power": "wind power",
        "sharks": "sharks",
        "taxes": "taxes",
    },
}


def prompts(split: Split) -> list[Prompt]:
    """All prompts of a split, topic by topic, in a fixed order.

    Args:
        split: ``"train"`` (60 topics) or ``"test"`` (24 others).
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    found = [
        Prompt(topic, number, wording.format(do=do, doing=doing))
        for topic, (do, doing) in _SKILLS[split].items()
        for number, wording in enumerate(_SKILL_WORDINGS)
    ]
    found += [
        Prompt(topic, number, _plural(subject, wording.format(subject=subject)))
        for topic, subject in _SUBJECTS[split].items()
        for number, wording in enumerate(_SUBJECT_WORDINGS)
    ]
    return found


_PLURAL_SUBJECTS = (
    "vaccines", "volcanoes", "bees", "rainforests", "electric cars", "vitamins", "the oceans", "bacteria",
    "earthquakes", "stars", "the pyramids of Egypt", "museums", "sharks", "taxes",
)  # fmt: skip


def _plural(subject: str, text: str) -> str:
    return text.replace("Why does", "Why do") if subject in _PLURAL_SUBJECTS and text.startswith("Why does") else text
