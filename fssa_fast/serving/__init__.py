"""Serving people over HTTP: an OpenAI-compatible API over the engine, and a page to try it on."""

from fssa_fast.serving.app import make_app
from fssa_fast.serving.settings import Settings

__all__ = ["Settings", "make_app"]
