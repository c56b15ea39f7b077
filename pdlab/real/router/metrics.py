"""What a router counts of its own work, and what it knows of its instances, for Prometheus.

Its own series are `pdlab:router_*`, so that a sum over router and instances counts nothing twice. Gauges of its instances keep vLLM's
names, and bear the instance's name and role, as the instance's own do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from pdlab.core.types import Action, AnyEvent, Dispatch, Handoff, InstanceSpec, Joined, Refused, Report, Role, Switched
from pdlab.real.api.metrics import CAUSES, KV_BYTES, KV_SECONDS, ROUTER, Histogram

HANDOFF, MIGRATION, PREFIX = KINDS = "handoff", "migration", "prefix"  # of transfers
ENDS = ("done", "aborted", "expired", "rejected", "failed")
Labels = Mapping[str, str]


class Tally:
    """Sums since the start. `heard` is told every event and its actions: some a request, none a token."""

    def __init__(self) -> None:
        self.dispatches: Counter[str] = Counter()  # by instance, as the next two
        self.handoffs: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.switches: Counter[str] = Counter()  # by the role that was taken
        self.retries = self.migrations = 0
        self.prompt_tokens = self.cached_tokens = 0
        self.ends: Counter[str] = Counter(dict.fromkeys(ENDS, 0))
        known = [(kind, cause) for kind in (HANDOFF, MIGRATION) for cause in CAUSES]
        self.failures = Counter(dict.fromkeys([*known, (HANDOFF, "full"), (HANDOFF, "instance_gone")], 0))  # of transfers
        self.bytes = {kind: Histogram("KV that came to an instance, by transfer.", KV_BYTES) for kind in KINDS}
        self.seconds = {kind: Histogram("First to last byte of a transfer.", KV_SECONDS) for kind in KINDS}
        self._roles: dict[str, Role] = {}
        self._by_class: dict[type, Callable[[Any], None]] = {
            Joined: self._joined,
            Switched: self._switched,
            Refused: self._refused,
            Dispatch: self._dispatch,
            Handoff: self._handoff,
        }

    def heard(self, event: AnyEvent, actions: Iterable[Action]) -> None:
        for said in (event, *actions):
            if (count := self._by_class.get(said.__class__)) is not None:
                count(said)

    def prefilled(self, prompt_tokens: int, cached_tokens: int) -> None:
        """A prompt of that length is computed, but for what was cached."""
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += min(cached_tokens, prompt_tokens)

    def transferred(self, kind: str, size: int, seconds: float) -> None:
        self.bytes[kind].observe(size)
        self.seconds[kind].observe(seconds)

    def transfer_failed(self, kind: str, cause: str) -> None:
        self.failures[kind, cause] += 1

    def _joined(self, event: Joined) -> None:
        self._roles[event.spec.name] = event.spec.role

    def _switched(self, event: Switched) -> None:
        """One that could not switch says its old role."""
        if self._roles.get(event.instance, event.role) is not event.role:
            self.switches[str(event.role)] += 1
        self._roles[event.instance] = event.role

    def _refused(self, event: Refused) -> None:
        self.refusals[event.instance] += 1

    def _dispatch(self, action: Dispatch) -> None:
        self.dispatches[action.instance] += 1
        if action.decode is not None:
            self.handoffs[action.decode] += action.decode != action.instance
        self.retries += action.attempt > 1

    def _handoff(self, action: Handoff) -> None:
        self.handoffs[action.dst] += action.dst != action.src

    def roles(self) -> dict[str, Role]:
        """Of all that ever joined, the last."""
        return dict(self._roles)


def families(tally: Tally, members: Sequence[InstanceSpec], reports: Mapping[str, Report], model: str) -> Iterable[Metric]:
    """All but what every OpenAI front counts. `members` take part, `reports` are their last by name."""
    base = {"model_name": model}
    yield from _gauges(members, reports, model)
    yield _instances(members, base)
    roles = tally.roles()
    whose = {name: {"instance": name, "role": str(role)} for name, role in roles.items()}
    for name, help, counts in (
        ("dispatches", "Prompts sent to an instance, every attempt.", tally.dispatches),
        ("handoffs", "Prompts whose KV was to go to an instance.", tally.handoffs),
        ("refusals", "Requests for which a decode instance had no room to reserve.", tally.refusals),
    ):
        yield _counter(name, help, base, [(whose[one], counts[one]) for one in whose])
    yield _counter("retries", "Attempts after the first.", base, [({}, tally.retries)])
    yield _counter("migrations", "Running requests that went on elsewhere.", base, [({}, tally.migrations)])
    yield _counter(
        "role_switches", "By the role that was taken.", base, [({"role": role}, tally.switches[role]) for role in map(str, Role)]
    )
    yield _counter("requests_ended", "By how.", base, [({"stage": stage}, count) for stage, count in tally.ends.items()])
    causes = [({"kind": kind, "cause": cause}, count) for (kind, cause), count in tally.failures.items()]
    yield _counter("transfer_failures", "Transfers of KV that came to nothing, by cause.", base, causes)
    yield _counter("prompt_tokens", "Prompt tokens computed for clients.", base, [({}, tally.prompt_tokens - tally.cached_tokens)])
    yield _counter("prefix_cache_queries", "Prompt tokens looked up in prefix caches.", base, [({}, tally.prompt_tokens)])
    yield _counter("prefix_cache_hits", "Prompt tokens found there.", base, [({}, tally.cached_tokens)])
    for name, histograms in (("transfer_bytes", tally.bytes), ("transfer_seconds", tally.seconds)):
        family = HistogramMetricFamily(f"{ROUTER}{name}", next(iter(histograms.values())).help, labels=[*base, "kind"])
        for kind, histogram in histograms.items():
            family.add_metric([*base.values(), kind], histogram.buckets(), histogram.sum)
        yield family


def targets(members: Iterable[InstanceSpec]) -> list[dict[str, Any]]:
    """Where Prometheus finds the instances, as its http_sd_configs wants it."""
    found = []
    for spec in sorted(members, key=lambda spec: spec.name):
        url = urlsplit(spec.url)
        if url.netloc:
            labels = {"instance": spec.name, "role": str(spec.role), "__scheme__": url.scheme}
            found.append({"targets": [url.netloc.rpartition("@")[2]], "labels": labels})
    return found


def _gauges(members: Iterable[InstanceSpec], reports: Mapping[str, Report], model: str) -> Iterable[Metric]:
    """As the instances have said last."""
    labels = ("model_name", "engine", "instance", "role")
    running = GaugeMetricFamily("vllm:num_requests_running", "Sequences that are computed: a prompt, or token after token.", labels=labels)
    waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Sequences in the queue.", labels=labels)
    usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Fraction of KV blocks referenced, 0 to 1.", labels=labels)
    geometry = GaugeMetricFamily("vllm:cache_config_info", "KV geometry.", labels=(*labels, "block_size", "num_gpu_blocks"))
    for spec in members:
        own = [model, "0", spec.name, str(spec.role)]
        report = reports.get(spec.name)
        running.add_metric(own, report.running if report is not None else 0)
        waiting.add_metric(own, report.waiting if report is not None else 0)
        usage.add_metric(own, report.used_blocks / max(spec.kv_blocks, 1) if report is not None else 0.0)
        geometry.add_metric([*own, str(spec.block_tokens), str(spec.kv_blocks)], 1)
    return running, waiting, usage, geometry


def _instances(members: Iterable[InstanceSpec], base: Labels) -> Metric:
    family = GaugeMetricFamily(f"{ROUTER}instances", "Instances that take part, by role.", labels=[*base, "role", "draining"])
    there = Counter((str(spec.role), str(spec.draining).lower()) for spec in members)
    for role in map(str, Role):
        for draining in ("false", "true"):
            family.add_metric([*base.values(), role, draining], there[role, draining])
    return family


def _counter(name: str, help: str, base: Labels, values: list[tuple[dict[str, str], int]]) -> Metric:
    own = list(values[0][0]) if values else []
    family = CounterMetricFamily(f"{ROUTER}{name}", help, labels=[*base, *own])
    for labels, value in values:
        family.add_metric([*base.values(), *labels.values()], value)
    return family
