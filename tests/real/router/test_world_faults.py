"""Nothing is lost: whatever dies, fills up, falls silent or goes away, every request ends in time, and its client has each token once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdlab.core.types import RegistryAway, Stage
from pdlab.experiment.experiment import Experiment
from pdlab.real.api.backend import Ended
from tests.support import virtual_cluster
from tests.support.virtual_cluster import DECODE_FIRST, PULL, PUSH, TRANSFERS, Client, Run, played

SLOW = {"network": {"gbytes_per_s": 1.0, "latency_us": 10}}  # a prompt of 2000 tokens takes 0.26 s
MOMENTS = [0.001, 0.02, 0.06, 0.1, 0.2, 0.3, 0.35, 0.4, 0.5, 0.7]  # from before prefill until after the end


def cluster(transfer: dict[str, Any], prefill: int = 2, decode: int = 2, **rest: Any) -> Experiment:
    return virtual_cluster.cluster(transfer, prefill, decode, cluster=SLOW, **rest)


def stage(client: Client) -> Stage:
    assert isinstance(client.ended, Ended), client.ended
    return client.ended.stage


@TRANSFERS
@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_a_request_survives_the_death_of_an_instance_at_any_moment(victim: str, transfer: dict[str, Any]) -> None:
    for moment in MOMENTS:

        async def play(made: Run, moment: float = moment) -> None:
            for _ in range(3):
                made.submit(2000, 40)
            await asyncio.sleep(moment)
            made.rack.instances[victim].kill()
            made.submit(300, 10)

        made = played(cluster(transfer), play)
        assert all(c.done for c in made.clients.values()), moment


@TRANSFERS
@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_a_role_that_dies_out_comes_back(victim: str, transfer: dict[str, Any]) -> None:
    async def play(made: Run) -> None:
        for _ in range(4):
            made.submit(1000, 30)
        await asyncio.sleep(0.15)
        made.rack.instances[victim].kill()
        await asyncio.sleep(0.5)
        made.rack.bring_up(victim)

    made = played(cluster(transfer, 1, 1), play)
    assert all(c.done for c in made.clients.values())


@TRANSFERS
def test_broken_connections_cost_an_attempt_and_no_token(transfer: dict[str, Any]) -> None:
    for moment in MOMENTS:

        async def play(made: Run, moment: float = moment) -> None:
            made.submit(2000, 60)
            await asyncio.sleep(moment)
            for instance in made.rack.instances.values():
                instance.cut()

        made = played(cluster(transfer), play)
        assert made.clients[0].done, moment
        assert not any(member.gone for member in made.world.instances.members.values())


@TRANSFERS
def test_a_client_that_goes_at_any_moment_leaves_nothing_behind(transfer: dict[str, Any]) -> None:
    for moment in MOMENTS:

        async def play(made: Run, moment: float = moment) -> None:
            clients = [made.submit(2000, 60) for _ in range(4)]
            await asyncio.sleep(moment)
            made.world.cancel(0)
            made.world.cancel(1)
            made.world.cancel(1)
            assert stage(clients[0]) is Stage.ABORTED
            assert clients[0].ended is not None
            assert clients[0].ended.finish == "abort"

        made = played(cluster(transfer), play)
        assert all(made.clients[i].done for i in (2, 3))


def test_a_stop_string_is_a_success_at_any_moment() -> None:
    for moment in MOMENTS[2:]:

        async def play(made: Run, moment: float = moment) -> None:
            made.submit(2000, 60)
            await asyncio.sleep(moment)
            made.world.cancel(0, 0)
            made.clients.clear()

        made = played(cluster(PULL), play)
        assert made.world.timeline(0)["status"] == "done"


@TRANSFERS
def test_full_instances_make_requests_wait_and_lose_none(transfer: dict[str, Any]) -> None:
    async def play(made: Run) -> None:
        for i in range(40):
            made.submit(200 + 37 * i % 900, 10 + 7 * i % 50)
            await asyncio.sleep(0.01)

    made = played(cluster(transfer, 1, 2, engine={"kv_blocks": 150}), play)
    assert all(c.done for c in made.clients.values())


def test_what_no_instance_can_hold_fails_with_a_word_for_the_client() -> None:
    async def play(made: Run) -> None:
        made.submit(5000, 10)

    made = played(cluster(PULL, engine={"kv_blocks": 150}), play)
    ended = made.clients[0].ended
    assert isinstance(ended, Ended)
    assert ended.stage is Stage.FAILED
    assert ended.unfit
    assert "313 KV blocks, more than the 150 that prefill-0 has" in ended.error


def test_without_instances_a_request_is_rejected_at_once() -> None:
    async def play(made: Run) -> None:
        for instance in made.rack.instances.values():
            instance.kill()
            made.world.instances.leave(instance.name, 0)
        made.submit(10, 10)
        assert stage(made.clients[0]) is Stage.REJECTED

    played(cluster(PULL), play)


def test_an_instance_that_stands_still_costs_a_request_its_deadline() -> None:
    async def play(made: Run) -> None:
        made.submit(2000, 300)
        await asyncio.sleep(0.6)
        made.rack.instances["decode-0"].stalled = True
        await made.until(lambda: made.clients[0].ended is not None, 70.0)
        made.rack.instances["decode-0"].stalled = False
        made.rack.instances["decode-0"].kick()

    made = played(cluster(PULL, 1, 1), play)
    assert stage(made.clients[0]) is Stage.EXPIRED
    assert made.loop.time() < 63.0


def test_an_instance_whose_reports_are_lost_is_fenced_and_its_requests_go_elsewhere() -> None:
    async def play(made: Run) -> None:
        made.rack.instances["decode-0"].silent = True
        made.submit(1000, 20)
        await asyncio.sleep(30.0)
        made.submit(1000, 20)
        assert made.world.instances.members["decode-0"].gone

    made = played(cluster(PULL), play)
    assert all(c.done for c in made.clients.values())


def test_a_transfer_that_fails_is_tried_with_another_instance() -> None:
    async def play(made: Run) -> None:
        made.submit(2000, 40)
        await asyncio.sleep(0.15)  # on its way to decode-0
        made.rack.wire.network.scale_bandwidth("decode-0", 0.0)

    made = played(cluster(PULL), play)
    assert made.clients[0].done
    line = made.world.timeline(0)
    assert line["decode_instance"] == "decode-1"
    assert line["attempts"] == 2


def test_kv_that_waits_longer_than_its_lease_is_renewed() -> None:
    async def play(made: Run) -> None:
        decode = made.rack.instances["decode-0"]
        decode.refuses = True
        made.submit(1000, 20)
        await asyncio.sleep(45.0)
        decode.refuses = False

    made = played(cluster(PULL, 1, 1), play)
    assert made.clients[0].done
    assert made.world.timeline(0)["attempts"] == 1


def test_a_lease_that_has_ended_costs_an_attempt() -> None:
    async def play(made: Run) -> None:
        decode, prefill = made.rack.instances["decode-0"], made.rack.instances["prefill-0"]
        decode.refuses = True
        made.submit(1000, 20)
        await asyncio.sleep(1.0)
        for lease in list(prefill.leases):
            prefill._end_lease(lease)
        await asyncio.sleep(11.0)
        decode.refuses = False

    made = played(cluster(PULL, 1, 1), play)
    assert made.clients[0].done
    assert made.world.timeline(0)["attempts"] == 2


@TRANSFERS
def test_while_the_registry_is_away_requests_go_on_for_as_long_as_it_lasts(transfer: dict[str, Any]) -> None:
    """It brings no reports: they are asked of the instances."""

    async def play(made: Run) -> None:
        for instance in made.rack.instances.values():
            instance.silent = True
        made.world.instances.other(RegistryAway())
        for _ in range(60):
            made.submit(300, 10)
            await asyncio.sleep(1.0)
        assert all(x.ready for x in made.world.router.cluster.instances)
        for instance in made.rack.instances.values():
            instance.silent = False
        made.world.instances.other(RegistryAway(False))

    made = played(cluster(transfer), play)
    assert all(client.done for client in made.clients.values())
    assert all(made.world.timeline(client.id)["attempts"] == 1 for client in made.clients.values())


def test_who_dies_while_the_registry_is_away_is_found_out_and_who_stands_still_too() -> None:
    async def play(made: Run) -> None:
        for instance in made.rack.instances.values():
            instance.silent = True
        made.world.instances.other(RegistryAway())
        made.submit(1000, 20)
        await asyncio.sleep(0.05)
        made.rack.instances["prefill-0"].kill()
        made.rack.instances["decode-0"].stalled = True
        await asyncio.sleep(40.0)
        made.submit(1000, 20)
        gone = {name for name, member in made.world.instances.members.items() if member.gone}
        assert gone == {"prefill-0", "decode-0"}

    made = played(cluster(PULL), play)
    assert all(client.done for client in made.clients.values())


@TRANSFERS
def test_an_instance_that_is_slow_to_answer_probes_is_not_dead_while_it_reports(transfer: dict[str, Any]) -> None:
    """Its connections broke, all at once: it is asked once, not once for each."""
    for moment in MOMENTS[1:]:

        async def play(made: Run, moment: float = moment) -> None:
            for _ in range(20):
                made.submit(200, 30)
            await asyncio.sleep(moment)
            for instance in made.rack.instances.values():
                instance.slow = True
                instance.cut()
            await asyncio.sleep(3.0)
            assert all(instance.probes <= 2 for instance in made.rack.instances.values())
            for instance in made.rack.instances.values():
                instance.slow = False

        made = played(cluster(transfer), play)
        assert all(client.done for client in made.clients.values()), moment
        assert not any(member.gone for member in made.world.instances.members.values())


def test_an_instance_that_neither_reports_nor_answers_is_dead_after_the_last_probe() -> None:
    """Of 1, 2 and 4 s."""

    async def play(made: Run) -> None:
        victim, member = made.rack.instances["decode-0"], made.world.instances.members["decode-0"]
        for _ in range(6):
            made.submit(1000, 600)
        await asyncio.sleep(0.6)
        assert victim.jobs
        victim.slow = victim.silent = victim.stalled = True
        await asyncio.sleep(3.5)
        victim.cut()
        await asyncio.sleep(6.9)
        assert not member.gone and victim.probes == 3
        await asyncio.sleep(0.2)
        assert member.gone
        victim.slow = victim.stalled = False
        victim.kick()

    made = played(cluster(PULL), play)
    assert all(client.done for client in made.clients.values())


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_one_that_takes_nothing_more_for_a_while_costs_no_attempt(victim: str) -> None:
    async def play(made: Run) -> None:
        made.rack.instances[victim].refuses = True
        for _ in range(5):
            made.submit(500, 20)
        await asyncio.sleep(8.0)
        assert not any(client.ended for client in made.clients.values())
        assert len(made.rack.asked) < 40, "asked again at each report, not all the time"
        made.rack.instances[victim].refuses = False

    made = played(cluster(PULL, 1, 1), play)
    assert all(client.done for client in made.clients.values())


FAULT = st.tuples(
    st.floats(0.0, 2.0),
    st.sampled_from(["kill", "cut", "silent", "stall", "gone", "revive"]),
    st.integers(0, 3),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    requests=st.lists(st.tuples(st.floats(0.0, 1.5), st.integers(1, 1500), st.integers(1, 60)), min_size=1, max_size=12),
    faults=st.lists(FAULT, max_size=6),
    transfer=st.sampled_from([PULL, PUSH, DECODE_FIRST]),
    policy=st.sampled_from(["least_loaded", "prefix_aware", {"dispatch": "least_loaded", "handoff": "least_kv", "migrate": "freeness"}]),
    blocks=st.sampled_from([200, 2000]),
)
def test_every_request_ends_under_any_mix_of_faults(
    requests: list[tuple[float, int, int]],
    faults: list[tuple[float, str, int]],
    transfer: dict[str, Any],
    policy: Any,
    blocks: int,
) -> None:
    experiment = cluster(transfer, policy=policy, engine={"kv_blocks": blocks})
    names = ("prefill-0", "prefill-1", "decode-0", "decode-1")

    def strike(made: Run, fault: str, which: int) -> None:
        instance = made.rack.instances[names[which]]
        if fault == "kill":
            instance.kill()
        elif fault == "cut":
            instance.cut()
        elif fault == "silent":
            instance.silent = True
        elif fault == "stall":
            instance.stalled = True
        elif fault == "gone":
            made.world.cancel(which)
        elif not instance.is_alive:
            made.rack.bring_up(instance.name)

    async def play(made: Run) -> None:
        for at_s, prompt, output in sorted(requests):
            made.submit_at(at_s, prompt, output)
        for at_s, fault, which in faults:
            made.loop.call_at(at_s, strike, made, fault, which)
        await made.until(lambda: len(made.clients) == len(requests) and made.loop.time() > 2.0, 10.0)
        await made.until(lambda: not made.world.requests.by_id, 65.0)
        for instance in made.rack.instances.values():
            instance.stalled = False
            instance.kick()

    made = played(experiment, play)
    for client in made.clients.values():
        assert isinstance(client.ended, Ended) or client.done
