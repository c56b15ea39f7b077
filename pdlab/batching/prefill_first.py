"""Whole prompts before anything else; decodes pause while one can be admitted. Source: Orca, vLLM before chunked prefill."""

from __future__ import annotations

from dataclasses import dataclass

from pdlab.core.scheduler import Scheduler
from pdlab.core.sequence import Sequence


@dataclass(frozen=True, slots=True)
class PrefillFirst:
    def form(self, scheduler: Scheduler, now: float) -> tuple[list[tuple[Sequence, int]], bool]:
        chunks = scheduler.admit(scheduler.max_batch_tokens, chunked=False)
        return chunks, not chunks
