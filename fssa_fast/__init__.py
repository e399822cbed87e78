"""fssa_fast: per-user steering of language models at the speed of the plain model."""

__version__ = "0.1.0"
