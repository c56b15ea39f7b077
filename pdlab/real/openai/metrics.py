"""Prometheus figures under vLLM's names, so that its dashboards and routers read pdlab too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from pdlab.real.engine.messages import Ready, Step

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
LABELS = ("model_name", "engine")


class Metrics:
    """`load` gives the engine's last step, whose gauges and counters are read when somebody scrapes."""

    def __init__(self, model: str, ready: Ready, load: Callable[[], Step]) -> None:
        self.registry = registry = CollectorRegistry()
        self.labels = labels = {"model_name": model, "engine": "0"}

        def gauge(name: str, help: str, value: Callable[[], float]) -> None:
            Gauge(f"vllm:{name}", help, LABELS, registry=registry).labels(**labels).set_function(value)

        def histogram(name: str, help: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"vllm:{name}", help, LABELS, registry=registry, buckets=buckets).labels(**labels)

        gauge("num_requests_running", "Sequences that decode.", lambda: load().running)
        gauge("num_requests_waiting", "Sequences whose prompt is not computed yet.", lambda: load().waiting)
        gauge("kv_cache_usage_perc", "Fraction of KV blocks referenced, 0 to 1.", lambda: load().used_blocks / ready.kv_blocks)
        Gauge("pdlab:leaked_blocks", "KV blocks held though no request is here.", LABELS, registry=registry).labels(**labels).set_function(
            lambda: load().leaked_blocks
        )
        geometry = {"block_size": str(ready.block_tokens), "num_gpu_blocks": str(ready.kv_blocks), "cache_dtype": ready.dtype}
        Gauge("vllm:cache_config_info", "KV geometry.", [*LABELS, *geometry], registry=registry).labels(**labels, **geometry).set(1)
        registry.register(_Counters(labels, load))
        self._generated = self._counter("vllm:generation_tokens", "Tokens sent to clients.").labels(**labels)
        self._ended = self._counter("vllm:request_success", "Requests that ended, by how.", "finished_reason")
        self._rejected = self._counter("pdlab:http_requests_rejected", "Requests refused before they reached the engine.", "code")
        self._first = histogram("time_to_first_token_seconds", "Arrival to first token.", SECONDS)
        self._gap = histogram("inter_token_latency_seconds", "Between tokens.", GAPS)
        self._per_token = histogram("request_time_per_output_token_seconds", "Mean of a request, after its first token.", GAPS)
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to end.", SECONDS)
        self._queue = histogram("request_queue_time_seconds", "Until its computation began.", SECONDS)
        self._prefill = histogram("request_prefill_time_seconds", "From there to the first token.", SECONDS)
        self._decode = histogram("request_decode_time_seconds", "First token to last.", SECONDS)
        self._inference = histogram("request_inference_time_seconds", "Computation's begin to end.", SECONDS)

    def _counter(self, name: str, help: str, *more: str) -> Counter:
        return Counter(name, help, [*LABELS, *more], registry=self.registry)

    def first_token(self, seconds: float, queue_s: float) -> None:
        """`seconds` after its arrival; `queue_s` of these before its computation began."""
        self._first.observe(seconds)
        self._queue.observe(queue_s)
        self._prefill.observe(max(seconds - queue_s, 0.0))

    def token_gap(self, seconds: float, tokens: int) -> None:
        for _ in range(tokens):
            self._gap.observe(seconds)

    def ended(self, reason: str, completion_tokens: int) -> None:
        """A request is over; `reason` is stop, length, abort or error."""
        self._generated.inc(completion_tokens)
        self._ended.labels(**self.labels, finished_reason=reason).inc()

    def completed(self, elapsed_s: float, first_s: float, queue_s: float, tokens: int) -> None:
        """It ran to its end in `elapsed_s`; its first choice made `tokens`, the first of them after `first_s`."""
        self._e2e.observe(elapsed_s)
        self._decode.observe(elapsed_s - first_s)
        self._inference.observe(max(elapsed_s - queue_s, 0.0))
        if tokens > 1:
            self._per_token.observe((elapsed_s - first_s) / (tokens - 1))

    def rejected(self, status: int) -> None:
        self._rejected.labels(**self.labels, code=str(status)).inc()

    def exposition(self) -> bytes:
        """The text that a Prometheus server reads."""
        return generate_latest(self.registry)


class _Counters(Collector):
    """What the engine itself counts."""

    def __init__(self, labels: dict[str, str], load: Callable[[], Step]) -> None:
        self.labels, self.load = labels, load

    def collect(self) -> Iterable[Metric]:
        step = self.load()
        for name, help, value in (
            ("prompt_tokens", "Prompt tokens computed.", step.prompt_tokens),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", step.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found there.", step.prefix_hits),
            ("num_preemptions", "Sequences preempted.", step.preemptions),
        ):
            family = CounterMetricFamily(f"vllm:{name}", help, labels=list(self.labels))
            family.add_metric(list(self.labels.values()), value)
            yield family
