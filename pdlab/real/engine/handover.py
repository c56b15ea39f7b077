"""Sequences that come from another engine, or go to one: prefill here and decode there, and the last stage of a migration.

src: lease = exchange.lease(id)            after finish "held"; exchange.snapshot(id) or exchange.stop(id, now, lease_s) of a running one
dst: place = exchange.receive(submit, made, now)      its blocks are taken; None: no room now
     copy the blocks beyond place.cached_tokens; place = exchange.proceed(id, made) where more has been made meanwhile
dst: exchange.arrived(id)                  it decodes from the next step on;   src: exchange.release(id), or exchange.resume(id)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from pdlab.core.prefix import chain
from pdlab.core.sequence import Sequence
from pdlab.real.engine.candidate import Candidate
from pdlab.real.engine.engine import Engine
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
class ReservedBlocks:
    """Blocks taken for KV that is to come. The first `cached_tokens` are here already."""

    id: int
    kv_tokens: int
    blocks: list[int]
    cached_tokens: int


class Handover:
    """The hand-over side of an engine: what its worker holds and expects, as tokens and block tables. Called between its steps."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.worker = engine, engine.worker
        self.loans = 0  # so far

    def sole(self, id: int) -> Candidate | None:
        """The one candidate of a request; None where it is not here, or has several."""
        group = self.engine.groups.get(id, {})
        return next(iter(group.values())) if len(group) == 1 else None

    # ------------------------------------------------------------ the source

    def lease(self, id: int) -> Lease:
        """What is held of a request."""
        c = self.sole(id)
        assert c is not None, "what is held has one candidate"
        return Lease(id, list(c.tokens), c.row.made, c.seq.computed, self.engine.scheduler.table(c.seq))

    def snapshot(self, id: int) -> Lease | str:
        """The full blocks of a running request (its prompt is computed), which do not change any more, as long as it runs and is not
        preempted; or why there are none."""
        c = self.sole(id)
        if reason := "it does not run here" if c is None else self.worker.export(c.seq):
            return reason
        assert c is not None
        block = self.engine.runner.block_tokens
        full = self.engine.scheduler.kv_tokens(c.seq) // block
        return Lease(id, list(c.tokens), c.row.made, full * block, self.engine.scheduler.table(c.seq)[:full])

    def stop(self, id: int, now: float, lease_s: float) -> Lease | str:
        """Stop a running request and hold its KV for `lease_s`; or why not."""
        c = self.sole(id)
        return ("it does not run here" if c is None else self.worker.stop(c.seq, now, lease_s)) or self.lease(id)

    def renew(self, id: int, until_s: float) -> None:
        """What is held of a request is, until then at least."""
        if (c := self.sole(id)) is not None:
            self.worker.renew(c.seq, until_s)

    def resume(self, id: int) -> None:
        """Its migration is called off: it goes on here. Harmless where it is not here."""
        if (c := self.sole(id)) is not None and c.seq.decodes_here:
            self.worker.resume(c.seq)

    def resume_as(self, id: int, submit: Submit, now: float) -> None:
        """The same for a prompt computed under another name: its first token is made, and it goes on as `submit` says. Several candidates
        drop that token, and sample their own."""
        (held,) = self.engine.groups.pop(id).values()
        c, others = self.engine.enter(submit, now)
        c.tokens = held.tokens[:-1]
        if not others:
            _made(c, held.tokens[-1:])
        c.seq, c.table, c.admitted_s = held.seq, held.table, now
        c.seq.owner, c.seq.request_id = c, submit.id
        self.worker.stay(c.seq, others, submit.sampling.max_tokens)

    def release(self, id: int) -> None:
        """The KV is read, or its lease has ended. Harmless when nothing is held."""
        if self.engine.holds(id):
            (c,) = self.engine.groups.pop(id).values()
            self.engine.name_blocks(c)
            self.worker.release(c.seq)
            c.seq.owner = None

    def lend(self, hashes: tuple[int, ...], name: str, until_s: float) -> tuple[Sequence, list[int]] | None:
        """Hold what the prefix cache has of these blocks until then, as `name`: a sequence that the worker releases, and its blocks; None
        where there are none."""
        self.loans += 1
        seq = Sequence(-self.loans, 0, len(hashes) * self.engine.runner.block_tokens, 1, hashes, owner=name, decodes_here=False)
        return (seq, self.engine.scheduler.table(seq)) if self.worker.lend(seq, until_s) else None

    # ------------------------------------------------------------ neither

    def begin(self, submit: Submit, made: list[int], now: float) -> None:
        """A request of one candidate that has lost the instances it was on, and its KV: it is computed here, and goes on after the tokens
        `made` there, drawn as it would have gone on. Like an engine's `submit`."""
        c, _ = self.engine.enter(submit, now)
        _made(c, made)
        c.seq.prompt_tokens += len(made)
        c.seq.output_tokens -= len(made)
        if c.seq.hashes:
            c.seq.hashes = chain(c.tokens, self.engine.runner.block_tokens)
        self.worker.submit(c.seq)

    # ------------------------------------------------------------ the destination

    def receive(self, submit: Submit, made: list[int], now: float, due_s: float = inf) -> ReservedBlocks | None:
        """Take blocks for a request whose KV is computed elsewhere, and comes until `due_s`: of its prompt, and of all tokens `made` but
        the last. Without any, the prompt's last token is computed here once more, to sample the first. None: no room now, and nothing
        taken."""
        c, others = self.engine.enter(submit, now)
        _made(c, made)
        c.seq.made = len(made)
        c.seq.prompt_tokens = len(c.tokens) - bool(made)
        if not self.worker.reserve(c.seq, others, due_s):
            del self.engine.groups[submit.id]
            return None
        c.admitted_s = now
        return self._place(c)

    def expects(self, id: int) -> bool:
        """Are its blocks taken, and its KV on its way?"""
        c = self.engine.groups.get(id, {}).get(0)
        return c is not None and c.seq in self.engine.scheduler.reserved

    def proceed(self, id: int, made: list[int]) -> ReservedBlocks | None:
        """More was made elsewhere: `made` in all. None: no room for it now; what was taken stays so. KeyError: not expected."""
        c = self.engine.groups[id][0]
        _made(c, made[c.row.made :])
        if not self.worker.extend(c.seq, len(c.tokens) - bool(made)):
            return None
        c.seq.made = len(made)
        return self._place(c)

    def _place(self, c: Candidate) -> ReservedBlocks:
        c.table = self.engine.scheduler.table(c.seq)
        return ReservedBlocks(c.id, c.seq.prompt_tokens, list(c.table), c.seq.cached_tokens)

    def arrived(self, id: int, prefix_tokens: int = 0) -> int:
        """All of its KV is in its blocks, or that of so many tokens of its prompt. The tokens it has made. Harmless when it was cancelled
        meanwhile."""
        if not self.expects(id):
            return 0
        c = self.engine.groups[id][0]
        if prefix_tokens:
            c.seq.cached_tokens = max(c.seq.cached_tokens, prefix_tokens)
            self.worker.arrive(c.seq, missing=c.seq.prompt_tokens - c.seq.cached_tokens)
            return 0
        self.worker.arrive(c.seq, missing=0 if c.row.made else 1)
        return c.row.made

    def compute(self, id: int) -> None:
        """Its prefix will not come: its prompt is computed here. Harmless when it was cancelled meanwhile."""
        if self.expects(id):
            c = self.engine.groups[id][0]
            c.table = ()
            self.worker.compute(c.seq)

    def failed(self, id: int) -> None:
        """Its KV will not come: the blocks are free again. Harmless when it was cancelled meanwhile."""
        if self.expects(id):
            self.engine.drop(id)


def _made(c: Candidate, tokens: list[int]) -> None:
    """Book tokens that were made elsewhere."""
    for token in tokens:
        if c.submit.sampling.temperature > 0:
            c.row.generator.random()  # the draw it was made with
        c.row.count(token)
    c.tokens += tokens
