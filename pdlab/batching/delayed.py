"""New prompts are held back while others decode, so that steps of decodes alone, which are quick, come in rows. It costs TTFT.

Until the first of them has waited for `steps` decode steps, or `tokens` of them wait (0: however many). With `polled` the steps are counted
whether any waits or not: an engine that looks for new requests at every `steps`th step only. A step with prompts begins the count anew.
Then `prompts_first` computes them as prefill_first does, else as chunked. Where nothing decodes, nothing is held back.

Sources: TensorRT-LLM's batch_wait_timeout_iters and batch_wait_max_tokens_ratio, and the timeout_iters of its attention_dp_config (polled);
SGLang's --scheduler-recv-interval (polled, prompts_first).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pdlab.core.foresight import Foresight
from pdlab.core.policy import Range
from pdlab.core.scheduler import Scheduler
from pdlab.core.sequence import Sequence
from pdlab.core.types import StepTime


@dataclass
class Delayed(Foresight):
    steps: Annotated[int, Range(ge=1)] = 10
    tokens: Annotated[int, Range(ge=0)] = 0
    polled: bool = False
    prompts_first: bool = False

    def __post_init__(self) -> None:
        self._counts_from = 0 if self.polled else -1  # the scheduler's own decode step; -1: none has waited

    def profile(self, prefill: tuple[tuple[int, float], ...], decode: tuple[tuple[int, int, float], ...]) -> None:
        """How long steps take says nothing here: they are counted."""

    def learn(self, step: StepTime) -> None:
        """As `profile`."""

    def form(self, scheduler: Scheduler, now: float) -> tuple[list[tuple[Sequence, int]], bool]:
        if scheduler.running and not scheduler.prefilling and self._holds(scheduler):
            return [], True
        budget_tokens = scheduler.max_batch_tokens - (0 if self.prompts_first else len(scheduler.running))
        chunks = scheduler.admit(budget_tokens, chunked=not self.prompts_first)
        if chunks:
            self._counts_from = scheduler.step if self.polled else -1
        return chunks, not chunks or not self.prompts_first

    def lasts(self, scheduler: Scheduler) -> int:
        """Until it no longer holds back; what has no room is tried again at once."""
        return max(1, self._left(scheduler))

    def _holds(self, scheduler: Scheduler) -> bool:
        if self.tokens and scheduler.waiting_tokens >= self.tokens:
            return False
        if self._counts_from < 0:
            self._counts_from = scheduler.step
        return self._left(scheduler) > 0

    def _left(self, scheduler: Scheduler) -> int:
        """Steps that are still to wait."""
        counted = scheduler.step - self._counts_from
        return -counted % self.steps if self.polled else self.steps - counted
