"""A real OTLP collector in this process: HTTP on a free port, protobuf in, spans out."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class CollectedSpan:
    """`about` is its resource: who wrote it."""

    def __init__(self, span: Any, about: dict[str, Any]) -> None:
        self.name, self.kind = span.name, span.kind
        self.trace, self.id, self.parent = span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()
        self.start_s, self.end_s = span.start_time_unix_nano / 1e9, span.end_time_unix_nano / 1e9
        self.failed, self.reason = span.status.code == 2, span.status.message
        self.attributes, self.about = values(span.attributes), about


def values(attributes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in attributes:
        kind = one.value.WhichOneof("value")
        value = getattr(one.value, kind)
        found[one.key] = [each.string_value for each in value.values] if kind == "array_value" else value
    return found


class Collector:
    def __init__(self, server: ThreadingHTTPServer) -> None:
        self.url = f"http://127.0.0.1:{server.server_port}"
        self.spans: list[CollectedSpan] = []
        self.paths: set[str] = set()
        self.slow_s = 0.0
        self.status = 200

    def of(self, trace: str) -> list[CollectedSpan]:
        return [span for span in list(self.spans) if span.trace == trace]

    def take(self, path: str, body: bytes) -> None:
        self.paths.add(path)
        for sent in ExportTraceServiceRequest.FromString(body).resource_spans:
            about = values(sent.resource.attributes)
            self.spans += [CollectedSpan(span, about) for scope in sent.scope_spans for span in scope.spans]


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            time.sleep(collector.slow_s)
            if collector.status == 200:
                collector.take(self.path, body)
            with contextlib.suppress(OSError):  # whoever sent it may have given up
                self.send_response(collector.status)
                self.send_header("content-length", "0")
                self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    collector = Collector(server)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
