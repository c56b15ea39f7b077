"""What a router shows of what has happened: numbered, in order, and bounded."""

from __future__ import annotations

from pdlab.core.types import Arrived, Drained, Joined, Left, Migrated, Refused, Request, Role, Switch, Switched, Tick
from pdlab.real.router.onlooker import MOST, Onlooker
from tests.support.registry_worlds import spec


def test_members_and_moves_are_told_and_what_comes_with_every_request_is_not() -> None:
    onlooker = Onlooker(lambda: 2.5)
    onlooker.heard(Joined(spec("d0", Role.DECODE)), [])
    onlooker.heard(Arrived(Request(1, 0.0, 8)), [])
    onlooker.heard(Tick(), [Switch("d0", Role.MIXED)])
    onlooker.heard(Switched("d0", 1, Role.MIXED), [])
    onlooker.heard(Refused(7, 1, "d0"), [])
    onlooker.heard(Migrated(7, 1, "d0", "d1"), [])
    onlooker.heard(Drained("d0", 1), [])
    onlooker.heard(Left("d0", 1, died=False), [])
    told = onlooker.after(0)
    events = told["events"]
    assert (told["now_s"], told["last"], told["missed"]) == (2.5, 7, 0)
    assert [(one.kind, one.instance) for one in events] == [
        ("Joined", "d0"), ("Switch", "d0"), ("Switched", "d0"), ("Refused", "d0"), ("Migrated", "d1"), ("Drained", "d0"), ("Left", "d0"),
    ]  # fmt: skip
    assert [one.number for one in events if one.alarm] == [4]
    assert events[3].request_id == 7
    assert [one.number for one in onlooker.after(5)["events"]] == [6, 7]


def test_who_asks_too_late_is_told_how_much_is_not_kept() -> None:
    onlooker = Onlooker(lambda: 0.0)
    for k in range(MOST + 10):
        onlooker.heard(Refused(k, 1, "d0"), [])
    told = onlooker.after(3)
    assert (len(told["events"]), told["missed"], told["last"]) == (MOST, 7, MOST + 10)
    assert onlooker.after(MOST + 10)["missed"] == 0
