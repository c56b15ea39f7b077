"""A trace of each request over router, prefill, transfer and decode, for OpenTelemetry: `pdlab serve --otlp-endpoint URL` (extra `otel`).

Whoever answers an HTTP request writes a span `llm_request` with vLLM's attributes (gen_ai.*). A router's has below it a span for each leg,
whose instance goes on from it by the W3C header `traceparent`, and one for each transfer of KV. The begin and the end of a request or leg
cost something, a token nothing. A thread sends what has ended. Where the collector is slow or away, spans are dropped and one line says so.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from pdlab import __version__
from pdlab.real.net.wire import TRACE_HEADERS, Carrier

if TYPE_CHECKING:
    from pdlab.real.api.generate import Generation

log = logging.getLogger(__name__)

PATH = "/v1/traces"
SEND_S = 5.0  # for a batch of spans
CLOSE_S = 3.0  # for what is left at the end
EVERY_S = 1.0
MOST_SPANS = 8192  # that wait to be sent

_w3c = TraceContextTextMapPropagator()


def url_of(endpoint: str) -> str:
    """Where spans are posted: a collector's address alone means its usual path."""
    return endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + PATH


class TraceSpan:
    """`carrier` is what others take to write spans below it."""

    def __init__(self, span: trace.Span) -> None:
        self.span = span
        headers: dict[str, str] = {}
        _w3c.inject(headers, trace.set_span_in_context(span))
        first, second = TRACE_HEADERS
        self.carrier: Carrier = headers.get(first, ""), headers.get(second, "")

    def fail(self, reason: str) -> None:
        self.span.set_status(Status(StatusCode.ERROR, reason))

    def end(self) -> None:
        self.span.end()


class Traces:
    """`name` is the instance's or router's. `close` sends what is left, for a few seconds at most."""

    def __init__(self, endpoint: str, name: str, role: str = "") -> None:
        self.role = role
        about: dict[str, AttributeValue] = {SERVICE_NAME: "pdlab", SERVICE_VERSION: __version__, SERVICE_INSTANCE_ID: name}
        resource = Resource(about).merge(OTELResourceDetector().detect())  # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES count more
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = self._exporter = _ToldOnce(OTLPSpanExporter(endpoint=url_of(endpoint), timeout=SEND_S), url_of(endpoint))
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter, max_queue_size=MOST_SPANS, schedule_delay_millis=1000 * EVERY_S, max_export_batch_size=512)
        )
        self._tracer = self._provider.get_tracer("pdlab", __version__)

    def request(self, above: Carrier | None) -> TraceSpan:
        """Of a client's request, which may itself be part of something `above`."""
        return TraceSpan(self._tracer.start_span("llm_request", _context(above), SpanKind.SERVER))

    def request_ended(self, span: TraceSpan, generation: Generation, name: str, model: str, role: str) -> None:
        """`name` is its X-Request-Id."""
        if span.span.is_recording():
            span.span.set_attributes(attributes(generation, name, model))
            if role or self.role:
                span.span.set_attribute("pdlab.role", role or self.role)
            if generation.failed:
                span.fail(generation.error)
        span.end()

    def leg(self, above: Carrier, kind: str, name: str, attempt: int, instance: str, role: str) -> TraceSpan:
        """What one instance does of a request: `kind` alone, prefill, decode, reserve (decode, begun before prefill) or target (of a
        migration)."""
        told = {"gen_ai.request.id": name, "pdlab.leg": kind, "pdlab.attempt": attempt, "pdlab.instance": instance, "pdlab.role": role}
        shown = {"reserve": "decode", "target": "migration"}.get(kind, kind)
        return TraceSpan(self._tracer.start_span(shown, _context(above), SpanKind.CLIENT, told))

    def transfer(self, above: Carrier, ago_s: float, seconds: float, size: int, src: str, dst: str) -> None:
        """KV came from one instance to another: `size` bytes within `seconds`, the last of them `ago_s` ago."""
        told: Mapping[str, AttributeValue] = {"pdlab.kv_bytes": size, "pdlab.source": src, "pdlab.destination": dst}
        end = time.time_ns() - int(1e9 * max(ago_s, 0.0))
        start = end - int(1e9 * max(seconds, 0.0))
        self._tracer.start_span("kv_transfer", _context(above), attributes=told, start_time=start).end(end)

    def close(self) -> None:
        closing = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        closing.start()
        closing.join(CLOSE_S)
        if closing.is_alive():
            self._exporter.shutdown()  # it waits for the collector no longer


def attributes(generation: Generation, name: str, model: str) -> dict[str, AttributeValue]:
    """Under the names of vLLM's SpanAttributes; a request's several prompts count together, the latencies are its first candidate's."""
    sampling, choices = generation.ask.sampling, generation.choices
    elapsed_s = generation.elapsed_s
    told: dict[str, AttributeValue] = {
        "gen_ai.response.model": model,
        "gen_ai.request.id": name,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.n": sampling.best_of,
        "gen_ai.usage.num_sequences": len(choices),
        "gen_ai.usage.prompt_tokens": generation.prompt_tokens,
        "gen_ai.usage.completion_tokens": generation.completion_tokens,
        "pdlab.cached_tokens": generation.cached_tokens,
        "gen_ai.latency.e2e": elapsed_s,
        "gen_ai.response.finish_reasons": [choice.finish or ("error" if generation.failed else "abort") for choice in choices],
    }
    first = choices[0]
    if first.first_s > 0.0:
        first_s = first.first_s - generation.started_s
        told |= {
            "gen_ai.latency.time_in_queue": first.queue_s,
            "gen_ai.latency.time_to_first_token": first_s,
            "gen_ai.latency.time_in_model_prefill": max(first_s - first.queue_s, 0.0),
            "gen_ai.latency.time_in_model_decode": max(first.last_s - first.first_s, 0.0),
            "gen_ai.latency.time_in_model_inference": max(first.last_s - generation.started_s - first.queue_s, 0.0),
        }
    return told


def _context(above: Carrier | None) -> trace.Context:
    """Of who asked; one that cannot be read counts as none."""
    return _w3c.extract({} if above is None else {key: value for key, value in zip(TRACE_HEADERS, above, strict=True) if value})


class _ToldOnce(SpanExporter):  # type: ignore[misc]
    """Passes spans on. When that begins to fail, and when it succeeds again, a line says so; what else the library would say of each
    attempt is heard, and not shown."""

    def __init__(self, exporter: SpanExporter, url: str) -> None:
        self.exporter, self.url = exporter, url
        self.reason = _FirstLine()
        self.failing = self.closed = False
        for name in ("opentelemetry.exporter", "opentelemetry.sdk"):
            library = logging.getLogger(name)
            library.addHandler(self.reason)
            library.propagate = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.reason.line = ""
        result = self.exporter.export(spans)
        failed = result is not SpanExportResult.SUCCESS
        if failed != self.failing and not self.closed:
            self.failing = failed
            if failed:
                log.warning("traces do not reach %s, and are dropped until they do: %s", self.url, self.reason.line or "no reason given")
            else:
                log.warning("traces reach %s again", self.url)
        return result

    def shutdown(self) -> None:
        if not self.closed:
            self.closed = True
            self.exporter.shutdown()


class _FirstLine(logging.Handler):
    """What the library says first of a batch is the cause; later lines count attempts."""

    line = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.line = self.line or record.getMessage()[:300]
