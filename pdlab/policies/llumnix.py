"""Llumnix with prefill and decode apart: requests are dispatched to prefill instances only, handed over after the first step, and then
moved between decode instances by freeness (see `freeness`, whose parameters these are).

Dispatch: the prefill instance with the smallest part of its KV blocks used or waited for; on mixed instances, the freest. Hand-off: the
freest decode instance. When taking the request would leave even that one fewer steps than the threshold and the prefill instance
is better off, the request goes on decoding where it was prefilled, and is moved as soon as a decode instance has room. Switch that
off with `stay_on_prefill: false`. Source: Llumnix v1.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdlab.core.policy import Reject
from pdlab.core.types import Request, Role
from pdlab.core.view import Cluster, Instance
from pdlab.policies.freeness import Freeness, steps


@dataclass
class Llumnix(Freeness):
    stay_on_prefill: bool = True

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | Reject | None:
        only_prefill = [x for x in cluster.prefill if x.role is Role.PREFILL]
        return min(only_prefill, key=lambda x: (blocks_ratio(x), x.index)) if only_prefill else super().dispatch(request, cluster)

    def handoff(self, request: Request, cluster: Cluster) -> Instance | None:
        best = super().handoff(request, cluster)
        live = cluster.live.get(request.id)
        if best is None or live is None or live.prefill is None or not self.stay_on_prefill:
            return best
        there, here = self._steps_after(best, request), self._steps_after(live.prefill, request)
        return live.prefill if there < self.migrate_out_threshold <= here else best

    def must_leave(self, x: Instance) -> bool:
        return x.role is Role.PREFILL or super().must_leave(x)

    def _steps_after(self, x: Instance, request: Request) -> float:
        free, requests = self.room(x, request)
        return steps(free - request.prompt_tokens / x.spec.block_tokens, requests + 1)


def blocks_ratio(x: Instance) -> float:
    """Of an instance's KV blocks, the part used, waited for, or sent there since its report."""
    tokens = (x.report.used_blocks + x.report.waiting_blocks) * x.spec.block_tokens + x.since_prefill_tokens
    return tokens / x.kv_tokens
