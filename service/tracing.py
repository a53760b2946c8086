"""One trace per request, through Redis into the worker: W3C Trace Context always, OpenTelemetry's spans where asked.

Every job carries a `traceparent`: the client's, or one made here, so that the logs of both processes meet under one
trace id. With OTEL_EXPORTER_OTLP_ENDPOINT set and the extra `tracing` installed, both processes send spans as well:

    POST /generate          api     the whole request
      queue                 api     admission until a worker took the job
      prefill, decode       worker  its work, once per attempt
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import TYPE_CHECKING, Any

from shared.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, SpanKind

log = logging.getLogger(__name__)

TRACE_PARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
"""W3C Trace Context, level 1: version, trace, parent, flags; zeros are nobody."""
Attributes = dict[str, str | int | float | bool]


def read_traceparent(header: str) -> str | None:
    """Return a header that names a trace; None for every other, which W3C says to pass over."""
    return header if TRACE_PARENT.fullmatch(header) else None


def new_traceparent() -> str:
    """Begin a trace that nobody was asked to keep: its id is for the logs."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00"


def trace_id_of(traceparent: str | None) -> str | None:
    return traceparent.split("-")[1] if traceparent else None


class Tracer:
    """Writes spans; does nothing where no endpoint is set."""

    def __init__(self, process: str, provider: TracerProvider | None = None) -> None:
        """Tracers of tests get a provider of their own."""
        self._provider = provider
        self._tracer = provider.get_tracer(f"smollm.{process}") if provider else None

    @property
    def is_on(self) -> bool:
        return self._tracer is not None

    def begin(self, name: str, *, parent: str | None, attributes: Attributes) -> Span | None:
        """Open a server's span; it lasts until its `end`."""
        if self._tracer is None:
            return None
        from opentelemetry.trace import SpanKind

        return self._open(name, parent, time.time_ns(), attributes, SpanKind.SERVER)

    def record(self, name: str, *, parent: str | None, start_ns: int, end_ns: int, attributes: Attributes) -> None:
        """Write a span that is over; times are nanoseconds since 1970."""
        if self._tracer is None:
            return
        from opentelemetry.trace import SpanKind

        self._open(name, parent, start_ns, attributes, SpanKind.INTERNAL).end(end_time=max(start_ns, end_ns))

    def close(self) -> None:
        """Send what is not sent yet."""
        if self._provider is not None:
            self._provider.shutdown()

    def _open(self, name: str, parent: str | None, start_ns: int, attributes: Attributes, kind: SpanKind) -> Span:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        assert self._tracer is not None
        context = TraceContextTextMapPropagator().extract({"traceparent": parent} if parent else {})
        return self._tracer.start_span(name, context, start_time=start_ns, attributes=attributes, kind=kind)


def traceparent_of(span: Span) -> str:
    """What a span's children are told."""
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def open_tracer(process: str, endpoint: str | None) -> Tracer:
    """Return the process's tracer: one that sends to an OTLP endpoint, or none.

    Raises:
        ConfigError: an endpoint is set and the packages are not installed.
    """
    if not endpoint:
        return Tracer(process)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError(
            f"OTEL_EXPORTER_OTLP_ENDPOINT is set and {error.name} is not installed; install the extra `tracing` "
            "or unset it."
        ) from error
    log.info("spans go to %s", endpoint)
    exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces")
    return Tracer(process, provider_of(process, exporter))


def provider_of(process: str, exporter: SpanExporter, **options: Any) -> TracerProvider:
    """Return a provider that sends in the background; a span that cannot be sent is dropped, and logged by the SDK."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": f"smollm-{process}"}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter, **options))
    return provider
