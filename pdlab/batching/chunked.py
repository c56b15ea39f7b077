"""Every running sequence decodes in every step, and prompt chunks fill what is left of the token budget. Source: Sarathi-Serve."""

from __future__ import annotations

from dataclasses import dataclass

from pdlab.core.scheduler import Scheduler
from pdlab.core.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunked:
    def form(self, scheduler: Scheduler, now: float) -> tuple[list[tuple[Sequence, int]], bool]:
        return scheduler.admit(scheduler.max_batch_tokens - len(scheduler.running), chunked=True), True
