"""Who takes part: instances join, change, leave, are found dead; and what the router asks of them besides the legs of requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec

from pdlab.core.liveness import Inquiry, Verdict
from pdlab.core.types import (
    AnyEvent,
    Drained,
    Evict,
    InstanceSpec,
    Joined,
    Left,
    RegistryAway,
    Report,
    Role,
    Scale,
    Stop,
    Switch,
    Switched,
)
from pdlab.real.net.http import Broken
from pdlab.real.router.remote import Remote
from pdlab.real.router.tasks import Tasks
from pdlab.results.timeline import Book

CALL_BACK_S = 1.0
ASK_LOAD_S = 0.5  # between two reports that are asked of an instance while the registry is away
SKEW_S = 5.0  # an instance's clock that is further off is not believed
Start = Callable[[Role], Coroutine[Any, Any, None]]


@dataclass(slots=True, eq=False)
class Incarnation:
    """One incarnation of an instance. `gone`: nothing is asked of it any more. `left`: the registry says so."""

    spec: InstanceSpec
    remote: Remote
    gone: bool = False
    left: bool = False

    @property
    def name(self) -> str:
        return self.spec.name

    def can(self, what: str) -> bool:
        return what in self.spec.capabilities


class Instances:
    """`members` are the present incarnations, `reports` their last. What happens to them goes by `tell` to the router; `heard_s` says when
    that has heard of an incarnation last, and one that has reported within `lease_s` is there. `connect` makes the Remote of one that has
    joined. `lost` drops one that is gone from all requests, and says how many tokens each of these keeps. `start` brings up one more of a
    role."""

    def __init__(
        self,
        tell: Callable[[AnyEvent], None],
        now: Callable[[], float],
        tasks: Tasks,
        book: Book,
        *,
        connect: Callable[[InstanceSpec], Remote],
        heard_s: Callable[[InstanceSpec], float],
        lost: Callable[[Incarnation], dict[int, int]],
        lease_s: float,
        unix: Callable[[], float],
        start: Start | None,
    ) -> None:
        self.members: dict[str, Incarnation] = {}
        self.reports: dict[str, Report] = {}
        self._tell, self._now, self._tasks, self._book = tell, now, tasks, book
        self._connect, self._heard_s, self._lost, self._lease_s = connect, heard_s, lost, lease_s
        self._unix, self._start = unix, start
        self._inquiries: dict[Incarnation, asyncio.Task[bool]] = {}
        self._asking: asyncio.Task[None] | None = None

    # ------------------------------------------------------------ what becomes of them

    def join(self, spec: InstanceSpec) -> None:
        """An instance is there; or says something new of itself."""
        known = self.members.get(spec.name)
        if known is None or spec.incarnation > known.spec.incarnation:
            if known is not None:
                self.gone(known)
            self.members[spec.name] = Incarnation(spec, self._connect(spec))
            self._book.place(spec.name)
            self.reports.pop(spec.name, None)
            self._tell(Joined(spec))
            if spec.draining:
                self._tell(Drained(spec.name, spec.incarnation))
        elif spec.incarnation == known.spec.incarnation and not known.gone:
            before, known.spec = known.spec, spec
            if spec.role is not before.role:
                self._tell(Switched(spec.name, spec.incarnation, spec.role))
            if spec.draining is not before.draining:
                self._tell(Drained(spec.name, spec.incarnation, spec.draining))

    def leave(self, name: str, incarnation: int) -> None:
        """An incarnation is gone, by its own account or the registry's."""
        member = self.members.get(name)
        if member is not None and member.spec.incarnation == incarnation:
            member.left = True
            self.gone(member, died=False)

    def returned(self, spec: InstanceSpec) -> None:
        """An incarnation that has left is in the registry again: it is to come back as a new one."""
        member = self.members.get(spec.name)
        if member is not None and member.spec.incarnation == spec.incarnation and member.left:
            member.left = False
            self._tasks.spawn(self._calling_back(member))

    def unreachable(self, member: Incarnation, *, died: bool = True) -> None:
        """It is dead, or was silent for too long. If it lives on in the registry, it is to come back as a new incarnation."""
        if not member.gone:
            self.gone(member, died=died)
            self._tasks.spawn(self._calling_back(member))

    async def _calling_back(self, member: Incarnation) -> None:
        while self.members[member.name] is member and not member.left:
            if await member.remote.alive():
                await member.remote.rejoin()
            await asyncio.sleep(CALL_BACK_S)

    async def lives(self, member: Incarnation) -> bool:
        """Something of it broke: is there evidence that it is dead? All that ask at once share one inquiry."""
        if member.gone:
            return False
        if (asked := self._inquiries.get(member)) is None:
            asked = self._inquiries[member] = asyncio.get_running_loop().create_task(self._inquire(member))
            self._tasks.keep(asked)
            asked.add_done_callback(lambda _: self._inquiries.pop(member, None))
        return await asyncio.shield(asked)

    async def _inquire(self, member: Incarnation) -> bool:
        inquiry = Inquiry(self._lease_s)
        while True:
            answer = await (member.remote.alive(inquiry.within_s) if inquiry.probes else member.remote.alive())
            verdict = inquiry.probed(answer, self._now() - self._heard_s(member.spec))
            if verdict is not Verdict.UNKNOWN:
                return verdict is Verdict.LIVES

    def gone(self, member: Incarnation, *, died: bool = True) -> None:
        """Nothing that this incarnation does counts any more. `died`: there is evidence that it did."""
        if member.gone:
            return
        member.gone = True
        sent = self._lost(member)
        member.remote.close()
        self.reports.pop(member.name, None)
        self._tell(Left(member.name, member.spec.incarnation, sent, died))

    def report(self, report: Report) -> None:
        """An instance's load; `taken_s` is Unix time."""
        now, age_s = self._now(), self._unix() - report.taken_s
        taken_s = min(now, now - age_s) if abs(age_s) <= SKEW_S else now
        report = msgspec.structs.replace(report, taken_s=taken_s)
        member = self.members.get(report.instance)
        if member is not None and not member.gone and member.spec.incarnation == report.incarnation:
            self.reports[report.instance] = report
            self._book.sample(now, report, member.spec.kv_blocks)
        self._tell(report)

    def other(self, event: AnyEvent) -> None:
        """What else the registry says: Suspected, Switched, Drained, Leads, and that it is away."""
        if isinstance(event, RegistryAway):
            self._ask_loads(event.away)
        if isinstance(event, (Switched, Drained)):
            member = self.members.get(event.instance)
            if member is None or member.spec.incarnation != event.incarnation:
                return
            if isinstance(event, Switched):
                member.spec = msgspec.structs.replace(member.spec, role=event.role)
            else:
                member.spec = msgspec.structs.replace(member.spec, draining=event.draining)
        self._tell(event)

    def _ask_loads(self, away: bool) -> None:
        """While the registry brings no reports they are asked of the instances themselves."""
        if self._asking is not None:
            self._asking.cancel()
        self._asking = self._tasks.spawn(self._asking_loads()) if away else None

    async def _asking_loads(self) -> None:
        while True:
            there = [member for member in self.members.values() if not member.gone]
            for report in await asyncio.gather(*(member.remote.load() for member in there)):
                if report is not None:
                    self.report(report)
            await asyncio.sleep(ASK_LOAD_S)

    def close(self) -> None:
        """Hang up."""
        for member in self.members.values():
            member.remote.close()

    # ------------------------------------------------------------ what the router asks of them

    def switch(self, action: Switch) -> None:
        self._tasks.spawn(self._switching(self.members[action.instance], action.role))

    async def _switching(self, member: Incarnation, role: Role) -> None:
        try:
            await member.remote.switch(role)
        except Broken:
            if await self.lives(member):  # it stays what it was
                self._tell(Switched(member.name, member.spec.incarnation, member.spec.role))
            else:
                self.unreachable(member)

    def stop(self, action: Stop) -> None:
        self._tasks.spawn(self._stopping(self.members[action.instance]))

    async def _stopping(self, member: Incarnation) -> None:
        try:
            await member.remote.drain()
        except Broken:
            if await self.lives(member):  # it stays, unless it has said that it drains
                self._tell(Drained(member.name, member.spec.incarnation, member.spec.draining))
            else:
                self.unreachable(member)

    def evict(self, action: Evict) -> None:
        member = self.members[action.instance]
        if member.spec.incarnation == action.incarnation:
            self.unreachable(member, died=False)

    def scale(self, action: Scale) -> None:
        assert self._start is not None, "scaling without autoscale"
        for _ in range(action.count):
            self._tasks.spawn(self._start(action.role))
