"""What engines that share a machine cost each other, against a machine whose times are known."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from pdlab.core.types import UsageError
from pdlab.cost.profile import BesideSeen, CoreSpeed, Interference
from pdlab.proof.calibrate.grid import Bounds
from pdlab.proof.calibrate.neighbour import LEAST, REPEATS, neighbours
from pdlab.proof.calibrate.neighbour import beside as beside_of
from pdlab.proof.calibrate.stream import Heard, MeasuredServer
from pdlab.real.net.http import HttpClient
from tests.support.virtual import VirtualLoop, run

BOUNDS = Bounds(step_tokens=512, seqs=16, max_tokens=2048, kv_tokens=20000)
REQUEST_S, PREFILL_S, DECODE_S = 0.003, 0.04, 0.01
UNSTEADY = CoreSpeed(prefill_loop_s=2e-5, decode_loop_s=2e-5, prefill_share=0.2, decode_share=0.5)


class Machine(MeasuredServer):
    """A server whose steps take longer by `beside` while its neighbour has a request in that phase."""

    neighbour: Machine

    def __init__(self, loop: VirtualLoop, beside: Interference) -> None:
        super().__init__(HttpClient("http://here"), "m", 99)
        self.loop, self.beside = loop, beside
        self.phases: list[str] = []
        self.prefilling = asyncio.Lock()  # one prompt after the other
        self.cached: set[tuple[int, ...]] = set()  # whose first token takes a decode's time
        self.asked = 0
        self.slower = 1.0

    async def ask(self, prompt: Sequence[int], output_tokens: int, kv: Mapping[str, Any] | None = None) -> Heard:
        self.asked += 1
        sent_s = self.loop.time()
        tokens_s: list[float] = []
        await asyncio.sleep(REQUEST_S)
        for _ in range(output_tokens):
            if tokens_s or tuple(prompt) in self.cached:
                await self.step("decode")
            else:
                async with self.prefilling:
                    await self.step("prefill", len(prompt))
                    self.cached.add(tuple(prompt))
            tokens_s.append(self.loop.time())
        return Heard(sent_s, tuple(tokens_s))

    async def step(self, phase: str, tokens: int = 0) -> None:
        self.phases.append(phase)
        try:
            await asyncio.sleep(self.step_s(phase, tokens))
        finally:
            self.phases.remove(phase)

    def step_s(self, phase: str, tokens: int) -> float:
        slower_s = max((self.beside.added_s(tokens, its == "prefill") for its in self.neighbour.phases), default=0.0)
        longer = UNSTEADY.longer(self.slower, prefill=phase == "prefill")
        return longer * ((PREFILL_S if phase == "prefill" else DECODE_S) + slower_s)


def measured(beside: Interference, slower: float) -> Interference:
    """`slower`: by what the host makes a loop take longer, on both cores."""

    async def play(loop: VirtualLoop) -> Interference:
        one, other = Machine(loop, beside), Machine(loop, beside)
        one.slower = other.slower = slower
        one.neighbour, other.neighbour = other, one
        found = await neighbours(one, other, BOUNDS, REQUEST_S, slower=lambda began_s, ended_s, prefill: slower, unsteady=UNSTEADY)
        assert other.asked and not one.phases and not other.phases
        return beside_of(found)

    return run(play)


@pytest.mark.parametrize(
    "beside",
    [
        Interference(),
        Interference(
            prefill_beside_prefill_s=0.02, prefill_beside_decode_s=0.016, decode_beside_prefill_s=0.012, decode_beside_decode_s=0.005
        ),
        Interference(prefill_beside_prefill_s=0.01, prefill_token_beside_prefill_s=0.0001, prefill_token_beside_decode_s=0.0002),
    ],
)
@pytest.mark.parametrize("slower", [1.0, 1.8])
def test_what_a_neighbour_costs_is_what_its_steps_add(beside: Interference, slower: float) -> None:
    found = measured(beside, slower)
    assert found.model_dump() == pytest.approx(beside.model_dump(), abs=1e-9)


def test_what_came_once_is_left_out_and_chance_does_not_add_up() -> None:
    def seen(*more_s: float) -> list[BesideSeen]:
        return [BesideSeen(load="decode", few_tokens=48, many_tokens=192, few_s=s, many_s=s, decode_s=s) for s in more_s]

    assert beside_of([]) == Interference()
    found = beside_of(seen(-0.002, 0.001, -0.001, 0.002, 0.0, 0.3))
    assert found == Interference(prefill_beside_decode_s=0.0005, decode_beside_decode_s=0.0005)
    assert beside_of(seen(-0.002, -0.001, 0.3)) == Interference()


def test_a_small_budget_is_for_fewer_repeats_but_not_for_none() -> None:
    async def play(loop: VirtualLoop) -> list[int]:
        asked = []
        for budget_s in (math.inf, 0.0):
            one, other = Machine(loop, Interference()), Machine(loop, Interference())
            one.neighbour, other.neighbour = other, one
            await neighbours(one, other, BOUNDS, REQUEST_S, budget_s=budget_s)
            asked.append(one.asked)
        return asked

    ample, least = run(play)
    assert least == ample * LEAST // REPEATS > 0


def test_a_neighbour_that_fails_is_told() -> None:
    class Failing(Machine):
        async def ask(self, prompt: Sequence[int], output_tokens: int, kv: Mapping[str, Any] | None = None) -> Heard:
            if self.asked == 3:
                raise UsageError("http://here answers 503")
            return await super().ask(prompt, output_tokens, kv)

    async def play(loop: VirtualLoop) -> None:
        one, other = Machine(loop, Interference()), Failing(loop, Interference())
        one.neighbour, other.neighbour = other, one
        with pytest.raises(UsageError, match="answers 503"):
            await neighbours(one, other, BOUNDS, REQUEST_S)

    run(play)
