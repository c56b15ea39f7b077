"""A request on its way through the simulated world."""

from __future__ import annotations

from pdlab.core.scheduler import Sequence
from pdlab.core.staging import Staging
from pdlab.core.types import Fetch, Fetched, Request
from pdlab.results.timeline import NAN, Timeline
from pdlab.sim.path import Transfer
from pdlab.sim.worker import SimInstance


class Job(Timeline):
    """Its timeline; its attempt, the instances and sequences that take part in it, its KV transfer."""

    attempt = 0
    sent = 0  # tokens its client has from lost attempts
    samples_anew = False  # whoever decodes it makes its first token, from the prompt's KV; the prefill instance's is dropped
    p: SimInstance | None = None
    d: SimInstance | None = None
    target: SimInstance | None = None  # of a migration
    pseq: Sequence | None = None
    dseq: Sequence | None = None
    tseq: Sequence | None = None
    transfer: Transfer | None = None
    done = False
    streaming = False  # its KV is pushed while the prompt is computed
    paced = False  # it was, and came at that pace
    blocked = False  # the instances of this attempt do not reach each other, and what is pushed does not come
    pushed_tokens = 0  # of its prompt, as far as they were pushed
    staging: Staging | None = None  # of a migration under way
    flows_s: float = NAN  # when the transfer's first byte flows
    copied_bytes = 0.0  # by a migration under way
    copied_s = 0.0
    last_token_s: float = NAN
    fetch: Fetch | None = None  # of this attempt: what is read before its prompt is computed
    fetched: Fetched | None = None  # and what came of it

    def __init__(self, index: int, request: Request, output_tokens: int, context_hashes: tuple[int, ...]) -> None:
        self.request = request
        self.index = index
        self.output_tokens = output_tokens
        self.context_hashes = context_hashes

    @property
    def active(self) -> Sequence | None:
        """The sequence that makes its tokens."""
        return self.dseq if self.dseq is not None else self.pseq
