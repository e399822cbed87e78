"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fssa_fast.serving.versions import Version

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The figures of one server, in a registry of their own."""

    def __init__(self, versions: Callable[[], Iterable[Version]]) -> None:
        self._registry = CollectorRegistry()
        counter, gauge = partial(Counter, registry=self._registry), partial(Gauge, registry=self._registry)
        histogram = partial(Histogram, registry=self._registry)
        self.requests = counter("fssa_http_requests", "Requests answered.", ("route", "status"))
        self.seconds = histogram("fssa_http_request_seconds", "Until the last byte.", ("route",))
        self.first = histogram("fssa_first_token_seconds", "From a request to its first token.", buckets=_SECONDS)
        self.between = histogram("fssa_token_seconds", "From one token to the next.", buckets=_SECONDS)
        self.step = histogram("fssa_step_seconds", "A step of all running requests.", buckets=_SECONDS)
        self.prompt_tokens = counter("fssa_prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = counter("fssa_cached_tokens", "Tokens of prompts that were found computed.")
        self.answer_tokens = counter("fssa_answer_tokens", "Tokens of answers.")
        self.choices = counter("fssa_choices", "Choices added.")
        for name, text, read in (
            ("fssa_engine_running", "Requests that have a row.", lambda one: one.engine.running),
            ("fssa_engine_waiting", "Requests that wait for a row.", lambda one: one.engine.waiting),
            ("fssa_engine_preempted", "Requests put back for want of memory.", lambda one: one.engine.preempted),
            ("fssa_bank_slots", "Rows of the banks in use.", lambda one: one.policy.bank.used),
        ):
            gauge(name, text).set_function(partial(_total, versions, read))

    def page(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)


def _total(versions: Callable[[], Iterable[Version]], read: Callable[[Version], int]) -> float:
    return sum(map(read, versions()))
