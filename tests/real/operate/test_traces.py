"""Traces of a real cluster at a real OTLP collector; and a collector that is slow, away, or not asked for."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time

import httpx
import pytest

from pdlab.real.api.traces import Traces, url_of
from pdlab.real.launch.serve import otlp_mistake
from tests.real.launch.test_all import Cluster
from tests.support.otlp import CollectedSpan, Collector, collecting
from tests.support.ports import free_port
from tests.support.waiting import until

ABOVE, CLIENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SPANS = {"prefill", "decode", "kv_transfer", "llm_request"}


def ask(cluster: Cluster, traceparent: str = "", **fields: object) -> httpx.Response:
    body = {"prompt": "traced " * 6, "max_tokens": 8, "temperature": 0.5, "ignore_eos": True, **fields}
    headers = {"X-Request-Id": "one-of-mine", "tracestate": "vendor=7"} | ({"traceparent": traceparent} if traceparent else {})
    return httpx.post(f"{cluster.url}/v1/completions", json=body, headers=headers, timeout=300)


def trace_of(collector: Collector, trace: str, spans: int = 6) -> list[CollectedSpan]:
    until(lambda: len(collector.of(trace)) >= spans)
    return collector.of(trace)


def test_a_request_is_one_trace_over_router_prefill_transfer_and_decode(observed: Cluster, collector: Collector) -> None:
    answer = ask(observed, f"00-{ABOVE}-{CLIENT}-01").json()
    found = trace_of(collector, ABOVE)
    assert collector.paths == {"/v1/traces"}
    by_id = {span.id: span for span in found}
    (root,) = [span for span in found if span.parent == CLIENT]
    assert (root.name, root.kind, root.about["service.instance.id"].split("-")[0]) == ("llm_request", 2, "all")
    legs = {span.name: span for span in found if span.parent == root.id}
    assert legs.keys() == {"prefill", "decode", "kv_transfer"}
    served = {by_id[span.parent].name: span for span in found if span.name == "llm_request" and span is not root}
    assert {leg: span.about["service.instance.id"] for leg, span in served.items()} == {"prefill": "prefill-0", "decode": "decode-0"}
    assert len(found) == 6
    for span in found:
        outer = by_id.get(span.parent, root)
        assert outer.start_s - 0.05 <= span.start_s <= span.end_s <= outer.end_s + 0.05, f"{span.name} lies in {outer.name}"
    assert root.attributes["gen_ai.request.id"] == "one-of-mine"
    assert root.attributes["gen_ai.request.temperature"] == 0.5 and root.attributes["gen_ai.request.max_tokens"] == 8
    usage = answer["usage"]
    assert root.attributes["gen_ai.usage.prompt_tokens"] == usage["prompt_tokens"] == 42
    assert root.attributes["gen_ai.usage.completion_tokens"] == usage["completion_tokens"] == 8
    assert served["prefill"].attributes["gen_ai.usage.completion_tokens"] == 1
    assert served["prefill"].attributes["pdlab.role"] == "prefill" and served["decode"].attributes["pdlab.role"] == "decode"
    assert 0 <= root.attributes["gen_ai.latency.time_in_queue"] <= root.attributes["gen_ai.latency.time_to_first_token"]
    assert (
        root.attributes["gen_ai.latency.time_to_first_token"] <= root.attributes["gen_ai.latency.e2e"] <= root.end_s - root.start_s + 0.05
    )
    assert root.attributes["gen_ai.response.finish_reasons"] == ["length"]
    moved = legs["kv_transfer"].attributes
    assert moved["pdlab.kv_bytes"] > 0 and (moved["pdlab.source"], moved["pdlab.destination"]) == ("prefill-0", "decode-0")


def test_a_request_that_is_part_of_nothing_begins_a_trace_and_one_that_is_not_sampled_writes_nothing(
    observed: Cluster, collector: Collector
) -> None:
    before = {span.trace for span in collector.spans}
    unsampled = "1" * 32
    ask(observed, f"00-{unsampled}-{CLIENT}-00").raise_for_status()
    ask(observed, "no traceparent at all").raise_for_status()
    until(lambda: any(span.trace not in before and span.name == "llm_request" and not span.parent for span in list(collector.spans)))
    (new,) = {span.trace for span in collector.spans} - before
    assert {span.name for span in trace_of(collector, new)} == SPANS
    assert not collector.of(unsampled)


def test_a_stream_that_its_client_leaves_ends_its_spans(observed: Cluster, collector: Collector) -> None:
    left = "2" * 32
    body = {"prompt": "left " * 8, "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.stream(
        "POST", f"{observed.url}/v1/completions", json=body, headers={"traceparent": f"00-{left}-{CLIENT}-01"}, timeout=300
    ) as answer:
        next(answer.iter_lines())
    until(lambda: any(span.parent == CLIENT for span in collector.of(left)))
    (root,) = [span for span in collector.of(left) if span.parent == CLIENT]
    assert root.attributes["gen_ai.response.finish_reasons"] == ["abort"] and not root.failed


# ---------------------------------------------------------------- the collector is in trouble


def written(traces: Traces, count: int) -> float:
    """Seconds that it takes to write as many spans."""
    started_s = time.monotonic()
    for _ in range(count):
        traces.request(None).end()
    return time.monotonic() - started_s


def test_a_collector_that_is_away_is_told_of_once_and_again_when_it_is_back(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdlab.real.api.traces.EVERY_S", 0.05)
    with collecting() as collector, caplog.at_level(logging.DEBUG):
        collector.status = 400
        traces = Traces(collector.url, "router")
        for _ in range(3):
            written(traces, 1)
            time.sleep(0.1)
        until(lambda: caplog.messages)
        collector.status = 200
        written(traces, 1)
        until(lambda: collector.spans)
        until(lambda: len(caplog.messages) > 1)
        traces.close()
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 2, said
    assert said[0].startswith(f"traces do not reach {collector.url}/v1/traces, and are dropped until they do: ") and "400" in said[0]
    assert said[1] == f"traces reach {collector.url}/v1/traces again"


@pytest.mark.parametrize("slow", [True, False], ids=["slow", "nobody"])
def test_nothing_waits_for_a_collector(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdlab.real.api.traces.CLOSE_S", 0.3)
    with collecting() as collector:
        collector.slow_s = 2.0

        def closed_s() -> float:
            traces = Traces(collector.url if slow else f"http://127.0.0.1:{free_port()}", "router")
            assert written(traces, 10_000) < 30.0  # more than are kept
            started_s = time.monotonic()
            traces.close()
            return time.monotonic() - started_s

        assert any(closed_s() < 1.5 for _ in range(5))  # on a busy machine not each time
        until(lambda: not [one for one in threading.enumerate() if one.name.startswith(("Otel", "last spans"))])


# ---------------------------------------------------------------- asked for, or not


def test_a_server_that_traces_nothing_loads_nothing_of_it() -> None:
    code = "import sys, pdlab.real.launch.serve, pdlab.cli.serve; assert 'opentelemetry.sdk' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_path_is_the_usual_one_unless_it_is_said() -> None:
    assert url_of("http://c:4318") == url_of("http://c:4318/") == "http://c:4318/v1/traces"
    assert url_of("https://c/otlp/v1/traces") == "https://c/otlp/v1/traces"


@pytest.mark.parametrize("wrong", ["collector:4317", "grpc://c:4317", "http://", "http://c:port", "http://a b"])
def test_what_is_no_url_is_refused_in_a_line(wrong: str) -> None:
    assert "--otlp-endpoint" in otlp_mistake(wrong) and "such as http://127.0.0.1:4318" in otlp_mistake(wrong)
    for hidden in ("grpc://u:secret@c:4317", "u:secret@c", "http://u:secret@c:port"):
        assert "such as http://127.0.0.1:4318" in otlp_mistake(hidden) and "secret" not in otlp_mistake(hidden)
    assert not otlp_mistake("http://[::1]:4318") and not otlp_mistake("https://collector.example/v1/traces")


def test_a_password_is_not_taken_where_every_user_sees_it() -> None:
    assert "OTEL_EXPORTER_OTLP_HEADERS" in otlp_mistake("https://user:secret@c:4318")
    assert "secret" not in otlp_mistake("https://user:secret@c:4318")
