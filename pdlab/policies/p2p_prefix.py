"""Prompts go to the least loaded instance, and the prefix comes to them: it is read from whoever holds it where the link is quicker than
computing. Source: the KV stores of Mooncake and LMCache (the idea); no store here, only what instances have cached.

Of those that hold `min_tokens` more of the prompt than the chosen instance does, the one that saves the most: the seconds in which the
chosen one would compute these tokens, after those before them, less the seconds that their bytes take. While a link's speed is not known,
it is tried. Where nothing is saved, and where the two do not reach each other, it is computed.

What `prefix_aware` does by sending the prompt to its prefix, this does by sending the prefix to the prompt: no hot instance, for bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pdlab.core.policy import Borrow, Policy, Range, prefill_tokens
from pdlab.core.types import Request, StepTime
from pdlab.core.view import Cluster, Instance


@dataclass
class P2pPrefix(Policy):
    min_tokens: Annotated[int, Range(ge=1, tuned=(16, 4096), log=True)] = 256

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | Borrow | None:
        chosen = cluster.prefill.least(prefill_tokens)
        if chosen is None:
            return None
        cached = cluster.cached_tokens(request)
        own = cached.get(chosen, 0)
        saved_s = {
            x: saving_s(chosen, x, request.prompt_tokens, own, tokens, cluster)
            for x, tokens in cached.items()
            if tokens - own >= self.min_tokens and cluster.can_fetch(x, chosen)
        }
        holder = max(saved_s, key=lambda x: (round(saved_s[x], 6), -x.index), default=None)  # rates differ in their last bits
        return Borrow(chosen, holder) if holder is not None and saved_s[holder] > 0.0 else chosen


def saving_s(chosen: Instance, holder: Instance, prompt: int, own: int, tokens: int, cluster: Cluster) -> float:
    """By reading the prompt's first `tokens` from `holder`, when `chosen` has `own` of them."""
    predictor = chosen.prefill_predictor
    if not predictor.known:
        return 0.0
    computed_s = [predictor.step_s(StepTime(0, 0, prompt - n, prompt * prompt - n * n, 0.0)) for n in (own, tokens)]
    blocks = -(-(tokens - own) // chosen.spec.block_tokens)
    return computed_s[0] - computed_s[1] - cluster.links.transfer_s(holder, chosen, blocks * chosen.spec.block_bytes)
