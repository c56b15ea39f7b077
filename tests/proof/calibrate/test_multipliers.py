"""Multipliers of the shipped step times, from a server of known times."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from math import exp, log
from typing import Any

import pytest

from pdlab.core.types import UsageError
from pdlab.cost import CostSpec, Roofline, hardware, model
from pdlab.cost.error import cost_error
from pdlab.proof.calibrate.multipliers import ELSEWHERE, Multipliers, measure, shrunk
from pdlab.proof.calibrate.stream import Heard, MeasuredServer
from pdlab.real.net.http import HttpClient
from tests.support.virtual import VirtualLoop, run

COST = Roofline(model("llama-3.1-8b"), hardware("h100-sxm"))
ERROR = cost_error(CostSpec(), hardware("h100-sxm"))
assert ERROR is not None


class Slower(MeasuredServer):
    """Its prompts and its decode steps take so many times what is computed, its front end `request_s`."""

    def __init__(self, loop: VirtualLoop, prefill: float, decode: float, request_s: float = 0.02) -> None:
        super().__init__(HttpClient("http://here"), "m", 99)
        self.loop, self.prefill, self.decode, self.request_s = loop, prefill, decode, request_s
        self.decoding = self.asked = 0

    async def ask(self, prompt: Sequence[int], output_tokens: int, kv: Mapping[str, Any] | None = None) -> Heard:
        sent_s, self.asked = self.loop.time(), self.asked + 1
        first_s = self.decode * COST.decode_s(1, 7) if len(prompt) == 1 else self.prefill * COST.prefill_s([(len(prompt), 0)])
        await asyncio.sleep(self.request_s + first_s)
        tokens_s = [self.loop.time()]
        self.decoding += 1
        for _ in range(output_tokens - 1):
            await asyncio.sleep(0)
            context = self.decoding * (len(prompt) + output_tokens // 2)
            await asyncio.sleep(self.decode * COST.decode_s(self.decoding, context))
            tokens_s.append(self.loop.time())
        self.decoding -= 1
        return Heard(sent_s, tuple(tokens_s))


def found(prefill: float, decode: float, requests: int = 20) -> Multipliers:
    async def play(loop: VirtualLoop) -> Multipliers:
        server = Slower(loop, prefill, decode)
        made = await measure(server, COST, ERROR, requests, 4096, lambda what, share: None)
        assert server.asked == requests
        return made

    return run(play)


@pytest.mark.parametrize(("prefill", "decode"), [(1.0, 1.0), (1.3, 0.8), (0.7, 1.25)])
def test_twenty_requests_tell_what_a_server_takes(prefill, decode):
    made = found(prefill, decode)
    assert made.requests == 20
    assert made.request_s == pytest.approx(0.02, abs=1e-3)
    for one, truth in ((made.prefill, prefill), (made.decode, decode)):
        assert one.measured == pytest.approx(truth, rel=0.03)
        assert abs(log(one.value)) <= abs(log(one.measured))  # it is drawn towards 1
        assert one.value == pytest.approx(truth, rel=0.08)
        assert one.low < truth < one.high


def test_what_scatters_moves_less():
    calm, wild = shrunk([0.3, 0.3, 0.3], 0.2), shrunk([-0.6, 0.3, 1.2], 0.2)
    assert calm.measured == pytest.approx(wild.measured) == pytest.approx(exp(0.3))
    assert 1 < wild.value < calm.value < exp(0.3)
    assert wild.high / wild.low > calm.high / calm.low
    assert not calm.expected
    assert shrunk([0.3], 0.4).expected
    prior = (0.2 / 1.96) ** 2
    assert log(calm.value) == pytest.approx(0.3 * prior / (prior + ELSEWHERE**2))


def test_too_few_requests_and_too_little_room_are_said():
    with pytest.raises(UsageError, match="--requests 19: 20 are needed"):
        found(1.0, 1.0, 19)

    async def play(loop: VirtualLoop) -> Multipliers:
        return await measure(Slower(loop, 1, 1), COST, ERROR, 20, 200, lambda what, share: None)

    with pytest.raises(UsageError, match="no room for a prompt of 256"):
        run(play)
