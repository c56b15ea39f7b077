"""A cluster as an `Engine`, so that the OpenAI front serves it as it serves a single one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import msgspec
from prometheus_client.core import Metric

from pdlab.core.types import InstanceSpec, Report
from pdlab.real.engine.messages import FromQueue, Ready, Step, Submit, Tokens
from pdlab.real.router import metrics
from pdlab.real.router.timelines import KEPT
from pdlab.real.router.world import LiveWorld

MOST_TOKENS = 2**31 - 1  # where nothing bounds a request


class ClusterEngine:
    """`model` is the name that is served, `vocab` its tokenizer's size, `context_tokens` the model's own bound on prompt plus output (0:
    none known), for instances that do not tell theirs. A request that some instance can hold is let in: the router sees to it that it goes
    there.  One for a World."""

    def __init__(self, world: LiveWorld, model: str, vocab: int, *, context_tokens: int = 0) -> None:
        self.world, self.model, self.vocab, self.context_tokens = world, model, vocab, context_tokens
        self.ready: Ready
        self.down: str | None = None
        self._requests: dict[int, int] = {}  # Submit.id -> the world's, and of the last that have ended
        self._members_changed()
        world.on_members = self._members_changed

    def submit(self, submit: Submit, arriving: asyncio.Queue[FromQueue] | None = None) -> asyncio.Queue[FromQueue]:
        """As `Engine.submit`; the last of a candidate that does not succeed is a `pdlab.real.api.backend.Ended`."""
        arriving = asyncio.Queue() if arriving is None else arriving
        put, id = arriving.put_nowait, submit.id

        def deliver(tokens: Tokens) -> None:
            put(msgspec.structs.replace(tokens, id=id))

        requests, live = self._requests, self.world.requests.by_id
        requests[id] = self.world.submit(
            submit.tokens,
            submit.sampling,
            deliver,
            hashes=submit.hashes,
            priority=submit.priority,
            ttft_slo_s=submit.ttft_slo_s,
            tpot_slo_s=submit.tpot_slo_s,
            session=submit.session,
            tenant=submit.tenant,
            offline=submit.offline,
            trace=submit.trace,
        )
        while len(requests) > KEPT and requests[oldest := next(iter(requests))] not in live:
            del requests[oldest]
        return arriving

    def cancel(self, id: int, candidate: int = -1) -> None:
        """Drop a request or one of its candidates (-1: all). Harmless when it has ended. A candidate dropped alone gets no more tokens."""
        request_id = self._requests.get(id)
        if request_id is not None:
            self.world.cancel(request_id, candidate)

    def timeline(self, id: int) -> dict[str, Any] | None:
        """`World.timeline` of a request; None where it ended long ago."""
        return self.world.timeline(self._requests.get(id, -1)) or None

    def families(self) -> Iterable[Metric]:
        """What the router counts, and its instances' gauges."""
        return metrics.families(self.world.tally, self._specs(), self.world.instances.reports, self.model)

    def targets(self) -> list[dict[str, Any]]:
        """Where Prometheus finds the instances."""
        return metrics.targets(self._specs())

    @property
    def foreign(self) -> bool:
        """Only vLLM servers take part."""
        specs = self._specs()
        return bool(specs) and all(spec.engine == "vllm" for spec in specs)

    def _specs(self) -> list[InstanceSpec]:
        """Of the instances that take part."""
        return [member.spec for member in self.world.instances.members.values() if not member.gone]

    def _members_changed(self) -> None:
        """Sum up the instances."""
        world = self.world
        specs = self._specs()
        most = [min(spec.kv_most_tokens, spec.context_tokens or self.context_tokens or MOST_TOKENS) for spec in specs]
        self.ready = Ready(
            self.model,
            int(max(most, default=self.context_tokens or MOST_TOKENS)),
            self.vocab,
            world.router.cluster.hash_tokens,
            sum(spec.kv_blocks for spec in specs),
            "cluster",
            "",
        )
        self.down = world.down or (None if world.router.accepts else "no instance is ready")

    @property
    def load(self) -> Step:
        """The sum of what the instances have reported last, as far as they know."""
        reports, log = self.world.instances.reports.values(), self.world.teller.log
        names = ("waiting", "waiting_tokens", "running", "context_tokens", "used_blocks", "free_blocks", "preempted")
        told = {name: sum(max(0, getattr(report, name)) for report in reports) for name in names}
        load = Report("", taken_s=self.world.now(), **told)
        return Step([], load, log_dropped=log.dropped if log is not None else 0)
