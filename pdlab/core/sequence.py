"""What an instance computes: one sequence of tokens."""

from __future__ import annotations

from math import inf
from typing import Any

from pdlab.core.holding import Holding


class Sequence:
    """One sequence on one instance, for one attempt. `prompt_tokens` counts what must be computed before it can make its next token;
    `output_tokens` what it shall make here, that next one included."""

    holding: Holding | None = None  # None: it has no blocks
    computed = 0  # prompt tokens in KV
    cached_tokens = 0  # of those, found in the prefix cache when first admitted
    order = 0  # of its submission here: the tie-break
    start_step = -1
    growth = 0  # what it takes for each further block, while it decodes
    join = 0  # which of its instance's joins was its last
    end_step = -1  # in the scheduler's own decode steps, while it decodes
    drafted = 0  # tokens it verifies in the step under way, beside its next one
    preempted = 0
    exported = -1  # `preempted`, when its KV was last exported
    parent: Sequence | None = None  # the first candidate of its request, where this is another
    others: list[Sequence] | None = None  # the first one's: those that have not ended
    over = False  # the first has, while others go on
    arrived_s = 0.0  # on the clock of `next_batch`, when its client asked
    ttft_slo_s = inf  # after that its first token is due, and then one every
    tpot_slo_s = inf
    offline = False  # in no hurry: it gives way first

    def __init__(
        self,
        request_id: int,
        attempt: int,
        prompt_tokens: int,
        output_tokens: int,
        hashes: tuple[int, ...] = (),
        priority: int = 0,
        owner: Any = None,
        made: int = 0,
        decodes_here: bool = True,
    ) -> None:
        self.request_id = request_id
        self.attempt = attempt
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.hashes = hashes
        self.priority = priority
        self.decodes_here = decodes_here
        self.owner = owner  # the world's
        self.made = made  # tokens made so far; while it decodes, see Scheduler.made

    def aim(self, arrived_s: float, ttft_slo_s: float, tpot_slo_s: float) -> None:
        """Say by when its tokens are due, for batchings that go by that."""
        self.arrived_s, self.ttft_slo_s, self.tpot_slo_s = arrived_s, ttft_slo_s, tpot_slo_s

    def like(self, other: Sequence) -> None:
        """It is due when that one is, another candidate or place of the same request; and as little in a hurry."""
        self.aim(other.arrived_s, other.ttft_slo_s, other.tpot_slo_s)
        self.offline = other.offline

    def __repr__(self) -> str:
        return f"<Sequence {self.request_id}.{self.attempt} prompt={self.prompt_tokens} computed={self.computed} made={self.made}>"
