"""Who takes part: what does not fit is kept out and said once, and of several routers one leads."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from typing import Any

import pytest

from pdlab.core.types import AnyEvent, InstanceSpec, Joined, Leads, Left, Report, Role, Suspected, Switched
from pdlab.real.router.roster import Members, follow, lead
from pdlab.real.transfer.descriptor import Descriptor, Geometry
from tests.support.registry_worlds import MemoryWorld, spec


class Told:
    """What a world's instances were told."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def join(self, spec: InstanceSpec) -> None:
        self.events.append(Joined(spec))

    def leave(self, name: str, incarnation: int) -> None:
        self.events.append(Left(name, incarnation))

    def report(self, report: Report) -> None:
        self.events.append(report)

    def other(self, event: AnyEvent) -> None:
        self.events.append(event)


def descriptor(name: str, **changes: Any) -> str:
    shape = {"layers": 2, "kv_heads": 1, "block_tokens": 16, "head_dim": 8, "dtype": "float32", "model_hash": "m", **changes}
    return Descriptor(name, "1", "here", Geometry(**shape), 100).encode().decode()


def joined(name: str, incarnation: int = 1, **more: Any) -> Joined:
    return Joined(spec(name, incarnation=incarnation, **more))


def test_a_router_reads_descriptors_without_torch() -> None:
    code = "import sys, pdlab.real.launch.serve, pdlab.real.transfer.descriptor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=180).returncode == 0


def test_kv_that_does_not_fit_is_kept_out_until_who_kept_it_out_has_left(caplog: pytest.LogCaptureFixture) -> None:
    members = Members()
    first, other = joined("p0", descriptor=descriptor("p0")), joined("d0", descriptor=descriptor("d0", block_tokens=24))
    report = Report("d0", 1)
    assert members.hear(first) == [first]
    with caplog.at_level(logging.WARNING):
        assert members.hear(other) == members.hear(other) == members.hear(report) == []
    assert [record.getMessage() for record in caplog.records] == [
        "d0 takes no part: KV does not fit: block_tokens 16 at p0 and 24 at d0: one must be a multiple of the other",
    ]
    assert members.known["d0"].state == "refused"
    assert members.hear(Left("p0", 1)) == [Left("p0", 1), other, report]
    assert members.known["d0"].state == "ready"


@pytest.mark.parametrize(
    ("event", "protocol", "why"),
    [
        (joined("d0", model="other"), 1, "it serves other, and this cluster mine: start it with --served-model-name mine"),
        (joined("d0", model="mine"), 2, "it speaks pdlab's protocol 2, and this is 1"),
        (joined("d0", descriptor="{}"), 1, "descriptor cannot be read"),
    ],
)
def test_another_model_protocol_or_an_unreadable_descriptor_is_refused(event: Joined, protocol: int, why: str) -> None:
    members = Members("mine")
    members.hear(joined("p0", model="mine", descriptor=descriptor("p0")))
    assert members.hear(event, protocol) == []
    assert why in members.known["d0"].refusal
    assert members.hear(Left("d0", 1)) == []
    assert "d0" not in members.known


def test_a_vllm_server_needs_no_descriptor_but_the_model() -> None:
    members = Members("mine")
    assert members.hear(joined("v0", engine="vllm", model="mine"))
    assert not members.hear(joined("v1", engine="vllm", model="other"))


def test_engines_that_cannot_read_each_others_kv_are_not_mixed() -> None:
    members = Members("mine")
    members.hear(joined("p0", model="mine", descriptor=descriptor("p0")))
    assert not members.hear(joined("v0", engine="vllm", model="mine"))
    assert "vllm" in members.known["v0"].refusal
    assert [type(event) for event in members.hear(Left("p0", 1))] == [Left, Joined]


def test_what_an_older_incarnation_says_is_of_no_account() -> None:
    members = Members()
    members.hear(joined("p0", 2))
    assert members.hear(Report("p0", 1)) == members.hear(Left("p0", 1)) == members.hear(Suspected("p0", 1)) == []
    assert members.hear(Suspected("p0", 2)) == [Suspected("p0", 2)]
    assert members.known["p0"].state == "suspect"


def test_a_restart_may_fit_where_its_forerunner_did_not() -> None:
    members = Members("mine")
    members.hear(joined("p0", 1, model="other"))
    again = joined("p0", 2, model="mine")
    assert members.hear(Left("p0", 1)) == []
    assert members.hear(again) == [again]


def test_the_world_is_told_what_happens_in_the_registry() -> None:
    world, told, said = MemoryWorld(), Told(), []

    async def nobody_asked(_: InstanceSpec) -> int:
        return 1

    async def main() -> None:
        router, instance = await world.open(), await world.open()
        following = asyncio.create_task(follow(router, told, Members(), ask=nobody_asked, say=said.append))
        here = await instance.register(spec("p0"), lease_s=world.lease_s)
        await asyncio.sleep(0.1)
        await here.report(Report("p0", running=3))
        await here.update(spec("p0", role=Role.MIXED))
        await asyncio.sleep(0.1)
        await here.drop()
        await asyncio.sleep(1.3 * world.lease_s)
        await router.close()
        await following

    world.run(main)
    kinds = [type(event) for event in told.events]
    assert kinds == [Joined, Report, Joined, Left]
    assert Switched not in kinds  # join has said so
    assert told.events[2].spec.role is Role.MIXED
    assert said == [
        "p0 is ready: prefill, http://127.0.0.1/p0",
        "p0 is ready: mixed, http://127.0.0.1/p0",
        "p0 has left",
    ]


def test_one_router_leads_and_another_after_it() -> None:
    world, one, two = MemoryWorld(), Told(), Told()

    async def main() -> None:
        first, second = await world.open(), await world.open()
        leading = asyncio.create_task(lead(first, one, "r1", lease_s=world.lease_s))
        await asyncio.sleep(0.1)
        waiting = asyncio.create_task(lead(second, two, "r2", lease_s=world.lease_s))
        await asyncio.sleep(2 * world.lease_s)
        assert (one.events, two.events) == ([Leads(False), Leads(True)], [Leads(False)])
        leading.cancel()
        await asyncio.sleep(2 * world.lease_s)
        assert two.events[-1] == Leads(True)
        waiting.cancel()
        await asyncio.gather(leading, waiting, return_exceptions=True)

    world.run(main)
