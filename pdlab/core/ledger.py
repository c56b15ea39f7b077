"""What is assigned to each instance, as the view shows it: sums over requests, which are kept as these come and go."""

from __future__ import annotations

from math import inf

from pdlab.core.types import Stage
from pdlab.core.view import Cluster, Instance, LiveRequest


class Ledger:
    """Whoever is full or busy by it is no candidate: see `Cluster.refresh`."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.changes = cluster, cluster.changes

    def assign_decode(self, live: LiveRequest, decode: Instance) -> None:
        request = live.request
        tokens = live.decode_tokens = request.prompt_tokens + live.sent_tokens
        live.decode = decode
        decode.decode_requests += 1
        decode.decode_tokens += tokens
        decode.decoding[request.id] = live
        decode.since_decode_tokens += tokens
        decode.unreported.append((self.cluster.now, 0, tokens))
        if self.changes.wanted:
            self.changes.note(decode)
        if decode.room < inf:
            self.set_room(decode, decode.room - tokens)
        if decode.decode_requests >= decode.most_requests:
            self.set_busy(decode, True)
        if request.hashes and decode is not live.prefill:
            self.cluster.index.book(request.hashes, decode)

    def unassign_prefill(self, live: LiveRequest) -> None:
        """The prompt is computed, or never will be: out of the prefill instance's ledger. It may still hold the KV."""
        if live.prefill_tokens >= 0 and live.prefill is not None:
            live.prefill.prefill_requests -= 1
            live.prefill.prefill_tokens -= live.prefill_tokens
            live.prefill_tokens = -1
            if self.changes.wanted:
                self.changes.note(live.prefill)
            if live.prefill.busy:
                self.set_busy(live.prefill, not live.prefill.has_place)

    def unassign_decode(self, live: LiveRequest) -> None:
        decode = live.decode
        if decode is not None:
            freed = self.cluster.context_tokens(live) if decode.room < inf else 0
            decode.decode_requests -= 1
            decode.decode_tokens -= live.decode_tokens
            del decode.decoding[live.request.id]
            live.decode = None
            if self.changes.wanted:
                self.changes.note(decode)
            if decode.room < inf:
                self.set_room(decode, max(0.0, decode.room) + freed)
            if decode.busy:
                self.set_busy(decode, not decode.has_place)

    def set_room(self, instance: Instance, room: float) -> None:
        """An instance that has refused somebody is asked again for as many tokens as come free there. It is no candidate without: all who
        wait would be refused one by one whenever one ends."""
        was_full = instance.full
        instance.room = room
        if instance.full is not was_full:
            self.cluster.refresh()

    def set_busy(self, instance: Instance, busy: bool) -> None:
        """A busy instance is no candidate until something there has ended, or it reports."""
        if instance.busy is not busy:
            instance.busy = busy
            self.cluster.refresh()

    def check(self) -> None:
        """Invariant 3: each instance's ledger is the sum over the live requests assigned to it."""
        live = self.cluster.live.values()
        for x in self.cluster.instances:
            prefill = [r for r in live if r.prefill is x and r.prefill_tokens >= 0]
            decode = [r for r in live if r.decode is x]
            assert (x.prefill_requests, x.prefill_tokens) == (len(prefill), sum(r.prefill_tokens for r in prefill)), (
                f"{x.name}: prefill ledger"
            )
            assert (x.decode_requests, x.decode_tokens) == (len(decode), sum(r.decode_tokens for r in decode)), f"{x.name}: decode ledger"
            assert len(x.decoding) == x.decode_requests, f"{x.name}: decoding"
        moving = {r for r in live if r.stage is Stage.TRANSFER or r.migrating is not None}
        assert moving == set(self.cluster.links.moving), "KV on its way"
