"""KV on its way between two instances: by when it must have come, and what is learnt of the way."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from pdlab.core.reply import RouterReply
from pdlab.core.router_limits import Limits
from pdlab.core.types import Notice, Stage
from pdlab.core.view import Cluster, LiveRequest

TRANSFER = Stage.TRANSFER  # enum look-ups cost


class Transfers:
    def __init__(self, cluster: Cluster, limits: Limits, reply: RouterReply) -> None:
        self.cluster, self.limits, self.reply = cluster, limits, reply
        self.reach = cluster.reach
        self.due: deque[tuple[float, int]] = deque()  # (by when, request id)

    def depart(self, live: LiveRequest) -> None:
        assert live.prefill is not None and live.decode is not None
        self.cluster.links.moving[live] = live.prefill, live.decode, live.decode_tokens
        live.stage = TRANSFER
        live.due_s = self.cluster.now + self.limits.transfer_timeout_s
        self.due.append((live.due_s, live.request.id))

    def failed(self, src: str, dst: str, reason: str) -> None:
        pause_s = self.reach.failed(src, dst, self.cluster.now)
        if pause_s:
            self.reply.actions.append(Notice(f"no KV from {src} to {dst} for the next {pause_s:g} s: {reason}"))

    def came(self, src: str, dst: str) -> None:
        if self.reach.came(src, dst):
            self.reply.actions.append(Notice(f"KV from {src} reaches {dst} again"))

    def overdue(self) -> Iterator[LiveRequest]:
        """Requests whose KV has not come in time."""
        while self.due and self.due[0][0] <= self.cluster.now:
            due_s, request_id = self.due.popleft()
            late = self.cluster.live.get(request_id)
            if late is not None and late.stage is TRANSFER and late.due_s == due_s:
                yield late

    def stood_still(self, late_s: float) -> None:
        """In that time no transfer could be known to have come."""
        for due_s, request_id in self.due:
            live = self.cluster.live.get(request_id)
            if live is not None and live.due_s == due_s:
                live.due_s = due_s + late_s
        self.due = deque((due_s + late_s, request_id) for due_s, request_id in self.due)
