"""Sequences that come from another engine, or go to one: prefill here and decode there, and the last stage of a migration.

src: lease = exchange.lease(id)            after finish "held"; exchange.snapshot(id) or exchange.hold(id) of a running one
dst: place = exchange.receive(submit, made, now)      its blocks are taken; None: no room now
     copy the blocks beyond place.cached_tokens; place = exchange.proceed(id, made) where more has been made meanwhile
dst: exchange.arrived(id)                  it decodes from the next step on;   src: exchange.release(id), or exchange.resume(id)
"""

from __future__ import annotations

from dataclasses import dataclass

from pdlab.prefix import chain
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
        self.expected: dict[int, Candidate] = {}  # blocks taken, KV on its way

    # ------------------------------------------------------------ the source

    def lease(self, id: int) -> Lease:
        """What is held of a request. Raises KeyError where nothing is."""
        c = self.engine.held[id]
        return Lease(id, list(c.tokens), c.row.made, c.seq.computed, self.engine.scheduler.table(c.seq))

    def snapshot(self, id: int) -> tuple[Lease, int] | None:
        """The full blocks of a running request (its prompt is computed), which do not change any more, and how often it was preempted; None
        where it does not run (any more), or has several candidates. They are its own as long as it runs and is not preempted again."""
        c = self._decoding(id)
        if c is None:
            return None
        block = self.engine.runner.block_tokens
        full = self.engine.scheduler.kv_tokens(c.seq) // block
        return Lease(id, list(c.tokens), c.row.made, full * block, self.engine.scheduler.table(c.seq)[:full]), c.seq.preempted

    def hold(self, id: int) -> Lease | None:
        """Stop a running request and lease its KV; None as for `snapshot`."""
        c = self._decoding(id)
        if c is None:
            return None
        self.engine.scheduler.hold(c.seq)
        del self.engine.groups[id]
        self.engine.held[id] = c
        return self.lease(id)

    def _decoding(self, id: int) -> Candidate | None:
        group = self.engine.groups.get(id)
        if group is None or len(group.live) != 1 or group.waiting:
            return None
        (c,) = group.live.values()
        return c if self.engine.scheduler.movable(c.seq) else None

    def resume(self, id: int) -> None:
        """What was held decodes here after all."""
        c = self.engine.held.pop(id)
        self.engine.groups[id] = Group({c.index: c})
        self.engine.scheduler.stay(c.seq)

    def resume_as(self, id: int, submit: Submit, now: float) -> None:
        """The same for a prompt computed under another name: its first token is made, and it goes on as `submit` says."""
        engine = self.engine
        held = engine.held.pop(id)
        candidates = [engine.candidate(submit, index, now) for index in range(submit.sampling.best_of)]
        c = candidates[0]
        if submit.sampling.temperature > 0:
            c.row.generator.random()  # the draw of the token that was made
        c.row.count(held.tokens[-1])
        c.tokens, c.seq, c.table, c.admitted_s = held.tokens, held.seq, held.table, now
        c.seq.owner, c.seq.request_id = c, submit.id
        engine.groups[submit.id] = Group({one.index: one for one in candidates}, candidates[1:])
        engine.scheduler.lengthen(c.seq, submit.sampling.max_tokens)
        engine.scheduler.stay(c.seq)
        engine.release(engine.groups[submit.id])

    def release(self, id: int) -> None:
        """The KV is read, or its lease has ended. Harmless when nothing is held."""
        c = self.engine.held.pop(id, None)
        if c is not None:
            self.engine.name_blocks(c)
            self.engine.scheduler.release(c.seq)
            c.seq.owner = None

    # ------------------------------------------------------------ neither

    def begin(self, submit: Submit, made: list[int], now: float) -> None:
        """A request of one candidate that has lost the instances it was on, and its KV: it is computed here, and goes on after the tokens
        `made` there, drawn as it would have gone on. Like an engine's `submit`."""
        engine = self.engine
        c = engine.candidate(submit, 0, now)
        _made(c, made)
        c.seq.prompt_tokens += len(made)
        c.seq.output_tokens -= len(made)
        if c.seq.hashes:
            c.seq.hashes = chain(c.tokens, engine.runner.block_tokens)
        engine.groups[submit.id] = Group({0: c})
        engine.scheduler.submit(c.seq)

    # ------------------------------------------------------------ the destination

    def receive(self, submit: Submit, made: list[int], now: float) -> Place | None:
        """Take blocks for a request whose KV is computed elsewhere: of its prompt, and of all tokens `made` but the last. Without any, the
        prompt's last token is computed here once more, to sample the first. None: no room now, and nothing taken."""
        engine = self.engine
        candidates = [engine.candidate(submit, index, now) for index in range(submit.sampling.best_of)]
        c = candidates[0]
        _made(c, made)
        seq = c.seq
        seq.made = len(made)
        seq.prompt_tokens = len(c.tokens) - bool(made)
        if not engine.scheduler.reserve(seq):
            return None
        c.admitted_s = now
        engine.groups[submit.id] = Group({one.index: one for one in candidates}, candidates[1:])
        self.expected[submit.id] = c
        return self._place(c)

    def proceed(self, id: int, made: list[int]) -> Place | None:
        """More was made elsewhere: `made` in all. None: no room for it now; what was taken stays so. KeyError: not expected."""
        c = self.expected[id]
        _made(c, made[c.row.made :])
        tokens = len(c.tokens) - bool(made)
        if tokens > c.seq.prompt_tokens and not self.engine.scheduler.extend(c.seq, tokens):
            return None
        c.seq.made = len(made)
        return self._place(c)

    def _place(self, c: Candidate) -> Place:
        c.table = self.engine.scheduler.table(c.seq)
        return Place(c.id, c.seq.prompt_tokens, list(c.table), c.seq.cached_tokens)

    def arrived(self, id: int) -> None:
        """All of its KV is in its blocks. Harmless when it was cancelled meanwhile."""
        c = self.expected.pop(id, None)
        if c is not None and c.seq in self.engine.scheduler.reserved:
            if c.row.made:
                self.engine.scheduler.arrive(c.seq)
                self.engine.release(self.engine.groups[id])
            else:
                self.engine.scheduler.arrive(c.seq, missing=1)

    def failed(self, id: int) -> None:
        """Its KV will not come: the blocks are free again. Harmless when it was cancelled meanwhile."""
        c = self.expected.pop(id, None)
        if c is not None and c.seq in self.engine.scheduler.reserved:
            self.engine.drop(id)


def _made(c: Candidate, tokens: list[int]) -> None:
    """Book tokens that were made elsewhere."""
    for token in tokens:
        if c.submit.sampling.temperature > 0:
            c.row.generator.random()  # the draw it was made with
        c.row.count(token)
    c.tokens += tokens
