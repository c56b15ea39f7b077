"""What another policy would decide on a cluster that runs: shadow routers, one a cluster, which follow the event logs of real ones.

A shadow needs every event since its router began, so it reads the log that the router writes with --trace-events from its head, and goes on
as that grows. It runs in a process of its own, with bounded time and memory: a policy may be a stranger's code. Nothing of it reaches the
router, which only sends its log.
"""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from pdlab.core.endless_hooks import watched
from pdlab.core.policy import Policy
from pdlab.core.types import UsageError
from pdlab.lab.bounded import BoundedProcess
from pdlab.lab.lab import ClusterAway
from pdlab.lab.submission import check_confined
from pdlab.policies import load as load_policy
from pdlab.replay.log import head_in
from pdlab.replay.what_if import ShadowRouter
from pdlab.results.comparison import policy_words
from pdlab.search.identity import texts

START_S, FEED_S = 30.0, 60.0  # that a policy may take to be built, and a batch of events to be answered
EVERY_S = 0.5  # between looks at a log that has been read to its end
MOST_BYTES = 4 << 30  # of address space
MOST_KEPT = 50  # answers that differ
Fetch = Callable[[int], Awaitable[bytes]]  # what a router's /pdlab/v1/trace says from that offset on


class WhatIfBody(BaseModel):
    """`policy` is what an experiment's has: a name, a mapping with a name and parameters, or one for each hook."""

    model_config = ConfigDict(extra="forbid")

    policy: str | dict[str, Any]


class ShadowState(StrEnum):
    CATCHING_UP = "catching up"
    LIVE = "live"
    AWAY = "router away"
    ENDED = "ended"


class HookDisagreement(BaseModel):
    """How often a hook was asked and answered otherwise, since the router began, and of the last 200 times."""

    hook: str
    asked: int
    differ: int
    lately_asked: int
    lately_differ: int


class DepartureView(BaseModel):
    """`at_s` counts from the router's beginning; `request_id` is null for what is about the cluster."""

    at_s: float
    hook: str
    request_id: int | None
    decided: str
    other: str


class WhatIfView(BaseModel):
    """`policy` is asked beside `decides`, the router's. `at_s` is when the last event that was taken in happened, `behind_bytes` what the
    router's log has beyond it, `restarts` how often the router was seen to begin anew; the figures are those of its present life. `trouble`
    says why it has ended, or what it waits for."""

    policy: str
    decides: str = ""
    state: ShadowState = ShadowState.CATCHING_UP
    trouble: str = ""
    events: int = 0
    at_s: float = 0.0
    behind_bytes: int = 0
    restarts: int = 0
    hooks: list[HookDisagreement] = Field(default_factory=list)
    departures: list[DepartureView] = Field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ShadowAnswer:
    """Of the process, after a batch: figures, or why there will be none any more."""

    ended: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)


class ShadowEnded(Exception):
    """The line says why."""


@dataclass(frozen=True, slots=True)
class TraceBatch:
    """`log` is another for each life of a router; `log_bytes` is how long it is, `stopped` why it grows no more."""

    log: str
    log_bytes: int
    stopped: str
    lines: bytes

    @classmethod
    def read(cls, raw: bytes) -> TraceBatch:
        """Raises ClusterAway."""
        head, _, lines = raw.partition(b"\n")
        try:
            about = json.loads(head)
            return cls(str(about["log"]), int(about["bytes"]), str(about["stopped"]), lines)
        except (ValueError, TypeError, KeyError):
            raise ClusterAway("what the router says of its event log cannot be read: it is another pdlab's") from None


@dataclass(frozen=True, slots=True)
class ShadowOrder:
    """What is asked beside whoever decides. Files of policies lie in `uploads`."""

    policy: str | dict[str, Any]
    uploads: Path
    allow_code: bool


class ShadowProcess:
    """Blocks while it builds, and while it feeds. Raises ShadowEnded where the policy cannot be built."""

    def __init__(self, context: ForkServerContext, order: ShadowOrder) -> None:
        self._bounded = BoundedProcess(context, _follow, order)
        try:
            self._heard("the policy was not built", START_S)
        except ShadowEnded:
            self.kill()
            raise

    def feed(self, lines: bytes) -> Mapping[str, Any]:
        """Raises ShadowEnded."""
        with suppress(OSError):  # what it said before it ended is still to be heard
            self._bounded.pipe.send_bytes(lines)
        return self._heard("a batch of events was not answered", FEED_S)

    def kill(self) -> None:
        self._bounded.kill()

    def _heard(self, what: str, within_s: float) -> Mapping[str, Any]:
        try:
            if not self._bounded.pipe.poll(within_s):
                raise ShadowEnded(f"{what} within {within_s:g} s")
            answer: ShadowAnswer = self._bounded.pipe.recv()
        except (EOFError, OSError):
            raise ShadowEnded(f"its process {self._bounded.how_it_ended()}") from None
        if answer.ended:
            raise ShadowEnded(answer.ended)
        return answer.figures


