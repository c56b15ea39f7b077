"""The requests that are live in a router: how each begins, how it ends, and what becomes of it when an instance is gone."""

from __future__ import annotations

from collections.abc import Callable

from pdlab.core.types import AnyEvent, Cancelled, Finished, Request, Stage
from pdlab.real.engine.messages import Sampling
from pdlab.real.router.instances import Incarnation
from pdlab.real.router.live import Deliver, Leg, Live
from pdlab.real.router.metrics import HANDOFF, Tally
from pdlab.real.router.tasks import Tasks
from pdlab.real.router.timelines import Timelines

Tell = Callable[[AnyEvent], None]
Now = Callable[[], float]


class LiveRequests:
    """`by_id` are those that have not ended. The router is told by `tell` how they end, but for what it has ended itself."""

    def __init__(self, tell: Tell, now: Now, lines: Timelines, tally: Tally, tasks: Tasks) -> None:
        self.by_id: dict[int, Live] = {}
        self._tell, self._now, self._lines, self._tally, self._tasks = tell, now, lines, tally, tasks

    def begin(self, request: Request, tokens: list[int], sampling: Sampling, deliver: Deliver) -> Live:
        live = Live(request, tokens, sampling, deliver, self._lines.begin(request), self._lines.gaps.add)
        self.by_id[request.id] = live
        return live

    def cancel(self, request_id: int, candidate: int = -1) -> None:
        """The client has gone (-1), or wants no more of one candidate. When it wants no more of any, the request is done. Harmless when it
        has ended."""
        live = self.by_id.get(request_id)
        if live is None:
            return
        if candidate < 0:
            self._tell(Cancelled(request_id))
            return
        live.candidates[candidate].finish = "stop"
        if live.finished:
            serving = live.legs.get("decode") or live.legs.get("prefill")
            name = serving.member.name if serving is not None else live.line.prefill_instance
            self._finished(live, name or "")

    def finish(self, live: Live, leg: Leg) -> None:
        """All tokens are made, the last of them by `leg`, which may say its good-byes."""
        live.drop(leg)
        self._finished(live, leg.member.name)

    def end(self, live: Live, stage: Stage, reason: str) -> None:
        """It does not succeed, and its client is told so."""
        self._ended(live, stage, reason)
        live.end(stage, reason)

    def release(self, live: Live) -> None:
        """Nobody will read the KV that waits for it."""
        held, live.held = live.held, None
        if held is not None and not held.member.gone:
            self._tasks.spawn(held.member.remote.release(held.lease))

    def without(self, member: Incarnation) -> dict[int, int]:
        """Nothing that this incarnation does counts any more. Of the requests it had a part in: how many tokens of the attempt their
        clients keep."""
        sent: dict[int, int] = {}
        for live in self.by_id.values():
            takes_part = any(leg.member is member and leg.kind != "target" for leg in live.legs.values())
            if (takes_part or (live.held is not None and live.held.member is member)) and live.kept:
                sent[live.request.id] = live.kept
            if member.name in (live.line.prefill_instance, live.line.decode_instance) and live.line.stage is Stage.TRANSFER:
                self._tally.transfer_failed(HANDOFF, "instance_gone")
            for leg in [leg for leg in live.legs.values() if leg.member is member]:
                live.drop(leg)
                leg.cancel()
            if live.held is not None and live.held.member is member:
                live.held = None
        return sent

    def _finished(self, live: Live, instance: str) -> None:
        self._ended(live, Stage.DONE, None)
        self._tell(Finished(live.request.id, live.attempt, instance, max(len(c.tokens) for c in live.candidates)))

    def _ended(self, live: Live, stage: Stage, reason: str | None) -> None:
        for leg in live.legs.values():
            leg.cancel()
        live.legs = {}
        self.release(live)
        self.by_id.pop(live.request.id, None)
        self._lines.end(live.line, self._now(), stage, reason, live.delivered)
        self._tally.ends[stage.name.lower()] += 1
