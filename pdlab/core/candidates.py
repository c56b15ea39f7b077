"""Among whom the policy is asked about a request, and whom it chose to decode it."""

from __future__ import annotations

from collections.abc import Callable

from pdlab.core.blame import MISTAKES
from pdlab.core.membership import Membership
from pdlab.core.policy import Policy
from pdlab.core.reply import RouterReply
from pdlab.core.types import MADE, InstanceState
from pdlab.core.view import Cluster, Instance, LiveRequest

READY = InstanceState.READY  # enum look-ups cost


class Candidates:
    def __init__(self, cluster: Cluster, policy: Policy, membership: Membership, reply: RouterReply) -> None:
        self.cluster, self.policy = cluster, policy
        self.membership, self.reply = membership, reply
        self.narrowed = False  # the policy's view, to who can hold the request in question
        self.reach = cluster.reach
        self._closed = cluster.reach.closed

    def choose_decode(self, live: LiveRequest, src: Instance) -> Instance | None:
        """Ask who decodes what `src` prefills, among those that can and that it reaches; None when there is nobody now."""
        cluster, request = self.cluster, live.request
        candidates = cluster.decode
        wanted: list[Instance] = candidates
        picky = self._closed or not self.membership.all_go_on
        if picky:
            wanted = [x for x in candidates if self._comes(live, src, x)]
            if not wanted and not self._may_come(live, src):
                return src if cluster.capacity.can_decode(live, src) else None
        if not wanted:
            return None
        if live.avoid is not None:
            wanted = [x for x in wanted if x is not live.avoid] or wanted
        if wanted is not candidates:
            cluster.decode = cluster.ranked(wanted)
        try:
            choice = self.policy.handoff(request, cluster)
        except MISTAKES as error:
            raise self.reply.blame("handoff", request.id, error) from error
        finally:
            cluster.decode = candidates
        if choice is None:
            return None
        if choice.__class__ is not Instance:
            raise self.reply.blame("handoff", request.id, f"returned {choice!r}, not an instance or None")
        if choice.state is not READY and not choice.ready and choice is not src:
            raise self.reply.blame("handoff", request.id, f"returned {choice.name}, which is {choice.state}")
        if not (picky or self.narrowed):
            return choice
        unable = self.narrowed and not cluster.capacity.can_decode(live, choice)
        if unable or (picky and not self._comes(live, src, choice)):  # it did not go by what it was shown
            choice = min(wanted, key=lambda x: (x.decode_tokens, x.index))
        if self._closed:
            self.reach.sends(src.name, choice.name, cluster.now)
        return choice

    def _comes(self, live: LiveRequest, src: Instance, x: Instance) -> bool:
        """Can what `src` prefills be decoded by `x` now, as far as the way and what is made are concerned?"""
        return x is src or (self.reach.open(src.name, x.name, self.cluster.now) and (x.can(MADE) or not live.goes_on))

    def _may_come(self, live: LiveRequest, src: Instance) -> bool:
        """Is there somebody else who can decode it, busy or full though he may be?"""
        return any(
            x.ready
            and x.role.decodes
            and not self.reach.doubtful(src.name, x.name)
            and (x.can(MADE) or not live.goes_on)
            and self.cluster.capacity.can_decode(live, x)
            for x in self.cluster.instances
        )

    def among_able(self, live: LiveRequest, ask: Callable[[LiveRequest], bool]) -> bool:
        """`ask` in a view that leaves out those who can never hold this request."""
        cluster = self.cluster
        whole = cluster.instances, cluster.prefill, cluster.decode, cluster.degraded
        cluster.instances, cluster.prefill, cluster.decode, cluster.degraded = cluster.able(live)
        self.narrowed = True
        try:
            return ask(live)
        finally:
            self.narrowed = False
            cluster.instances, cluster.prefill, cluster.decode, cluster.degraded = whole
