"""Online requests before offline ones: one half of the policy `ooco`, on its relaxed instances. Source: xLLM's OOCO (arXiv 2511.21862).

A step is all online or all offline. While an online prompt waits, no offline prompt is computed, and where no online sequence decodes, the
offline ones stand still. An online prompt that finds no blocks, or no place, takes them from the latest offline sequence, which is
computed anew later.

The original interrupts an offline step between two layers. Here it ends first, and has at most `offline_tokens` of prompts, so that an
online prompt waits that long at most. An instance of pdlab decodes all its sequences or none: where online ones decode, too (not on
the policy's own prefill instances), offline ones decode with them, and offline prompts get `beside_tokens` a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pdlab.core.policy import Range
from pdlab.core.scheduler import Scheduler
from pdlab.core.sequence import Sequence


@dataclass(frozen=True, slots=True)
class OnlineFirst:
    offline_tokens: Annotated[int, Range(ge=1)] = 2048
    beside_tokens: Annotated[int, Range(ge=1)] = 256

    def form(self, scheduler: Scheduler, now: float) -> tuple[list[tuple[Sequence, int]], bool]:
        decodes = any(not seq.offline for seq in scheduler.running.values())
        chunks = self._online(scheduler, scheduler.max_batch_tokens - (len(scheduler.running) if decodes else 0))
        if chunks:
            return chunks, decodes
        most = min(self.beside_tokens if decodes else self.offline_tokens, scheduler.max_batch_tokens - len(scheduler.running))
        return self._offline(scheduler, most), True

    def _online(self, scheduler: Scheduler, budget_tokens: int) -> list[tuple[Sequence, int]]:
        """Those under way first, then in order, up to the first for which there is no place even without offline ones."""
        chunks = []
        for seq in [seq for seq in scheduler.prefilling if not seq.offline]:
            tokens = min(budget_tokens, seq.prompt_tokens - seq.computed)
            if tokens > 0:
                chunks.append((seq, tokens))
                budget_tokens -= tokens
        waiting = [seq for seq in scheduler.waiting if not seq.offline]
        if any(not victim.offline for victim in scheduler.victims):
            return chunks
        for seq in waiting:
            tokens = min(budget_tokens, seq.prompt_tokens - scheduler.cached(seq))
            if tokens <= 0 or not self._admits(scheduler, seq, tokens):
                break
            chunks.append((seq, tokens))
            budget_tokens -= tokens
        return chunks

    def _admits(self, scheduler: Scheduler, seq: Sequence, tokens: int) -> bool:
        """Offline ones give their places up for it, the latest first."""
        while scheduler.room <= 0 or not scheduler.admit_one(seq, tokens):
            victim = max((one for one in (*scheduler.running.values(), *scheduler.prefilling) if one.offline), key=_order, default=None)
            if victim is None:
                return False
            scheduler.preempt(victim)
        return True

    def _offline(self, scheduler: Scheduler, budget_tokens: int) -> list[tuple[Sequence, int]]:
        """No online prompt can be computed now. One that waits, or is under way, gets the place that comes free."""
        if any(not seq.offline for seq in (*scheduler.prefilling, *scheduler.waiting)):
            return []
        return scheduler.admit(budget_tokens, chunked=True)


def _order(seq: Sequence) -> int:
    return seq.order
