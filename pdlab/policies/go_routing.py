"""Prefill where most objectives are met, and among equals where it is fullest, so that some instance stays free for what is urgent.
Source: xLLM's ProServe (GoRouting).

T is how long an instance takes for all prompts that wait there, and the gain of placing a request the weight of those that meet their
TTFT objective with it, less the weight of those that do without: whose 0.9 x slack exceeds T. A request weighs 2 to the power of its
priority.

Candidates are those whose gain is at least 0.9 of the best. With a best gain above 0, the least loaded of them where its T is below 0.1
of the objective; else the fullest of those that end up at 0.8 of it or less. In all other cases the least loaded takes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pdlab.core.policy import Policy, Range, Reject
from pdlab.core.types import Request
from pdlab.core.view import Cluster, Instance
from pdlab.policies.prefix_aware import NOMINAL_S_PER_TOKEN

Waiting = list[tuple[float, float, float]]  # (seconds, slack in seconds, weight) of each prompt


@dataclass
class GoRouting(Policy):
    safety: Annotated[float, Range(gt=0.0, le=1.0, tuned=(0.5, 1.0))] = 0.9
    near_best: Annotated[float, Range(gt=0.0, le=1.0, tuned=(0.5, 1.0))] = 0.9
    idle_share: Annotated[float, Range(ge=0.0, le=1.0)] = 0.1
    full_share: Annotated[float, Range(ge=0.0, tuned=(0.2, 1.0))] = 0.8

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | Reject | None:
        if len(cluster.prefill) < 2:
            return cluster.prefill[0] if cluster.prefill else None
        hits, target_s = cluster.cached_tokens(request), objective_s(request, cluster)
        queues = waiting(cluster)
        before_s, after_s, gain = {}, {}, {}
        for x in cluster.prefill:
            queue = queues.get(x, [])
            new = (work_s(x, request.prompt_tokens - hits.get(x, 0)), target_s - (cluster.now - request.arrival_s), weight(request))
            before_s[x] = sum([seconds for seconds, _, _ in queue])
            after_s[x] = before_s[x] + new[0]
            gain[x] = self._worth([*queue, new], after_s[x]) - self._worth(queue, before_s[x])
        best = max(gain.values())
        least = min(cluster.prefill, key=lambda x: (before_s[x], x.index))
        if best <= 0.0:
            return least
        candidates = [x for x in cluster.prefill if gain[x] >= self.near_best * best]
        least = min(candidates, key=lambda x: (before_s[x], x.index))
        if before_s[least] < self.idle_share * target_s:
            return least
        return max((x for x in candidates if after_s[x] <= self.full_share * target_s), key=lambda x: (after_s[x], -x.index), default=least)

    def _worth(self, queue: Sequence[tuple[float, float, float]], total_s: float) -> float:
        """The weight of those whose objective is met."""
        return sum([value for _, slack_s, value in queue if self.safety * slack_s > total_s])


def waiting(cluster: Cluster) -> dict[Instance, Waiting]:
    """What waits to be computed on each instance, by the router's ledger."""
    found: dict[Instance, Waiting] = {}
    for live in cluster.live.values():
        x, request = live.prefill, live.request
        if x is not None and live.prefill_tokens >= 0:
            slack_s = request.arrival_s + objective_s(request, cluster) - cluster.now
            found.setdefault(x, []).append((work_s(x, live.prefill_tokens), slack_s, weight(request)))
    return found


def work_s(x: Instance, tokens: int) -> float:
    return x.ttft_s(tokens) or tokens * NOMINAL_S_PER_TOKEN


def objective_s(request: Request, cluster: Cluster) -> float:
    """Of its first token."""
    return cluster.ttft_slo_s if request.ttft_slo_s is None else request.ttft_slo_s


def weight(request: Request) -> float:
    return float(2.0 ** min(max(request.priority, -60), 60))
