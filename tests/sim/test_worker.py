"""An instance asks its cost model for what it runs, and remembers only what holds for every context."""

from __future__ import annotations

import math

import pytest

from pdlab.core.types import Role
from tests.support.small_world import Linear, small_world, workload


class Windowed(Linear):
    """Past a window of 256 tokens a sequence's context costs no more: the line has one bend, and none after it."""

    def decode_line(self, batch: int, context_tokens: int) -> tuple[float, float, float]:
        bend = 256 * batch
        if context_tokens < bend:
            return self.c, 1e-5, bend
        return self.c + 1e-5 * bend, 0.0, math.inf


def test_a_line_that_held_for_a_long_context_is_not_used_for_a_short_one() -> None:
    cost = Windowed()
    world = small_world(workload([0.0, 10.0], [600, 20], 30), members=(("m-0", Role.MIXED),), cost=cost)
    world.run()
    done = world.records.frame().set_index("request_id")
    for request, prompt in ((0, 600), (1, 20)):
        expected_s = sum(cost.decode_s(1, prompt + step) for step in range(1, 30))
        assert done.finish_s[request] - done.first_token_s[request] == pytest.approx(expected_s, rel=1e-9)
