"""Instances that a router reaches and that do not reach each other: requests take another way, and where there is none they are decoded
where they were prefilled; the way is tried again when it may be open."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from pdlab.core.types import Dispatch, Handoff, Migrated, Refused, Transferred
from pdlab.experiment.make_router import router
from pdlab.replay.log import read, replay
from tests.support.virtual_cluster import PULL, TIMEOUT_S, TRANSFERS, Client, Run, cluster, played

NEVER_S = 1e6
LINK = ("prefill-0", "decode-0")


async def ended(made: Run, *clients: Client) -> None:
    await made.until(lambda: all(client.ended for client in clients), 70.0)


def where(made: Run, client: Client) -> tuple[object, object]:
    """(who decoded it, at which attempt)"""
    line = made.world.timeline(client.id)
    return line["decode_instance"], line["attempts"]


def test_what_does_not_get_through_is_decoded_where_it_is_without_being_computed_again() -> None:
    async def play(made: Run) -> None:
        made.rack.cuts[LINK] = 0.1
        clients = [made.submit(1000, 40) for _ in range(5)]
        await ended(made, *clients)
        clients.append(made.submit(1000, 40))
        await ended(made, *clients)
        assert {where(made, client) for client in clients} == {("prefill-0", 1)}

    made = played(cluster(PULL), play)
    assert all(client.done for client in made.clients.values())


def test_what_fails_at_once_is_read_by_another_without_being_computed_again() -> None:
    async def play(made: Run) -> None:
        made.rack.cuts[LINK] = 0.1
        clients = [made.submit(1000, 40) for _ in range(4)]
        await ended(made, *clients)
        assert {where(made, client) for client in clients} == {("decode-1", 1)}

    made = played(cluster(PULL, 1, 2), play)
    assert all(client.done for client in made.clients.values())


@TRANSFERS
def test_the_router_is_told_of_nothing_that_did_not_happen(transfer: dict[str, Any], tmp_path: Path) -> None:
    """Who refuses was asked, who has been given a request was to be, and no transfer ends that has not begun."""

    async def play(made: Run) -> None:
        made.rack.cuts[LINK] = 0.2
        for at in range(12):
            made.submit_at(made.loop.time() + 0.5 * at, 500, 30)
        await made.until(lambda: len(made.clients) == 12, 30.0)

    for decode in (1, 2):
        played(cluster(transfer, 1, decode), play, tmp_path / "log")
        asked: set[tuple[int, str]] = set()
        for entry in read(tmp_path / "log")[1]:
            event = entry.event
            assert not isinstance(event, Migrated), f"nobody asked for {event}"
            if isinstance(event, Refused | Transferred):
                assert (event.request_id, event.instance) in asked, f"{event} of one who was not asked"
            for action in entry.actions:
                if isinstance(action, Dispatch) and action.decode not in (None, action.instance):
                    asked.add((action.request_id, str(action.decode)))
                elif isinstance(action, Handoff) and action.src != action.dst:
                    asked.add((action.request_id, action.dst))


@TRANSFERS
def test_the_first_to_wait_in_vain_costs_an_attempt_and_the_next_do_not_wait(transfer: dict[str, Any]) -> None:
    async def play(made: Run) -> None:
        made.rack.cuts[LINK] = NEVER_S
        first = made.submit(1000, 40)
        await ended(made, first)
        assert where(made, first) == ("prefill-0", 2)
        began_s = made.loop.time()
        later = [made.submit(1000, 40) for _ in range(4)]
        await ended(made, *later)
        assert made.loop.time() - began_s < TIMEOUT_S
        assert {where(made, client) for client in later} == {("prefill-0", 1)}

    made = played(cluster(transfer), play)
    assert all(client.done for client in made.clients.values())


@TRANSFERS
def test_one_request_at_a_time_finds_out_whether_the_way_is_open_again(transfer: dict[str, Any]) -> None:
    async def play(made: Run) -> None:
        made.rack.cuts[LINK] = NEVER_S
        await ended(made, made.submit(1000, 40))
        await asyncio.sleep(6.0)
        several = [made.submit(1000, 40) for _ in range(4)]
        await ended(made, *several)
        assert sorted(where(made, client) for client in several) == [*[("prefill-0", 1)] * 3, ("prefill-0", 2)]
        made.rack.cuts.clear()
        await asyncio.sleep(4.0)
        soon = made.submit(1000, 40)
        await ended(made, soon)
        assert where(made, soon) == ("prefill-0", 1)
        await asyncio.sleep(10.0)
        healed = made.submit(1000, 40)
        await ended(made, healed)
        after = [made.submit(1000, 40) for _ in range(4)]
        await ended(made, *after)
        assert {where(made, client) for client in [healed, *after]} == {("decode-0", 1)}

    made = played(cluster(transfer), play)
    assert all(client.done for client in made.clients.values())


@TRANSFERS
def test_where_others_decode_the_next_requests_go_there(transfer: dict[str, Any]) -> None:
    async def play(made: Run) -> None:
        made.rack.cuts[LINK] = NEVER_S
        first = made.submit(1000, 40)
        await ended(made, first)
        assert where(made, first) == ("decode-1", 2)
        later = [made.submit(1000, 40) for _ in range(6)]
        await ended(made, *later)
        assert {where(made, client) for client in later} == {("decode-1", 1)}

    made = played(cluster(transfer, 1, 2), play)
    assert all(client.done for client in made.clients.values())


@TRANSFERS
@pytest.mark.parametrize("policy", ["least_loaded", "prefix_aware", "round_robin", {"dispatch": "least_loaded", "migrate": "freeness"}])
def test_one_way_of_several_cut_loses_no_request(policy: Any, transfer: dict[str, Any]) -> None:
    async def play(made: Run) -> None:
        made.rack.cuts[LINK] = NEVER_S
        for at in range(40):
            made.submit_at(made.loop.time() + 0.3 * at, 200 + 30 * at, 30)
        await made.until(lambda: len(made.clients) == 40, 30.0)

    for prefill, decode in ((2, 1), (2, 2)):
        made = played(cluster(transfer, prefill, decode, policy), play)
        assert all(client.done for client in made.clients.values())


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
@TRANSFERS
def test_either_end_may_die_while_requests_stay_where_they_are(transfer: dict[str, Any], victim: str) -> None:
    async def play(made: Run) -> None:
        made.rack.cuts[LINK] = NEVER_S
        await ended(made, made.submit(1000, 40))
        for moment in (0.0, 0.01, 0.2):
            clients = [made.submit(1000, 60) for _ in range(3)]
            await asyncio.sleep(moment)
            made.rack.instances[victim].kill()
            await ended(made, *clients)
            made.rack.bring_up(victim)
            await asyncio.sleep(0.1)

    made = played(cluster(transfer), play)
    assert all(client.done for client in made.clients.values())


def test_a_lease_that_has_ended_is_not_held_against_the_way() -> None:
    async def play(made: Run) -> None:
        decode, prefill = made.rack.instances["decode-0"], made.rack.instances["prefill-0"]
        decode.refuses = True
        made.submit(1000, 20)
        await asyncio.sleep(1.0)
        for lease in list(prefill.leases):
            prefill._end_lease(lease)
        decode.refuses = False
        await ended(made, *made.clients.values())
        assert where(made, made.clients[0]) == ("decode-0", 2)

    played(cluster(PULL), play)


@TRANSFERS
def test_what_the_router_was_told_replays_to_the_same_actions(transfer: dict[str, Any], tmp_path: Path) -> None:
    async def play(made: Run) -> None:
        made.rack.cuts[LINK] = 0.2
        for at in range(20):
            made.submit_at(made.loop.time() + 0.5 * at, 500, 30)
        await made.until(lambda: len(made.clients) == 20, 30.0)

    experiment = cluster(transfer, 1, 2)
    played(experiment, play, tmp_path / "log")
    head, entries = read(tmp_path / "log")
    assert replay(entries, router(experiment, hash_tokens=head.hash_tokens))[1] is None
