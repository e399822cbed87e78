"""OpenTelemetry's traces: a span a request, which goes on from its client's; without names and without texts.

Spans go nowhere, and cost next to nothing, until the process has a provider: `export`, or a provider of one's own.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from starlette.types import Scope

__all__ = ["Span", "answered", "current", "export", "request"]

_tracer = trace.get_tracer("fssa_fast.serving")


def request(scope: Scope) -> AbstractContextManager[Span]:
    """The span of a request, current within the block; a child of the one that the header `traceparent` names."""
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    return _tracer.start_as_current_span(
        scope["method"], propagate.extract(headers), SpanKind.SERVER, record_exception=False,
        attributes={"http.request.method": scope["method"]},
    )  # fmt: skip


def answered(span: Span, method: str, route: str, status: int) -> None:
    """Says of a request's span how it was answered; route: the pattern, for a path may hold a user's name."""
    span.update_name(f"{method} {route}")
    span.set_attributes({"http.route": route, "http.response.status_code": status})
    if status >= 500:
        span.set_status(Status(StatusCode.ERROR))


def current() -> Span:
    """The span of the request that is being answered."""
    return trace.get_current_span()


def export() -> None:
    """Sends spans by OTLP over HTTP from now on, to where OpenTelemetry's environment variables say."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    os.environ.setdefault("OTEL_SERVICE_NAME", "fssa")
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
