"""Instances speak, or do not: they join and leave, report, switch and drain. Whoever is unheard for too long is suspect, then fenced."""

from __future__ import annotations

from math import inf

from pdlab.core.ledger import Ledger
from pdlab.core.membership import Membership
from pdlab.core.reply import RouterReply
from pdlab.core.requests import Requests
from pdlab.core.router_limits import Limits
from pdlab.core.types import Drained, Evict, InstanceState, Joined, Left, Report, Suspected, Switched
from pdlab.core.view import Cluster, Instance

READY = InstanceState.READY  # enum look-ups cost


class Liveness:
    def __init__(
        self, cluster: Cluster, limits: Limits, membership: Membership, ledger: Ledger, requests: Requests, reply: RouterReply
    ) -> None:
        self.cluster, self.limits = cluster, limits
        self.membership, self.ledger, self.requests, self.reply = membership, ledger, requests, reply

    def joined(self, event: Joined) -> None:
        spec = event.spec
        known = self.membership.by_name.get(spec.name)
        if known is not None:
            if spec.incarnation <= known.spec.incarnation:
                return
            if known.state is not InstanceState.GONE:
                self._drop(known, {}, f"{spec.name} restarted")
        self.membership.admit(spec)
        self.requests.retry()

    def left(self, event: Left) -> None:
        instance = self.membership.present(event.instance, event.incarnation)
        if instance is not None:
            self._drop(instance, event.sent, f"{instance.name} {'died' if event.died else 'has lost its place'}", died=event.died)
            self.requests.retry()

    def _drop(self, instance: Instance, sent: dict[int, int], reason: str, *, died: bool = True) -> None:
        self.membership.dismiss(instance, died=died)
        self.requests.lose_all(instance, sent, reason, charged=died)

    def report(self, event: Report) -> None:
        instance = self.membership.present(event.instance, event.incarnation)
        if instance is None:
            return
        instance.heard_s = max(instance.heard_s, self.cluster.now)  # it may have been left out for a while: see `rested`
        unreported, taken_s = instance.unreported, event.taken_s
        while unreported and unreported[0][0] <= taken_s:
            _, prefill, decode = unreported.popleft()
            instance.since_prefill_tokens -= prefill
            instance.since_decode_tokens -= decode
        instance.hear(self.cluster.completed(event, instance))
        if self.cluster.changes.wanted:
            self.cluster.changes.note(instance)
        if event.stored:
            self.cluster.index.add(event.stored, instance.bit)
        if event.evicted:
            self.cluster.index.discard(event.evicted, instance.bit)
        if instance.state is InstanceState.SUSPECT:
            instance.state = READY
            self.cluster.refresh()
        if instance.room < inf:
            self.ledger.set_room(instance, self.requests.room(instance))
        if instance.busy:
            self.ledger.set_busy(instance, not instance.has_place)
        if self.requests.waiting:
            self.requests.retry()

    def suspected(self, event: Suspected) -> None:
        instance = self.membership.present(event.instance, event.incarnation)
        if instance is None:
            return
        if event.lost and instance.state is InstanceState.READY:
            instance.state = InstanceState.LEASE_LOST
        elif not event.lost and instance.state in (InstanceState.LEASE_LOST, InstanceState.SUSPECT):
            instance.state = InstanceState.READY
            self.cluster.refresh()
            self.requests.retry()

    def switched(self, event: Switched) -> None:
        instance = self.membership.present(event.instance, event.incarnation)
        if instance is not None:
            instance.role = event.role
            instance.state = InstanceState.READY
            instance.flipped_s = self.cluster.now
            self.cluster.refresh()
            self.requests.retry()

    def drained(self, event: Drained) -> None:
        instance = self.membership.present(event.instance, event.incarnation)
        if instance is None:
            return
        if event.draining and instance.ready:
            instance.state = InstanceState.DRAINING
            self.cluster.refresh()
        elif not event.draining and instance.state is InstanceState.DRAINING:
            instance.state = READY
            self.cluster.refresh()
            self.requests.retry()

    def listen(self) -> None:
        """Who has not been heard for too long?"""
        now, limits = self.cluster.now, self.limits
        for instance in self.cluster.instances:
            silent_s = now - instance.heard_s
            if instance.state in (InstanceState.READY, InstanceState.LEASE_LOST) and silent_s > limits.lease_s + limits.probe_s:
                instance.state = InstanceState.SUSPECT
                self.cluster.refresh()
            elif instance.state is InstanceState.SUSPECT and silent_s > limits.lease_s + limits.probe_s + limits.suspect_s:
                instance.heard_s = now
                self.reply.actions.append(Evict(instance.name, instance.spec.incarnation))

    def stood_still(self, late_s: float) -> None:
        """In that time nobody could be heard."""
        now = self.cluster.now
        for instance in self.cluster.instances:
            instance.heard_s = min(now, instance.heard_s + late_s)

    def rested(self, reports_s: float) -> None:
        """So many seconds of reports are left out, as nothing was to be said."""
        for instance in self.cluster.instances:
            instance.heard_s += reports_s
