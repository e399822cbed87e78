"""Choices of people: as arrays, from files, and drawn as contexts and targets that share nothing."""