class ClusterShadow:
    """Of one router. Use `begin`, and then `stop`."""

    def __init__(self, fetch: Fetch, context: ForkServerContext, order: ShadowOrder) -> None:
        self.view = WhatIfView(policy=policy_words(order.policy))
        self._fetch, self._context, self._order = fetch, context, order
        self._process: ShadowProcess | None = None
        self._task: asyncio.Task[None] | None = None
        self._log, self._offset = "", 0

    async def begin(self) -> None:
        """Raises UsageError where the policy is none or the router keeps no log, ClusterAway where it does not answer."""
        batch = TraceBatch.read(await self._fetch(0))
        head, newline, lines = batch.lines.partition(b"\n")
        try:
            await self._start(batch)
            await self._take(replace(batch, lines=head + newline))
        except ShadowEnded as ended:
            await self._end_process()
            raise UsageError(str(ended)) from None
        self._task = asyncio.create_task(self._following(replace(batch, lines=lines)))

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
        await self._end_process()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    async def _start(self, batch: TraceBatch) -> None:
        self._process = await run_in_threadpool(ShadowProcess, self._context, self._order)
        self._log, self._offset = batch.log, 0

    async def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await run_in_threadpool(process.kill)

    async def _following(self, batch: TraceBatch | None) -> None:
        try:
            while True:
                if batch is not None:
                    await self._take(batch)
                if batch is None or self._offset >= batch.log_bytes:
                    await asyncio.sleep(EVERY_S)
                batch = await self._next()
        except (ShadowEnded, UsageError) as ended:
            self._say(state=ShadowState.ENDED, trouble=str(ended))
            await self._end_process()

    async def _next(self) -> TraceBatch | None:
        """None while the router does not answer. Raises UsageError where it keeps no log any more."""
        try:
            return TraceBatch.read(await self._fetch(self._offset))
        except ClusterAway as away:
            self._say(state=ShadowState.AWAY, trouble=str(away))
            return None

    async def _take(self, batch: TraceBatch) -> None:
        if batch.log != self._log:  # the router was started again; what was read is from the middle of another log
            await self._end_process()
            await self._start(batch)
            self.view = WhatIfView(policy=self.view.policy, restarts=self.view.restarts + 1)
            return
        assert self._process is not None, "it is there while it follows"
        figures = await run_in_threadpool(self._process.feed, batch.lines) if batch.lines else {}
        self._offset += len(batch.lines)
        behind_bytes = batch.log_bytes - self._offset
        if batch.stopped and behind_bytes <= 0:
            raise ShadowEnded(batch.stopped)
        self._say(**figures, state=ShadowState.CATCHING_UP if behind_bytes > 0 else ShadowState.LIVE, trouble="", behind_bytes=behind_bytes)

    def _say(self, **changes: Any) -> None:
        self.view = WhatIfView.model_validate({**self.view.model_dump(), **changes})


class ClusterShadows:
    """At most one of each cluster."""

    def __init__(self, context: ForkServerContext) -> None:
        self.context = context
        self._by_cluster: dict[str, ClusterShadow] = {}
        self._changing = asyncio.Lock()

    async def ask(self, cluster: str, fetch: Fetch, order: ShadowOrder) -> WhatIfView:
        """In place of the one there is, which goes on where the new one cannot begin. Raises UsageError, ClusterAway."""
        check_confined({"policy": order.policy}, order.allow_code, "policy")
        made = ClusterShadow(fetch, self.context, order)
        async with self._changing:
            await made.begin()
            before, self._by_cluster[cluster] = self._by_cluster.get(cluster), made
            if before is not None:
                await before.stop()
        return made.view

    def of(self, cluster: str) -> WhatIfView | None:
        found = self._by_cluster.get(cluster)
        return None if found is None else found.view

    async def stop(self, cluster: str) -> WhatIfView | None:
        """What it said last; None where there was none."""
        async with self._changing:
            found = self._by_cluster.pop(cluster, None)
            if found is None:
                return None
            await found.stop()
            return found.view

    async def close(self) -> None:
        for cluster in list(self._by_cluster):
            await self.stop(cluster)


# ------------------------------------------------------------ in the process


def _follow(pipe: Connection, order: ShadowOrder) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    try:
        other = load_policy.build(order.policy, order.uploads)
        pipe.send(ShadowAnswer())
        with watched(other):
            _answer_batches(pipe, other, order.allow_code)
    except UsageError as error:
        pipe.send(ShadowAnswer(" ".join(str(error).split())))
    except MemoryError:
        pipe.send(ShadowAnswer(f"it took more than {MOST_BYTES >> 30} GiB of memory"))
    except EOFError:
        return  # nobody asks any more


def _answer_batches(pipe: Connection, other: Policy, allow_code: bool) -> None:
    head, _, lines = pipe.recv_bytes().partition(b"\n")
    _check_code(head, allow_code)
    followed = ShadowRouter(head, other, most_kept=MOST_KEPT)
    while True:
        followed.feed(lines)
        pipe.send(ShadowAnswer(figures=_figures(followed)))
        lines = pipe.recv_bytes()


def _check_code(head: bytes, allow_code: bool) -> None:
    """Before any of it is run. Raises UsageError."""
    for text in texts(head_in(head).experiment.get("policy")):
        if not allow_code and (text.endswith(".py") or ".py:" in text):
            raise UsageError(
                f"the router decides by code, {text[:80]!r}, which this lab does not run: start it with --allow-code, where that file is"
            )


def _figures(followed: ShadowRouter) -> dict[str, Any]:
    shadow = followed.shadow
    hooks = [
        {
            "hook": hook,
            "asked": shadow.asked[hook],
            "differ": shadow.departed[hook],
            "lately_asked": len(lately),
            "lately_differ": sum(lately),
        }
        for hook, lately in shadow.lately.items()
    ]
    return {
        "decides": policy_words(followed.head.policy),
        "events": followed.events,
        "at_s": followed.router.cluster.now,
        "hooks": hooks,
        "departures": [{"at_s": one.now, **{k: v for k, v in asdict(one).items() if k != "now"}} for one in reversed(shadow.departures)],
    }
