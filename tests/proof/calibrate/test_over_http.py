"""What is read off a server's streams, from a server of known times."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pdlab.core.types import UsageError
from pdlab.cost.profile import Point
from pdlab.proof.calibrate import over_http
from pdlab.proof.calibrate.stream import Heard, MeasuredServer
from pdlab.real.net.http import HttpClient
from tests.support.virtual import VirtualLoop, run


class Timed(MeasuredServer):
    """A request costs it `request_s`, a step `step_s` of its prompt tokens and of the sequences that decode in it."""

    def __init__(self, loop: VirtualLoop, request_s: float) -> None:
        super().__init__(HttpClient("http://here"), "m", 99)
        self.loop, self.request_s, self.decoding = loop, request_s, 0

    async def ask(self, prompt: Sequence[int], output_tokens: int, kv: Mapping[str, Any] | None = None) -> Heard:
        sent_s = self.loop.time()
        await asyncio.sleep(max(0.0, self.request_s) + self.step_s(len(prompt)) + min(0.0, self.request_s))
        tokens_s = [self.loop.time()]
        self.decoding += 1
        for _ in range(output_tokens - 1):
            await asyncio.sleep(0)  # until all that decode beside it are counted
            await asyncio.sleep(self.step_s(0))
            tokens_s.append(self.loop.time())
        self.decoding -= 1
        return Heard(sent_s, tuple(tokens_s))

    def step_s(self, prompt_tokens: int) -> float:
        return 0.01 + 0.001 * max(0, prompt_tokens - 1) + 0.002 * max(0, self.decoding - 1)


def measured(request_s: float, point: Point) -> tuple[float, float]:
    """(what a request is found to cost besides steps, the point's seconds)."""

    async def play(loop: VirtualLoop) -> tuple[float, float]:
        server = Timed(loop, request_s)
        besides_s = await over_http.request_s(server)
        return besides_s, await over_http.seconds(server, point, besides_s)

    return run(play)


@pytest.mark.parametrize(
    ("point", "step_s"),
    [(Point(tokens=64), 0.073), (Point(batch=1, context=64), 0.01), (Point(batch=4, context=64), 0.016)],
    ids=lambda value: str(getattr(value, "kind", "")),
)
def test_a_request_is_told_from_the_steps_of_it(point: Point, step_s: float) -> None:
    besides_s, seconds = measured(0.003, point)
    assert besides_s == pytest.approx(0.003)
    assert seconds == pytest.approx(step_s)


def test_what_noise_hides_costs_nothing() -> None:
    """A first token that came sooner than the others follow each other."""
    besides_s, seconds = measured(-0.004, Point(tokens=64))
    assert besides_s == 0.0
    assert seconds == pytest.approx(0.069)


@pytest.mark.parametrize("fails", [None, 0, 1])
def test_servers_start_together_and_where_one_does_not_none_is_left(monkeypatch: pytest.MonkeyPatch, fails: int | None) -> None:
    starting: list[int] = []
    running: set[int] = set()

    @asynccontextmanager
    async def served(options: list[str]) -> AsyncIterator[str]:
        starting.append(number := len(starting))
        await asyncio.sleep(1.0 + number)
        if number == fails:
            raise UsageError("the server did not start")
        running.add(number)
        try:
            yield f"http://{number}"
        finally:
            running.remove(number)

    monkeypatch.setattr(over_http, "served", served)

    async def play(loop: VirtualLoop) -> None:
        async with over_http.all_served(["--threads", "1"], 2) as urls:
            assert urls == ["http://0", "http://1"] and loop.time() == pytest.approx(2.0)
            assert running == {0, 1}

    if fails is None:
        run(play)
    else:
        with pytest.raises(UsageError, match="did not start"):
            run(play)
    assert starting == [0, 1] and not running
