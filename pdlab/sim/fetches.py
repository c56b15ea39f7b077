"""Prefixes that an instance reads from another before it computes a prompt, in the simulated world."""

from __future__ import annotations

from pdlab.core.sequence import Sequence
from pdlab.core.types import Fetch, Fetched
from pdlab.sim.calls import call_later
from pdlab.sim.due_call import DueCall
from pdlab.sim.job import Job
from pdlab.sim.link import Network
from pdlab.sim.path import Transfer
from pdlab.sim.scene import Scene
from pdlab.sim.worker import SimInstance


class PrefixRead:
    """One under way. `lent` is what the holder holds for it."""

    __slots__ = ("action", "began_s", "flows_s", "holder", "instance", "job", "lent", "seq", "transfer")

    def __init__(self, job: Job, action: Fetch, holder: SimInstance, instance: SimInstance, seq: Sequence) -> None:
        self.job, self.action, self.holder, self.instance, self.seq = job, action, holder, instance, seq
        self.lent: Sequence | None = None
        self.transfer: Transfer | None = None
        self.flows_s = 0.0

    def told(self, tokens: int = 0, size_bytes: int = 0, seconds: float = 0.0, *, unreachable: bool = False) -> Fetched:
        a = self.action
        return Fetched(a.request_id, a.attempt, a.instance, a.holder, tokens, size_bytes, seconds, unreachable)


class PrefixReads:
    """`cuts` as Moves has them."""

    def __init__(self, scene: Scene, network: Network, cuts: dict[frozenset[str], float]) -> None:
        self.scene, self.network, self.cuts = scene, network, cuts
        self.under_way: dict[Job, PrefixRead] = {}

    def begin(self, job: Job, instance: SimInstance, seq: Sequence) -> bool:
        """Instead of submitting: `seq` takes its blocks, reads, and computes the rest. False: it has no room for that now."""
        action, job.fetch = job.fetch, None
        job.fetched = None
        if action is None or action.attempt != seq.attempt or not instance.reserve(seq):
            return False
        read = self.under_way[job] = PrefixRead(job, action, self.scene.instances[action.holder], instance, seq)
        fails_s = self.cuts.get(frozenset((instance.name, read.holder.name)))
        if fails_s is not None or not read.holder.alive:
            call_later(self.scene.env, self.scene.asking_s if fails_s is None else fails_s, self._unheard, (read, fails_s is not None))
            return True
        lent = Sequence(seq.request_id, seq.attempt, action.tokens, 1, seq.hashes, decodes_here=False)
        if not read.holder.lend(lent):
            call_later(self.scene.env, self.scene.asking_s, self._unheard, (read, False))
            return True
        read.lent = lent
        first, of = min(seq.cached_tokens, lent.prompt_tokens), lent.prompt_tokens
        size = instance.kv_size.size_bytes(first, of, of, read.holder.kv_size)
        way = read.holder.name, instance.name
        delay_s = self.network.path(*way).latency_s
        read.transfer = self.network.transfer(*way, size, self._landed, delay_s=delay_s, owner=job)
        read.flows_s = self.scene.env.now + delay_s + read.transfer.path.latency_s
        return True

    def cancel(self, job: Job) -> None:
        """Nobody wants its prompt any more, or its instance is gone."""
        if (read := self.under_way.pop(job, None)) is not None:
            self._stop(read)

    def lost(self, instance: SimInstance) -> None:
        """It is gone: who reads there computes."""
        for read in list(self.under_way.values()):
            if read.holder is instance:
                self._compute(read, unreachable=False)

    def cut(self, a: str, b: str) -> None:
        """Nothing passes between these two any more."""
        for read in list(self.under_way.values()):
            if read.transfer is not None and {read.holder.name, read.instance.name} == {a, b}:
                self._stop(read)
                call_later(self.scene.env, self.cuts[frozenset((a, b))], self._unheard, (read, True))

    def _unheard(self, event: DueCall) -> None:
        read, unreachable = event.value
        known = self.under_way.get(read.job)
        if known is not None and known is read:
            self._compute(known, unreachable=unreachable)

    def _compute(self, read: PrefixRead, *, unreachable: bool) -> None:
        del self.under_way[read.job]
        self._stop(read)
        read.job.fetched = read.told(unreachable=unreachable)
        if read.instance.alive:
            read.instance.worker.compute(read.seq)
            read.instance.kick()

    def _stop(self, read: PrefixRead) -> None:
        if read.transfer is not None:
            self.network.cancel(read.transfer)
            read.transfer = None
        if read.lent is not None and read.holder.alive:
            read.holder.release(read.lent)
        read.lent = None

    def _landed(self, transfer: Transfer) -> None:
        read = self.under_way.pop(transfer.owner)
        assert read.lent is not None
        tokens, seq = max(read.lent.prompt_tokens, read.seq.cached_tokens), read.seq
        read.transfer = None
        self._stop(read)
        size, seconds = round(transfer.size_bytes), max(0.0, self.scene.env.now - read.flows_s)
        read.job.fetched = read.told(tokens, size, seconds)
        seq.cached_tokens = tokens
        read.instance.worker.arrive(seq, seq.prompt_tokens - tokens)
        read.instance.kick()
