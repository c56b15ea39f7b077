"""What serves the engines, told from a machine whose processor times are known."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from pdlab.cost.profile import FrontCosts
from pdlab.proof.calibrate.front import SHARE, front, solved
from pdlab.proof.calibrate.grid import Bounds
from pdlab.proof.calibrate.stream import Heard, MeasuredServer
from pdlab.real.net.http import HttpClient
from tests.support.virtual import VirtualLoop, run

STEP_S = 0.01
KNOWN = FrontCosts(request_s=0.004, step_s=0.001, token_s=0.0002)


class Machine(MeasuredServer):
    """A cluster that decodes all it has in one step of 10 ms; what serves it computes as `front` says."""

    def __init__(self, loop: VirtualLoop, front: FrontCosts, slower: float = 1.0) -> None:
        super().__init__(HttpClient("http://here"), "m", 99)
        self.loop, self.front = loop, front
        self.cpu_s = 0.0
        self.served = 1 + SHARE * (slower - 1)  # what the machine's host makes of it
        self.steps: set[float] = set()

    async def ask(self, prompt: Sequence[int], output_tokens: int, kv: Mapping[str, Any] | None = None) -> Heard:
        self.cpu_s += self.served * self.front.request_s
        sent_s = self.loop.time()
        tokens_s = []
        await asyncio.sleep(STEP_S)  # whoever comes at the same time is there, too
        for _ in range(output_tokens):
            await asyncio.sleep(STEP_S)
            now = self.loop.time()
            self.cpu_s += self.served * (self.front.token_s + (0.0 if now in self.steps else self.front.step_s))
            self.steps.add(now)
            tokens_s.append(now)
        return Heard(sent_s, tuple(tokens_s))


@pytest.mark.parametrize("seqs", [2, 16])
@pytest.mark.parametrize("known", [FrontCosts(), FrontCosts(request_s=0.008, step_s=0.0007, token_s=0.0002), FrontCosts(request_s=0.01)])
def test_request_step_and_token_are_told_apart(known: FrontCosts, seqs: int) -> None:
    async def play(loop: VirtualLoop) -> FrontCosts:
        machine = Machine(loop, known)
        return await front(machine, Bounds(step_tokens=512, seqs=seqs, max_tokens=2048, kv_tokens=20000), lambda: machine.cpu_s)

    assert run(play).model_dump() == pytest.approx(known.model_dump(), abs=1e-9)


def test_what_the_host_adds_to_its_time_is_left_out() -> None:
    async def play(loop: VirtualLoop) -> FrontCosts:
        machine = Machine(loop, KNOWN, slower=1.8)
        bounds = Bounds(step_tokens=512, seqs=4, max_tokens=2048, kv_tokens=20000)
        return await front(machine, bounds, lambda: machine.cpu_s, slower=lambda began_s, ended_s, prefill: 1.8)

    assert run(play).model_dump() == pytest.approx(KNOWN.model_dump())


def test_noise_makes_no_part_negative_nor_adds_to_what_one_request_costs() -> None:
    fewer_together = solved(0.004, 0.1, 0.05, long=80, together=4)
    assert fewer_together.token_s == 0.0
    more_together = solved(0.004, 0.1, 9.0, long=80, together=4)
    assert more_together.step_s == 0.0
    for found in (fewer_together, more_together):
        assert found.step_s + found.token_s == pytest.approx(0.096 / 78)
    assert solved(0.1, 0.05, 0.2, long=80, together=4) == FrontCosts(request_s=0.1)
