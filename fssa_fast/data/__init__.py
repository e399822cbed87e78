"""Choices of people: as arrays, from files, and drawn as contexts and targets that share nothing."""

from fssa_fast.data.choices import ChoiceData, ChoiceExamples, Example, held_out_examples, pack_examples, split_users

__all__ = ["ChoiceData", "ChoiceExamples", "Example", "held_out_examples", "pack_examples", "split_users"]
