"""A request on its way through the simulated world."""

from __future__ import annotations

import math

from pdlab.core.staging import Staging
from pdlab.scheduler import Sequence
from pdlab.sim.instance import SimInstance
from pdlab.sim.link import Transfer
from pdlab.types import Request, Stage

NAN = math.nan


class Job:
    """Its attempt, the instances and sequences that take part, its KV transfer, its timestamps (nan: not yet)."""

    attempts = 0
    migrations = 0
    attempt = 0
    sent = 0  # tokens its client has from lost attempts
    p: SimInstance | None = None
    d: SimInstance | None = None
    target: SimInstance | None = None  # of a migration
    pseq: Sequence | None = None
    dseq: Sequence | None = None
    tseq: Sequence | None = None
    transfer: Transfer | None = None
    stage: Stage = Stage.QUEUED_P
    done = False
    streaming = False  # its KV is pushed while the prompt is computed
    paced = False  # it was, and came at that pace
    cached_tokens = 0
    transfer_bytes = 0.0
    pushed_tokens = 0  # of its prompt, as far as they were pushed
    staging: Staging | None = None  # of a migration under way
    dispatched_s: float = NAN
    prefill_start_s: float = NAN
    first_token_s: float = NAN
    handoff_s: float = NAN
    transfer_start_s: float = NAN
    transfer_end_s: float = NAN
    flows_s: float = NAN  # when the transfer's first byte flows
    decode_start_s: float = NAN
    last_token_s: float = NAN

    def __init__(self, index: int, request: Request, output_tokens: int, context_hashes: tuple[int, ...]) -> None:
        self.index = index
        self.request = request
        self.output_tokens = output_tokens
        self.context_hashes = context_hashes

    @property
    def active(self) -> Sequence | None:
        """The sequence that makes its tokens."""
        return self.dseq if self.dseq is not None else self.pseq
