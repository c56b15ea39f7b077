"""FastDeploy's splitwise scheduler: a random one among those whose load is close to the least. Source: FastDeploy.

Load is the outstanding prompt tokens of a prefill instance and the outstanding requests of a decode instance. Close means below the
least load plus a blur, which spreads requests when many schedulers look at the same old figures. Both instances are chosen at
once, and decode reserves first. The loads are the router's ledger: released when the prompt is computed, or the request ended.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdlab.core.policy import Policy
from pdlab.core.types import Request
from pdlab.core.view import Cluster, Instance


def prefill_blur_tokens(prompt_tokens: int) -> float:
    """Half a short prompt, a tenth of a long one (1000 tokens and more), within [100, 500]."""
    return min(500.0, max(100.0, prompt_tokens / 2 if prompt_tokens < 1000 else prompt_tokens / 10))


def decode_blur(instances: int) -> int:
    """In requests."""
    return min(instances, 10)


@dataclass
class FastdeploySplitwise(Policy):
    pairs: bool = True

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | None:
        if not cluster.prefill:
            return None
        limit = min(x.prefill_tokens for x in cluster.prefill) + prefill_blur_tokens(request.prompt_tokens)
        return cluster.rng.choice([x for x in cluster.prefill if x.prefill_tokens < limit])

    def handoff(self, request: Request, cluster: Cluster) -> Instance | None:
        if not cluster.decode:
            return None
        limit = min(x.decode_requests for x in cluster.decode) + decode_blur(len(cluster.decode))
        return cluster.rng.choice([x for x in cluster.decode if x.decode_requests < limit])
