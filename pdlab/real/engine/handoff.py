"""Sequences that come from another engine, or go to one: prefill here and decode there, and the last stage of a migration.

src: lease = exchange.lease(id)            after finish "held", or exchange.hold(id) of a running one
dst: place = exchange.receive(submit, made, now)      its blocks are taken; None: no room now
     copy the blocks beyond place.cached_tokens
dst: exchange.arrived(id)                  it decodes from the next step on;   src: exchange.release(id)
"""

from __future__ import annotations

from dataclasses import dataclass

from pdlab.real.engine.engine import Candidate, Engine, Group
from pdlab.real.engine.messages import Submit


@dataclass(frozen=True, slots=True)
class Lease:
    """KV that waits here to be read: of the first `kv_tokens` of `tokens` (prompt and output so far), in `blocks`, in order."""

    id: int
    tokens: list[int]
    made: int
    kv_tokens: int
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class Place:
    """Blocks taken for KV that is to come. The first `cached_tokens` are here already."""

    id: int
    kv_tokens: int
    blocks: list[int]
    cached_tokens: int


class Exchange:
    """The hand-over side of an engine. Called between its steps."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.expected: dict[int, tuple[Candidate, bool]] = {}  # blocks taken, KV on its way; whether its first token is still to be made

    # ------------------------------------------------------------ the source

    def lease(self, id: int) -> Lease:
        """What is held of a request. Raises KeyError where nothing is."""
        c = self.engine.held[id]
        return Lease(id, list(c.tokens), c.row.made, c.seq.computed, self.engine.scheduler.table(c.seq))

    def hold(self, id: int) -> Lease | None:
        """Stop a running request and lease its KV; None where it does not run (any more), or has several candidates."""
        group = self.engine.groups.get(id)
        if group is None or len(group.live) != 1 or group.waiting:
            return None
        (c,) = group.live.values()
        scheduler = self.engine.scheduler
        if scheduler.running.get(c.seq.order) is not c.seq:
            return None
        scheduler.hold(c.seq)
        del self.engine.groups[id]
        self.engine.held[id] = c
        return self.lease(id)

    def resume(self, id: int) -> None:
        """What was held decodes here after all."""
        c = self.engine.held.pop(id)
        self.engine.groups[id] = Group({c.index: c})
        self.engine.scheduler.stay(c.seq)

    def release(self, id: int) -> None:
        """The KV is read, or its lease has ended. Harmless when nothing is held."""
        c = self.engine.held.pop(id, None)
        if c is not None:
            self.engine.name_blocks(c)
            self.engine.scheduler.release(c.seq)
            c.seq.owner = None

    # ------------------------------------------------------------ the destination

    def receive(self, submit: Submit, made: list[int], now: float) -> Place | None:
        """Take blocks for a request whose KV is computed elsewhere: of its prompt, and of all tokens `made` but the last. Without any, the
        prompt's last token is computed here once more, to sample the first. None: no room now, and nothing taken."""
        engine = self.engine
        c = engine.candidate(submit, 0, now)
        for token in made:
            if submit.sampling.temperature > 0:
                c.row.generator.random()  # the draw it was made with
            c.row.count(token)
        c.tokens += made
        seq = c.seq
        seq.made = len(made)
        seq.prompt_tokens = len(c.tokens) - bool(made)
        if not engine.scheduler.reserve(seq):
            return None
        engine.groups[submit.id] = Group({0: c})
        self.expected[submit.id] = c, not made
        c.table = engine.scheduler.table(seq)
        return Place(submit.id, seq.prompt_tokens, list(c.table), seq.cached_tokens)

    def arrived(self, id: int) -> None:
        """All of its KV is in its blocks. Harmless when it was cancelled meanwhile."""
        c, samples = self.expected.pop(id, (None, False))
        if c is not None and c.seq in self.engine.scheduler.reserved:
            self.engine.scheduler.arrive(c.seq, missing=int(samples))

    def failed(self, id: int) -> None:
        """Its KV will not come: the blocks are free again. Harmless when it was cancelled meanwhile."""
        c, _ = self.expected.pop(id, (None, False))
        if c is not None and c.seq in self.engine.scheduler.reserved:
            self.engine.drop(id)
