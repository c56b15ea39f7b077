"""A request on its way through the simulated world."""

from __future__ import annotations

import math

from pdlab.scheduler import Sequence
from pdlab.sim.instance import SimInstance
from pdlab.sim.link import Transfer
from pdlab.types import Request, Stage

NAN = math.nan


class Job:
    """A request on its way."""

    __slots__ = (
        "attempt",
        "attempts",
        "cached_tokens",
        "context_hashes",
        "copied_tokens",
        "d",
        "decode_start_s",
        "dispatched_s",
        "done",
        "dseq",
        "first_token_s",
        "handoff_s",
        "index",
        "last_token_s",
        "migrations",
        "output_tokens",
        "p",
        "prefill_start_s",
        "pseq",
        "pushed_tokens",
        "request",
        "sent",
        "stage",
        "stages",
        "streaming",
        "target",
        "transfer",
        "transfer_bytes",
        "transfer_end_s",
        "transfer_start_s",
        "tseq",
    )

    def __init__(self, index: int, request: Request, output_tokens: int, context_hashes: tuple[int, ...]) -> None:
        self.index = index
        self.request = request
        self.output_tokens = output_tokens
        self.context_hashes = context_hashes
        self.attempt = self.attempts = self.migrations = 0
        self.sent = 0  # tokens its client has from lost attempts
        self.p: SimInstance | None = None
        self.d: SimInstance | None = None
        self.target: SimInstance | None = None  # of a migration
        self.pseq: Sequence | None = None
        self.dseq: Sequence | None = None
        self.tseq: Sequence | None = None
        self.transfer: Transfer | None = None
        self.stage = Stage.QUEUED_P
        self.done = False
        self.streaming = False  # its KV is pushed while the prompt is computed
        self.cached_tokens = 0
        self.transfer_bytes = 0.0
        self.pushed_tokens = 0  # of its prompt, as far as they were pushed
        self.copied_tokens = self.stages = 0  # of a migration under way
        self.dispatched_s = self.prefill_start_s = self.first_token_s = self.handoff_s = NAN
        self.transfer_start_s = self.transfer_end_s = self.decode_start_s = self.last_token_s = NAN

    @property
    def active(self) -> Sequence | None:
        """The sequence that makes its tokens."""
        return self.dseq if self.dseq is not None else self.pseq
