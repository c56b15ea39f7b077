"""One queue, one order of events and actions, one log: whoever performs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pdlab.core.policy import Policy
from pdlab.core.router import Router
from pdlab.core.teller import Teller
from pdlab.core.types import (
    Action,
    Arrived,
    Dispatch,
    End,
    Finished,
    InstanceSpec,
    Joined,
    Migrate,
    PrefillDone,
    Refused,
    Request,
    Role,
    Tick,
    UsageError,
)
from pdlab.core.view import Cluster, Instance
from pdlab.replay.log import EventLog, Head, read
from tests.support.small_world import small_world, workload

HEAD = Head(pdlab="", seed=0, policy="", policy_hash="", hash_tokens=16, experiment={})


class Stage:
    """A world that writes down what it is asked to do; `reply` is called for each action, and may tell more."""

    def __init__(self, router: Router, reply: Callable[[Action], None], log: EventLog | None = None) -> None:
        self.done: list[tuple[str, int]] = []
        self.events: list[str] = []
        self.teller = Teller(router, dict.fromkeys((Dispatch, End, Migrate), self.perform), log)
        self.teller.on_event = lambda event, actions: self.events.append(type(event).__name__)
        self.reply = reply
        for name in ("m-0", "m-1"):
            self.teller.tell(Joined(InstanceSpec(name=name, role=Role.MIXED, kv_blocks=1000)), 0.0)

    def perform(self, action: Any) -> None:
        self.done.append((type(action).__name__, action.request_id))
        self.reply(action)


class Once(Policy):
    """Nobody may prefill before the third request is there; then all are dispatched with one answer."""

    def __init__(self) -> None:
        self.open = False

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | None:
        return cluster.prefill[request.id % 2] if self.open else None


def test_what_arises_while_actions_are_performed_waits_for_the_last_of_them(tmp_path: Path) -> None:
    policy = Once()

    def reply(action: Action) -> None:
        """The first of three dispatches is done at once, and what ends it brings the fourth request."""
        if isinstance(action, Dispatch) and action.request_id == 0:
            stage.teller.tell(PrefillDone(0, 1, "m-0"), 5.0)
            stage.teller.tell(Finished(0, 1, "m-0", 1), 6.0)
            stage.teller.tell(Arrived(Request(3, 6.0, 10)), 6.0)
            assert stage.done == [("Dispatch", 0)], "nothing of it is done yet"

    with EventLog(tmp_path / "log", HEAD) as log:
        stage = Stage(Router(policy), reply, log)
        for id in range(3):
            stage.teller.tell(Arrived(Request(id, 0.0, 10)), 0.0)
        policy.open = True
        stage.teller.tell(Tick(), 4.0)
    assert stage.done == [("Dispatch", id) for id in range(4)]
    assert stage.events == ["Joined"] * 2 + ["Arrived"] * 3 + ["Tick", "PrefillDone", "Finished", "Arrived"]
    entries = list(read(tmp_path / "log")[1])
    assert [type(entry.event).__name__ for entry in entries] == stage.events
    assert [entry.now for entry in entries[5:]] == [4.0, 5.0, 6.0, 6.0], "each has its own time"
    policy = Once()
    fresh, replayed = Router(policy), 0
    for place, entry in enumerate(entries):
        policy.open = place >= 5
        replayed += fresh.handle(entry.event, entry.now) == entry.actions
    assert replayed == len(entries)


class Breaks(Policy):
    def dispatch(self, request: Request, cluster: Cluster) -> Instance:
        if request.id == 2:
            raise ZeroDivisionError("division by zero")
        return cluster.prefill[0]


def test_after_a_policys_mistake_nothing_is_told_any_more() -> None:
    def reply(action: Action) -> None:
        stage.teller.tell(Arrived(Request(2, 0.0, 10)), 0.0)
        stage.teller.tell(Arrived(Request(3, 0.0, 10)), 0.0)

    stage = Stage(Router(Breaks()), reply)
    with pytest.raises(UsageError, match=r"Breaks\.dispatch for request 2"):
        stage.teller.tell(Arrived(Request(1, 0.0, 10)), 0.0)
    assert stage.teller.down is not None and "ZeroDivisionError" in stage.teller.down
    stage.teller.tell(Arrived(Request(4, 0.0, 10)), 0.0)
    assert stage.done == [("Dispatch", 1)]
    assert stage.events == ["Joined", "Joined", "Arrived"]


def test_a_world_that_cannot_do_what_it_is_asked_says_that_it_is_a_bug() -> None:
    stage = Stage(Router(Policy()), lambda action: None)
    stage.teller.perform.clear()
    with pytest.raises(KeyError):
        stage.teller.tell(Arrived(Request(1, 0.0, 10)), 0.0)
    assert stage.teller.down is not None and stage.teller.down.startswith("the router has a bug: KeyError")


def test_a_log_that_has_no_room_left_ends_and_the_rest_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    with EventLog(Path("/dev/full"), HEAD, warn=said.append) as log:
        stage = Stage(Router(Policy()), lambda action: None, log)
        for id in range(200):
            stage.teller.tell(Arrived(Request(id, 0.25, 10)), 0.25)
        assert len(said) == 1 and said[0].startswith("the event log stopped at 0.250 s (No space left on device): /dev/full")
        assert log.dropped > 50 and len(stage.done) == 200
    assert len(said) == 1 and said == [log.stopped]


def test_as_many_refusals_in_a_row_as_there_are_instances() -> None:
    """One would be asked within the other, 600 deep, if what arises did not wait."""
    decoders = [(f"d-{number}", Role.DECODE) for number in range(600)]
    full = 601
    world = small_world(
        workload([0.0] * full, 300, 50),
        members=[("p-0", Role.PREFILL), *decoders],
        kv_blocks=25,
        reserve_first=True,
        check=False,
    )
    refusals = 0

    def count(event: object, _: object) -> None:
        nonlocal refusals
        refusals += isinstance(event, Refused)

    world.teller.on_event = count
    world.run()
    assert len(world.records) == full and refusals >= 600
