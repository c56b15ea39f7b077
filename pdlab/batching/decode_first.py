"""Decodes before anything else; prompts are computed, whole, only in the gaps when nothing decodes. The lowest TPOT, and the worst TTFT:
a baseline, and right for a decode instance that only now and then computes a prompt."""

from __future__ import annotations

from dataclasses import dataclass

from pdlab.core.scheduler import Scheduler
from pdlab.core.sequence import Sequence


@dataclass(frozen=True, slots=True)
class DecodeFirst:
    def form(self, scheduler: Scheduler, now: float) -> tuple[list[tuple[Sequence, int]], bool]:
        if scheduler.running:
            return [], True
        return scheduler.admit(scheduler.max_batch_tokens, chunked=False), False
