"""Shadow routers of a lab beside a router whose event log grows, ends, begins anew or is none. Processes are real; the router is a log."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pdlab import UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.lab.bounded import forkserver
from pdlab.lab.lab import ClusterAway
from pdlab.lab.shadows import ClusterShadows, ShadowOrder, ShadowState, WhatIfView
from pdlab.replay.what_if import beside
from pdlab.sim import simulate

RAISES = """
from pdlab.core.policy import Policy

class Wrong(Policy):
    def handoff(self, request, cluster):
        return {}[request.id] if request.id == 7 else super().handoff(request, cluster)
"""


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "events.jsonl"
    rows = [{"role": "prefill", "count": 2, "hardware": "h100-sxm"}, {"role": "decode", "count": 2, "hardware": "h100-sxm"}]
    workload = {"source": "synthetic", "requests": 60, "rate": 20.0, "prompt": 256, "output": 8}
    simulate(
        Experiment.parse({"model": "llama-3.1-8b", "workload": workload, "cluster": {"instances": rows}, "policy": "least_loaded"}),
        trace_events=path,
    )
    return path


@dataclass(slots=True)
class LoggedRouter:
    """Answers as a router does, with what it has logged so far."""

    lines: list[bytes]
    written: int
    life: str = "first"
    stopped: str = ""
    trouble: Exception | None = None
    asked: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, log: Path, written: int) -> LoggedRouter:
        return cls(log.read_bytes().splitlines(keepends=True), written)

    async def fetch(self, offset: int) -> bytes:
        self.asked.append(offset)
        if self.trouble is not None:
            raise self.trouble
        there = b"".join(self.lines[: self.written])
        about = {"log": self.life, "bytes": len(there), "stopped": self.stopped}
        part = there[offset : offset + 8192]
        whole = part[: part.rfind(b"\n") + 1] or there[offset : there.find(b"\n", offset) + 1]
        return json.dumps(about).encode() + b"\n" + whole


class ShadowWorld:
    def __init__(self, shadows: ClusterShadows, uploads: Path) -> None:
        self.shadows, self.uploads = shadows, uploads

    async def ask(self, router: LoggedRouter, policy: str | dict[str, Any], *, allow_code: bool = False) -> WhatIfView:
        return await self.shadows.ask("here", router.fetch, ShadowOrder(policy, self.uploads, allow_code))

    async def until(self, reached: Callable[[WhatIfView], bool]) -> WhatIfView:
        async with asyncio.timeout(30):
            while True:
                view = self.shadows.of("here")
                assert view is not None, "it was asked"
                if reached(view):
                    return view
                await asyncio.sleep(0.05)


@pytest.fixture
def play(tmp_path: Path) -> Callable[[Callable[[ShadowWorld], Awaitable[None]]], None]:
    async def played(scene: Callable[[ShadowWorld], Awaitable[None]]) -> None:
        shadows = ClusterShadows(forkserver("pdlab.lab.shadows"))
        try:
            await scene(ShadowWorld(shadows, tmp_path))
        finally:
            await shadows.close()

    return lambda scene: asyncio.run(played(scene))


Play = Callable[[Callable[[ShadowWorld], Awaitable[None]]], None]


def test_a_shadow_catches_up_and_goes_on_with_its_router(play: Play, log: Path) -> None:
    async def scene(world: ShadowWorld) -> None:
        router = LoggedRouter.of(log, 100)
        begun = await world.ask(router, "round_robin")
        assert (begun.policy, begun.decides, begun.state) == ("round_robin", "least_loaded", ShadowState.CATCHING_UP)
        assert (await world.until(lambda view: view.state is ShadowState.LIVE)).events == 99
        router.written = len(router.lines)
        view = await world.until(lambda view: view.events == len(router.lines) - 1)
        shadow, _, _ = beside(log, "round_robin")
        assert {one.hook: (one.asked, one.differ) for one in view.hooks} == {
            hook: (asked, shadow.departed[hook]) for hook, asked in shadow.asked.items()
        }
        last = shadow.departures[-1]
        assert (view.departures[0].request_id, view.departures[0].decided, view.departures[0].other) == (
            last.request_id,
            last.decided,
            last.other,
        )
        await world.ask(router, "least_loaded")
        view = await world.until(lambda view: view.state is ShadowState.LIVE)
        assert view.policy == "least_loaded" and view.departures == [] and sum(one.asked for one in view.hooks) > 100
        assert await world.shadows.stop("here") == view
        heard = len(router.asked)
        await asyncio.sleep(0.7)
        assert len(router.asked) == heard and world.shadows.of("here") is None

    play(scene)


def test_a_router_that_goes_away_and_begins_anew_is_followed_from_its_head(play: Play, log: Path) -> None:
    async def scene(world: ShadowWorld) -> None:
        router = LoggedRouter.of(log, 200)
        await world.ask(router, "round_robin")
        await world.until(lambda view: view.state is ShadowState.LIVE)
        router.trouble = ClusterAway("http://x does not answer: gone")
        assert (await world.until(lambda view: view.state is ShadowState.AWAY)).trouble == str(router.trouble)
        router.trouble, router.life, router.written = None, "second", 90
        view = await world.until(lambda view: view.state is ShadowState.LIVE and view.restarts == 1)
        assert (view.events, view.trouble) == (89, "")
        router.stopped = "the event log stopped at 3.0 s (No space left on device)"
        assert (await world.until(lambda view: view.state is ShadowState.ENDED)).trouble == router.stopped

    play(scene)


def test_a_policy_that_raises_ends_its_shadow_with_one_line(play: Play, log: Path) -> None:
    async def scene(world: ShadowWorld) -> None:
        (world.uploads / "wrong.py").write_text(RAISES)
        router = LoggedRouter.of(log, 400)
        with pytest.raises(UsageError, match=r"'wrong.py' is a policy's code, which this lab does not run; start it with --allow-code"):
            await world.ask(router, "wrong.py")
        with pytest.raises(UsageError, match=r"'/etc/x.py' is a path outside of the lab's uploads"):
            await world.ask(router, {"name": "/etc/x.py"}, allow_code=True)
        assert world.shadows.of("here") is None and router.asked == []
        await world.ask(router, "wrong.py", allow_code=True)
        view = await world.until(lambda view: view.state is ShadowState.ENDED)
        assert "wrong.py:6: policy Wrong.handoff" in view.trouble and "request 7" in view.trouble and "raised KeyError: 7" in view.trouble
        assert "\n" not in view.trouble

    play(scene)


def test_what_cannot_be_followed_is_told_and_the_shadow_there_is_goes_on(play: Play, log: Path) -> None:
    async def scene(world: ShadowWorld) -> None:
        router = LoggedRouter.of(log, 100)
        await world.ask(router, "round_robin")
        with pytest.raises(UsageError, match=r"unknown policy 'rund_robin'"):
            await world.ask(router, "rund_robin")
        silent = LoggedRouter.of(log, 100)
        silent.trouble = UsageError("this router keeps no event log: start it with --trace-events FILE")
        with pytest.raises(UsageError, match=r"start it with --trace-events FILE"):
            await world.ask(silent, "round_robin")
        head = msgspec.json.decode(router.lines[0])
        by_code = LoggedRouter([msgspec.json.encode({**head, "experiment": {**head["experiment"], "policy": "own.py"}}) + b"\n"], 1)
        with pytest.raises(UsageError, match=r"the router decides by code, 'own.py', which this lab does not run"):
            await world.ask(by_code, "round_robin")
        older = LoggedRouter([msgspec.json.encode({**head, "policy_hash": "00"}) + b"\n"], 1)
        with pytest.raises(UsageError, match=r"the router decides by another version of its policy"):
            await world.ask(older, "round_robin")
        assert (await world.until(lambda view: view.state is ShadowState.LIVE)).events == 99

    play(scene)
