"""Running requests move from one decode instance to another, over and over, and their clients do not notice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from pdlab.core.policy import Policy
from pdlab.core.types import Stage
from pdlab.core.view import Cluster, Instance
from tests.support.virtual_cluster import Run, cluster, played


@dataclass
class Shuttle(Policy):
    """Moves every running request to the next decode instance whenever it is asked. For tests."""

    tick_s: float | None = 0.1

    def migrate(self, cluster: Cluster) -> Sequence[tuple[int, Instance]]:
        decode = cluster.decode
        running = [live for live in cluster.live.values() if live.stage is Stage.DECODE and live.decode is not None]
        return [(live.request.id, decode[(decode.index(live.decode) + 1) % len(decode)]) for live in running if live.decode in decode]


def shuttled(play: Callable[[Run], Coroutine[Any, Any, None]]) -> Run:
    network = {"network": {"gbytes_per_s": 5.0, "latency_us": 10}}
    return played(cluster({}, decode=2, policy=f"{__file__}:Shuttle", cluster=network), play)


def test_tokens_go_on_in_order_through_every_migration() -> None:
    async def play(made: Run) -> None:
        for i in range(4):
            made.submit(400 + 100 * i, 300)

    made = shuttled(play)
    assert all(c.done for c in made.clients.values())
    assert made.world.lines.book.records.column("migrations").min() >= 3
    assert made.world.lines.book.records.column("attempts").max() == 1


@pytest.mark.parametrize("victim", ["decode-0", "decode-1"])
def test_the_death_of_either_end_at_any_moment_loses_nothing(victim: str) -> None:
    for k in range(40):

        async def play(made: Run, k: int = k) -> None:
            for _ in range(3):
                made.submit(600, 120)
            await asyncio.sleep(0.2 + k * 0.0083)
            made.rack.instances[victim].kill()

        made = shuttled(play)
        assert all(c.done for c in made.clients.values()), k


def test_a_destination_that_is_full_leaves_the_request_where_it_is() -> None:
    async def play(made: Run) -> None:
        made.submit(600, 120)
        await asyncio.sleep(0.08)
        for name in ("decode-0", "decode-1"):
            made.rack.instances[name].refuses = True

    made = shuttled(play)
    assert made.clients[0].done
    assert made.world.timeline(0)["migrations"] == 0


def test_a_client_that_goes_during_a_migration_leaves_nothing_behind() -> None:
    for k in range(20):

        async def play(made: Run, k: int = k) -> None:
            made.submit(600, 400)
            made.submit(600, 120)
            await asyncio.sleep(0.19 + k * 0.0027)
            made.world.cancel(0)

        made = shuttled(play)
        assert made.clients[1].done, k


@pytest.mark.parametrize("unable", ["decode-0", "decode-1"])
def test_nothing_is_asked_of_an_instance_that_cannot_take_or_give_a_running_request(unable: str) -> None:
    async def play(made: Run) -> None:
        made.rack.instances[unable].kill()
        made.rack.bring_up(unable, capabilities=("pull", "reserve", "made"))
        await asyncio.sleep(0.1)
        for i in range(4):
            made.submit(400 + 100 * i, 300)

    made = shuttled(play)
    assert all(c.done for c in made.clients.values())
    assert not [ask for ask in made.rack.asked if ask.params is not None and ask.params.pdlab is not None and ask.params.pdlab.migrate]


def test_of_two_that_do_not_reach_each_other_neither_is_asked_again_and_again() -> None:
    async def play(made: Run) -> None:
        made.rack.cut("decode-0", "decode-1", 0.01)
        made.submit(600, 400)

    made = shuttled(play)
    assert made.clients[0].done
    migrations = [ask for ask in made.rack.asked if ask.params is not None and ask.params.pdlab is not None and ask.params.pdlab.migrate]
    assert len(migrations) == 1, "2 s of decoding, and 0.1 s between two tries"
    assert made.world.timeline(0)["migrations"] == 0
