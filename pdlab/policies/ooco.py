"""Online and offline requests on the same instances: those that prefill are relaxed, those that decode strict. Source: OOCO (xLLM).

Online requests go through as ever: prefilled on the instance with the least online work, decoded on the one with the shortest step. Decode
instances are strict: they take no offline request that would make a step longer than `stop_share` x TPOT. With `online_waits` that goes for
online ones, too, as in the original: they wait on their prefill instances, unless a decode instance is empty.

Offline requests are prefilled, and decode, on prefill instances, while fewer than b* are there; those above wait for their turn, behind
all online ones. Instances batch by `online_first`, so that online prompts need not wait for offline work.

b* is the batch from which reading the weights takes no longer than computing. Of a linear layer that is the smallest
with FLOPs/byte >= F/BW, and of a model the largest of these; of an instance only times are known, so it is the constant part of a decode
step over the time of a prompt's token.

Every `tick_s` each strict instance, in turn, may pull one offline request that decodes elsewhere: if its KV is used below `pull_share`,
and its steps took less than that share of TPOT. It prefers the length l*: the largest l with t(batch + k requests, context + k l) <= TPOT,
where k = max(b* - batch, 1), and l <= free/k. It takes none that it could not have one of.

`as_found`: the original compares predicted seconds with an objective in milliseconds, so that nothing is ever too slow.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Annotated

from pdlab.core.policy import Policy, Range
from pdlab.core.types import Request, Role, Stage
from pdlab.core.view import Cluster, Instance, LiveRequest


@dataclass
class Ooco(Policy):
    tick_s: Annotated[float, Range(gt=0.0, tuned=(0.02, 2.0), log=True)] | None = 0.1
    queues: bool = True
    stop_share: Annotated[float, Range(gt=0.0, tuned=(0.7, 1.0))] = 0.98
    pull_share: Annotated[float, Range(gt=0.0, le=1.0, tuned=(0.5, 1.0))] = 0.9
    online_waits: bool = False
    b_star: Annotated[int, Range(ge=1)] | None = None  # instead of what profiles say
    as_found: bool = False

    def __post_init__(self) -> None:
        self._online: dict[Instance, dict[int, int]] = {}  # prompt tokens by request
        self._chosen: tuple[int, Instance] | None = None  # the last dispatch, as `pairs` asks for both at once
        self._turn = 0

    # ------------------------------------------------------------ placing

    def first(self, waiting: Sequence[Request], cluster: Cluster) -> Request:
        return min(waiting, key=lambda request: request.offline)

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | None:
        if request.offline:
            free = [x for x in cluster.prefill if x.prefill_requests + x.decode_requests < self.critical_batch(x)]
            chosen = min(free, key=lambda x: (x.prefill_requests + x.decode_requests, x.index), default=None)
        else:
            chosen = min(cluster.prefill, key=lambda x: (self._online_tokens(x, cluster), x.prefill_tokens, x.index), default=None)
        if chosen is not None:
            self._chosen = (request.id, chosen)
            if not request.offline:
                self._online.setdefault(chosen, {})[request.id] = request.prompt_tokens
        return chosen

    def handoff(self, request: Request, cluster: Cluster) -> Instance | None:
        if request.offline and (here := self._prefilled_on(request, cluster)) is not None:
            return here
        step_s = {x: self.step_s(x, 1, request.prompt_tokens) for x in cluster.decode}
        limit_s = self.stop_share * self._unit
        waits = self.online_waits or request.offline
        meet = [x for x in step_s if not waits or not x.decode_requests or step_s[x] <= limit_s * self.target_s(x, cluster, request)]
        return min(meet, key=lambda x: (step_s[x], x.decode_tokens, x.index), default=None)

    def _prefilled_on(self, request: Request, cluster: Cluster) -> Instance | None:
        live = cluster.live.get(request.id)
        if live is None:
            return None
        here = live.prefill
        if here is None and self._chosen is not None and self._chosen[0] == request.id:
            here = self._chosen[1]
        return here if here is not None and cluster.capacity.can_decode(live, here) else None

    def _online_tokens(self, x: Instance, cluster: Cluster) -> int:
        """Of online prompts sent there and not computed."""
        sent = self._online.get(x)
        if not sent:
            return 0
        for id in list(sent):
            live = cluster.live.get(id)
            if live is None or live.prefill is not x or live.prefill_tokens < 0:
                del sent[id]
        return sum(sent.values())

    # ------------------------------------------------------------ pulling

    def migrate(self, cluster: Cluster) -> Sequence[tuple[int, Instance]]:
        strict = [x for x in cluster.decode if x.role is Role.DECODE]
        taken: dict[int, Instance] = {}
        coming = {target for _, target, _ in cluster.links.moving.values()}
        self._turn += 1
        for place in range(len(strict)):
            x = strict[(place + self._turn) % len(strict)]
            if x in coming or not self._pulls(x, cluster):
                continue
            l_star, most = self.lengths(x, cluster)
            lengths = {
                live: cluster.context_tokens(live)
                for live in self._offline_elsewhere(cluster)
                if live.request.id not in taken and cluster.can_migrate(live, x)
            }
            fitting = [live for live, tokens in lengths.items() if tokens <= most]
            if fitting:
                live = min(fitting, key=lambda one: (abs(lengths[one] - l_star), one.request.id))
                taken[live.request.id] = x
        return list(taken.items())

    def _pulls(self, x: Instance, cluster: Cluster) -> bool:
        return x.used_tokens < self.pull_share * x.kv_tokens and x.decode_step_s < self.pull_share * self.target_s(x, cluster)

    def _offline_elsewhere(self, cluster: Cluster) -> list[LiveRequest]:
        """Those that decode on relaxed instances."""
        relaxed = [x for x in cluster.instances if x.role is not Role.DECODE]
        found = [live for x in relaxed for live in x.decoding.values()]
        return [live for live in found if live.request.offline and live.stage is Stage.DECODE and live.migrating is None]

    def lengths(self, x: Instance, cluster: Cluster) -> tuple[int, int]:
        """(l*, the longest of which it can have one)."""
        limit_s, free = self._unit * self.target_s(x, cluster), max(0, x.free_tokens)
        batch = x.decode_requests
        k = max(1, int(min(self.critical_batch(x), batch + free + 1)) - batch)
        l_star = longest(free // k, lambda length: self.step_s(x, k, k * length) <= limit_s)
        return l_star, longest(free, lambda length: self.step_s(x, 1, length) <= self.stop_share * limit_s)

    # ------------------------------------------------------------ what is predicted

    def critical_batch(self, x: Instance) -> float:
        """b*; infinite while nothing of its times is known."""
        if self.b_star is not None:
            return self.b_star
        decode, prefill = x.decode_predictor, x.prefill_predictor
        if not (decode.known and prefill.known) or prefill.b <= 0.0:
            return inf
        return max(1.0, decode.correction.factor * decode.a / (prefill.correction.factor * prefill.b))

    def step_s(self, x: Instance, more: int, tokens: int) -> float:
        """Of a decode step with so many more requests, that hold `tokens` in all. Context: the larger of the ledger's prompts, and what the
        report says and was sent since."""
        context = max(x.decode_tokens, x.report.context_tokens + x.since_decode_tokens)
        return x.tpot_s(x.decode_requests + more, context + tokens)

    def target_s(self, x: Instance, cluster: Cluster, request: Request | None = None) -> float:
        """The tightest TPOT of the online requests that decode there, that one included."""
        online = [live.request for live in x.decoding.values() if not live.request.offline]
        if request is not None:
            online.append(request)
        targets_s = [cluster.tpot_slo_s if one.tpot_slo_s is None else one.tpot_slo_s for one in online]
        return min(targets_s, default=cluster.tpot_slo_s)

    @property
    def _unit(self) -> float:
        return 1000.0 if self.as_found else 1.0


def longest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest length up to `most` that `fits`; 0 where none does."""
    return bisect_left(range(1, most + 1), True, key=lambda length: not fits(length))
