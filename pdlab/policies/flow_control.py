"""A door before any dispatch: how full the cluster is decides who may pass, who waits, in what order, and who is turned away. Source: the
flow control of llm-d and of the Gateway API inference extension (the rules); `of` is the policy that then chooses the instance.

    saturation = the larger of: mean over prefill instances of prompts there / `queue_depth`
                                mean over decode instances of KV memory in use / `kv_share`           each at most 1

Requests are in `bands`, N of them: offline ones in the last, i = N - 1, priority 0 in the one before it, each priority more one further up.
Band i passes while saturation < 1 - i x saturation / (N - 1).

An offline request is turned away as it comes with probability min(300 x saturation^5, 1).

Those who wait go by band; within one the tenant comes first that has had the least service, prompt and output tokens with a half-life of
`half_life_s`; within a tenant whose TTFT is due first. A waiting request whose objective is over by `patience` times itself is turned away.

When saturation is 1 and somebody of a higher band waits, offline requests that run are given up, the latest first, one for each who waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pdlab.core.policy import Borrow, Policy, Range, Reject
from pdlab.core.types import Event, Finished, Request, UsageError
from pdlab.core.view import Cluster, Instance
from pdlab.policies import load

SHED_FACTOR, SHED_POWER = 300.0, 5


@dataclass
class FlowControl(Policy):
    of: str = "prefix_aware"
    bands: Annotated[int, Range(ge=2, le=64)] = 3
    queue_depth: Annotated[float, Range(gt=0.0, tuned=(1.0, 32.0), log=True)] = 5.0
    kv_share: Annotated[float, Range(gt=0.0, le=1.0, tuned=(0.5, 1.0))] = 0.8
    half_life_s: Annotated[float, Range(gt=0.0, tuned=(5.0, 600.0), log=True)] = 60.0
    patience: Annotated[float, Range(ge=0.0)] = 0.0
    tick_s: Annotated[float, Range(gt=0.0, tuned=(0.05, 2.0), log=True)] | None = 0.2

    queues = True

    def __post_init__(self) -> None:
        if self.of == "flow_control":
            raise UsageError("policy flow_control stands before another policy: give that one as `of`")
        self.inner = load.build(self.of, Path())
        self.pairs = self.inner.pairs
        self.rests = type(self.inner).observe is Policy.observe or self.inner.rests
        self._service: dict[str, tuple[float, float]] = {}  # by tenant: tokens, as of when
        self._passed: dict[int, str] = {}  # requests that were let in, and whose they are
        self._met: set[int] = set()  # those that were not turned away as they came

    # ------------------------------------------------------------ who passes

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | Borrow | Reject | None:
        saturation, band = self.saturation(cluster), self.band(request)
        sheds = band == self.bands - 1 and request.id not in self._met
        if sheds and cluster.rng.random() < min(SHED_FACTOR * saturation**SHED_POWER, 1.0):
            return Reject(f"saturation {saturation:.2f}: offline requests are turned away")
        self._met.add(request.id)
        if self.overdue(request, cluster):
            self._met.discard(request.id)
            return Reject("its TTFT objective passed long ago")
        if saturation >= self.ceiling(band, saturation):
            return None
        choice = self.inner.dispatch(request, cluster)
        if isinstance(choice, Instance | Borrow):
            self._passed[request.id] = request.tenant
            self._serve(request.tenant, request.prompt_tokens, cluster.now)
        return choice

    def saturation(self, cluster: Cluster) -> float:
        queues = [min(1.0, x.prefill_requests / self.queue_depth) for x in cluster.prefill]
        memory = [min(1.0, max(0.0, x.used_tokens) / x.kv_tokens / self.kv_share) for x in cluster.decode]
        return max((sum(each) / len(each) for each in (queues, memory) if each), default=0.0)

    def band(self, request: Request) -> int:
        return self.bands - 1 if request.offline else max(0, min(self.bands - 2, self.bands - 2 - request.priority))

    def ceiling(self, band: int, saturation: float) -> float:
        return 1.0 - band * saturation / (self.bands - 1)

    def overdue(self, request: Request, cluster: Cluster) -> bool:
        target_s = cluster.ttft_slo_s if request.ttft_slo_s is None else request.ttft_slo_s
        return not request.offline and cluster.now - request.arrival_s > (1.0 + self.patience) * target_s

    # ------------------------------------------------------------ in what order

    def first(self, waiting: Sequence[Request], cluster: Cluster) -> Request:
        return min(waiting, key=lambda r: (self.band(r), self.service(r.tenant, cluster.now), self._due_s(r, cluster), r.id))

    def service(self, tenant: str, now: float) -> float:
        tokens, at_s = self._service.get(tenant, (0.0, now))
        return float(tokens * 2.0 ** ((at_s - now) / self.half_life_s))

    def _serve(self, tenant: str, tokens: int, now: float) -> None:
        self._service[tenant] = self.service(tenant, now) + tokens, now

    def _due_s(self, request: Request, cluster: Cluster) -> float:
        return request.arrival_s + (cluster.ttft_slo_s if request.ttft_slo_s is None else request.ttft_slo_s)

    # ------------------------------------------------------------ who is given up

    def evict(self, cluster: Cluster) -> Sequence[int]:
        if self.saturation(cluster) < 1.0:
            return ()
        waiting = sum(live.prefill is None and live.decode is None and not live.request.offline for live in cluster.live.values())
        running = [id for id, live in cluster.live.items() if live.request.offline and live.decode is not None]
        return sorted(running, reverse=True)[:waiting]

    def observe(self, event: Event, cluster: Cluster) -> None:
        if isinstance(event, Finished) and (tenant := self._passed.get(event.request_id)) is not None:
            self._serve(tenant, event.output_tokens, cluster.now)
        for memory in (self._met, self._passed):
            if len(memory) > 2 * len(cluster.live) + 64:
                for id in [id for id in memory if id not in cluster.live]:
                    memory.discard(id) if isinstance(memory, set) else memory.pop(id)
        self.inner.observe(event, cluster)
