"""A request on its way through the simulated world."""

from __future__ import annotations

from pdlab.core.sequence import Sequence
from pdlab.core.staging import Staging
from pdlab.core.types import Fetch, Fetched, Request
from pdlab.results.timeline import NAN, Timeline
from pdlab.sim.path import Transfer
from pdlab.sim.worker import SimInstance


class Job(Timeline):
    """Its timeline; its attempt, the instances and sequences that take part in it, its KV transfer."""

    __slots__ = (
        "attempt",
        "blocked",
        "context_hashes",
        "copied_bytes",
        "copied_s",
        "d",
        "done",
        "dseq",
        "fetch",
        "fetched",
        "flows_s",
        "index",
        "last_token_s",
        "output_tokens",
        "p",
        "paced",
        "pseq",
        "pushed_tokens",
        "samples_anew",
        "sent",
        "staging",
        "streaming",
        "target",
        "transfer",
        "tseq",
    )

    def __init__(self, index: int, request: Request, output_tokens: int, context_hashes: tuple[int, ...]) -> None:
        Timeline.__init__(self, request)
        self.index = index
        self.output_tokens = output_tokens
        self.context_hashes = context_hashes
        self.attempt = 0
        self.sent = 0  # tokens its client has from lost attempts
        self.samples_anew = False  # whoever decodes it makes its first token, from the prompt's KV; the prefill instance's is dropped
        self.p: SimInstance | None = None
        self.d: SimInstance | None = None
        self.target: SimInstance | None = None  # of a migration
        self.pseq: Sequence | None = None
        self.dseq: Sequence | None = None
        self.tseq: Sequence | None = None
        self.transfer: Transfer | None = None
        self.done = False
        self.streaming = False  # its KV is pushed while the prompt is computed
        self.paced = False  # it was, and came at that pace
        self.blocked = False  # the instances of this attempt do not reach each other, and what is pushed does not come
        self.pushed_tokens = 0  # of its prompt, as far as they were pushed
        self.staging: Staging | None = None  # of a migration under way
        self.flows_s: float = NAN  # when the transfer's first byte flows
        self.copied_bytes = 0.0  # by a migration under way
        self.copied_s = 0.0
        self.last_token_s: float = NAN
        self.fetch: Fetch | None = None  # of this attempt: what is read before its prompt is computed
        self.fetched: Fetched | None = None  # and what came of it

    @property
    def active(self) -> Sequence | None:
        """The sequence that makes its tokens."""
        return self.dseq if self.dseq is not None else self.pseq
