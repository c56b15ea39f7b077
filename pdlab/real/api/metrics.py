"""Prometheus figures under vLLM's names, so that its dashboards and routers read pdlab too. A router's own are `pdlab:router_*` instead.

Recording is adding to plain numbers, since it happens for every token; prometheus_client sees them when somebody scrapes."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from pdlab.real.api.backend import Backend, Routing

VLLM, PDLAB, ROUTER = "vllm:", "pdlab:", "pdlab:router_"
SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
TOKENS = (*(float(step * 10**power) for power in range(6) for step in (1, 2, 5)), 1e6)
CANDIDATES = (1.0, 2.0, 5.0, 10.0, 20.0)
KV_BYTES = tuple(2.0**power for power in range(11, 35, 2))  # of one transfer
KV_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 5.0)
EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"
CAUSES = ("expired", "deadline", "incomplete", "unreachable", "failed")  # why KV did not come
REASONS = ("stop", "length", "abort", "error", "moved")


class Histogram:
    """Counts of values up to each bound, and their sum."""

    def __init__(self, help: str, bounds: Sequence[float]) -> None:
        self.help, self.bounds = help, bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def buckets(self) -> list[tuple[str, float]]:
        found, total = [], 0
        for bound, count in zip([*self.bounds, float("inf")], self.counts, strict=True):
            total += count
            found.append((floatToGoString(bound), float(total)))  # type: ignore[no-untyped-call]
        return found


class EngineMetrics(Collector):
    """What is recorded here, and the engine's own load and counters as they are at the scrape. `place` tells an instance's name and role
    at that time: all of its series bear them."""

    def __init__(self, model: str, engine: Backend) -> None:
        self.engine, self.model = engine, model
        self.place: Callable[[], tuple[str, str]] | None = None
        self.generation_tokens = 0
        self.finished = Counter(dict.fromkeys(REASONS, 0))
        self.refused: Counter[str] = Counter({"429": 0, "503": 0})
        self.histograms = {
            "time_to_first_token_seconds": Histogram("Arrival to first token.", SECONDS),
            "inter_token_latency_seconds": Histogram("Between tokens.", GAPS),
            "request_time_per_output_token_seconds": Histogram("Mean of a request, after its first token.", GAPS),
            "e2e_request_latency_seconds": Histogram("Arrival to end.", SECONDS),
            "request_queue_time_seconds": Histogram("Until its computation began.", SECONDS),
            "request_prefill_time_seconds": Histogram("From there to the first token.", SECONDS),
            "request_decode_time_seconds": Histogram("First token to last.", SECONDS),
            "request_inference_time_seconds": Histogram("Computation's begin to end.", SECONDS),
            "request_prompt_tokens": Histogram("Of a prompt.", TOKENS),
            "request_generation_tokens": Histogram("Made for a candidate.", TOKENS),
            "request_max_num_generation_tokens": Histogram("Of a prompt's candidate that has most.", TOKENS),
            "request_params_n": Histogram("Candidates asked for.", CANDIDATES),
            "request_params_max_tokens": Histogram("Tokens asked for at most.", TOKENS),
        }
        self.transfers = {
            "nixl_bytes_transferred": Histogram("KV that came from another instance, by transfer.", KV_BYTES),
            "nixl_xfer_time_seconds": Histogram("First to last byte of a transfer.", KV_SECONDS),
        }
        self.transfer_failures: Counter[str] = Counter(dict.fromkeys(CAUSES, 0))
        self._gap = self.histograms["inter_token_latency_seconds"]
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def generated(self, tokens: int) -> None:
        self.generation_tokens += tokens

    def token_gap(self, seconds: float, tokens: int) -> None:
        self._gap.observe(seconds, tokens)

    def first_token(self, seconds: float, queue_s: float) -> None:
        """`seconds` after its arrival; `queue_s` of these before its computation began."""
        self.histograms["time_to_first_token_seconds"].observe(seconds)
        self.histograms["request_queue_time_seconds"].observe(queue_s)
        self.histograms["request_prefill_time_seconds"].observe(max(seconds - queue_s, 0.0))

    def ended(self, reason: str) -> None:
        """A prompt's last candidate is over."""
        self.finished[reason] += 1

    def completed(self, elapsed_s: float, first_s: float, queue_s: float, decode_s: float, tokens: int) -> None:
        """A prompt ran to its end in `elapsed_s`; its first candidate made `tokens`, the first of them after `first_s`."""
        self.histograms["e2e_request_latency_seconds"].observe(elapsed_s)
        self.histograms["request_inference_time_seconds"].observe(max(elapsed_s - queue_s, 0.0))
        if tokens:
            self.histograms["request_decode_time_seconds"].observe(elapsed_s - first_s)
        if tokens > 1:
            self.histograms["request_time_per_output_token_seconds"].observe(decode_s / (tokens - 1))

    def asked(self, prompt_tokens: int, made: Sequence[int], max_tokens: int) -> None:
        """A prompt ran to its end: its length, what was made for each candidate, and what might have been."""
        found = self.histograms
        found["request_prompt_tokens"].observe(prompt_tokens)
        for tokens in made:
            found["request_generation_tokens"].observe(tokens)
        found["request_max_num_generation_tokens"].observe(max(made))
        found["request_params_n"].observe(len(made))
        found["request_params_max_tokens"].observe(max_tokens)

    def transferred(self, size: int, seconds: float) -> None:
        """KV has come from another instance."""
        self.transfers["nixl_bytes_transferred"].observe(size)
        self.transfers["nixl_xfer_time_seconds"].observe(seconds)

    def transfer_failed(self, cause: str) -> None:
        self.transfer_failures[cause] += 1

    def rejected(self, status: int) -> None:
        self.refused[str(status)] += 1

    def exposition(self) -> bytes:
        """The text that a Prometheus server reads."""
        return generate_latest(self.registry)

    @property
    def labels(self) -> dict[str, str]:
        """Of every series."""
        if isinstance(self.engine, Routing):
            return {"model_name": self.model}
        base = {"model_name": self.model, "engine": "0"}
        if self.place is None:
            return base
        instance, role = self.place()
        return {**base, "instance": instance, "role": role}

    def collect(self) -> Iterable[Metric]:
        routing = isinstance(self.engine, Routing)
        own, ours = (ROUTER, ROUTER) if routing else (VLLM, PDLAB)
        yield from self.engine.families() if isinstance(self.engine, Routing) else self._engines()
        yield self._counter(f"{own}generation_tokens", "Tokens made for clients.", self.generation_tokens)
        yield self._counters(f"{own}request_success", "Prompts that ended, by how.", "finished_reason", self.finished)
        yield self._counters(f"{ours}http_requests_rejected", "Requests refused before the engine saw them.", "code", self.refused)
        dropped = self.engine.load.log_dropped
        yield self._counter(f"{ours}log_lines_dropped", "Lines of --log or --trace-events that could not be written.", dropped)
        yield from self._histograms(own, self.histograms)

    def _engines(self) -> Iterable[Metric]:
        """What an engine of our own tells."""
        load, ready = self.engine.load, self.engine.ready
        yield self._gauge("vllm:num_requests_running", "Sequences that are computed: a prompt, or token after token.", load.report.running)
        yield self._gauge("vllm:num_requests_waiting", "Sequences in the queue.", load.report.waiting)
        yield self._gauge(
            "vllm:kv_cache_usage_perc", "Fraction of KV blocks referenced, 0 to 1.", load.report.used_blocks / max(ready.kv_blocks, 1)
        )
        yield self._gauge("pdlab:leaked_blocks", "KV blocks held though no request is here.", load.leaked_blocks)
        geometry = {
            "block_size": str(ready.block_tokens),
            "num_gpu_blocks": str(ready.kv_blocks),
            "cache_dtype": ready.kv_dtype or ready.dtype,
        }
        yield self._gauge("vllm:cache_config_info", "KV geometry.", 1, geometry)
        yield self._counter("vllm:prompt_tokens", "Prompt tokens computed.", load.prompt_tokens)
        yield self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", load.prefix_queries)
        yield self._counter("vllm:prefix_cache_hits", "Prompt tokens found there.", load.prefix_hits)
        yield self._counter("vllm:num_preemptions", "Sequences preempted.", load.report.preempted)
        if ready.drafts:
            yield self._counter("vllm:spec_decode_num_drafts", "Drafts verified, of some tokens each.", load.drafts)
            yield self._counter("vllm:spec_decode_num_draft_tokens", "Tokens drafted.", load.drafted_tokens)
            yield self._counter("vllm:spec_decode_num_accepted_tokens", "Of these, those that were right.", sum(load.accepted_tokens))
            by_position = Counter({str(at): count for at, count in enumerate(load.accepted_tokens)})
            name = "vllm:spec_decode_num_accepted_tokens_per_pos"
            yield self._counters(name, "The same, by their place in their draft.", "position", by_position)
        if ready.descriptor:
            yield from self._histograms(VLLM, self.transfers)
            yield self._counter("vllm:nixl_num_failed_transfers", "Transfers of KV to here that failed.", load.failed_transfers)
            yield self._counter("vllm:nixl_num_kv_expired_reqs", "Prompts whose KV nobody read in time.", load.expired_leases)
            yield self._counters("pdlab:transfer_failures", "Transfers of KV to here, by cause.", "cause", self.transfer_failures)
            yield self._gauge("pdlab:leases", "KV that is held for other instances.", load.leases)

    def _histograms(self, prefix: str, histograms: dict[str, Histogram]) -> Iterable[Metric]:
        labels = self.labels
        for name, histogram in histograms.items():
            family = HistogramMetricFamily(f"{prefix}{name}", histogram.help, labels=list(labels))
            family.add_metric(list(labels.values()), histogram.buckets(), histogram.sum)
            yield family

    def _gauge(self, name: str, help: str, value: float, more: dict[str, str] | None = None) -> Metric:
        labels = self.labels | (more or {})
        family = GaugeMetricFamily(name, help, labels=list(labels))
        family.add_metric(list(labels.values()), value)
        return family

    def _counter(self, name: str, help: str, value: float) -> Metric:
        labels = self.labels
        family = CounterMetricFamily(name, help, labels=list(labels))
        family.add_metric(list(labels.values()), value)
        return family

    def _counters(self, name: str, help: str, label: str, values: Counter[str]) -> Metric:
        labels = self.labels
        family = CounterMetricFamily(name, help, labels=[*labels, label])
        for key, value in values.items():
            family.add_metric([*labels.values(), key], value)
        return family
