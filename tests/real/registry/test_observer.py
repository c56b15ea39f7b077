"""What a watcher makes of what the store shows, sans-IO; and that nothing a peer writes can break it."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlab.core.types import UNKNOWN, InstanceSpec, Joined, Left, Report, Role, StepTime, Suspected
from pdlab.real.registry.observer import MOST_HELD_S, Observer, WatchEvent
from pdlab.real.registry.records import MAX_BYTES, Garbage, InstanceRecord, encode, read_instance, read_report
from tests.support.registry_worlds import spec


def record(incarnation: int = 1, lease_s: float = 3.0, name: str = "p0", role: Role = Role.PREFILL) -> bytes:
    return encode(InstanceRecord(lease_s=lease_s, spec=spec(name, role, incarnation=incarnation)))


def test_after_an_outage_an_instance_has_one_lease_to_come_back() -> None:
    observer = Observer()
    observer.snapshot({"instance/p0": record(), "instance/d0": record(name="d0")}, 10.0)
    observer.outage()
    assert observer.expire(100.0) == [] and observer.due_s is None
    assert observer.snapshot({}, 100.0) == [Suspected("d0", 1), Suspected("p0", 1)]
    assert observer.due_s == 103.0
    assert observer.put("instance/p0", record()) == [Suspected("p0", 1, lost=False)]
    assert observer.expire(102.9) == [] and observer.expire(103.0) == [Left("d0", 1)]
    assert observer.delete("instance/p0", 103.1) == [Left("p0", 1)]


def test_a_second_outage_starts_the_grace_anew() -> None:
    observer = Observer()
    observer.snapshot({"instance/p0": record()}, 0.0)
    observer.outage()
    assert observer.snapshot({}, 1.0) == [Suspected("p0", 1)]
    observer.outage()
    assert observer.snapshot({}, 9.0) == [] and observer.due_s == 12.0


def test_a_lease_that_ends_soon_after_an_outage_waits_for_the_grace_too() -> None:
    observer = Observer()
    observer.snapshot({"instance/p0": record()}, 0.0)
    observer.outage()
    assert observer.snapshot({"instance/p0": record()}, 5.0) == []
    assert observer.delete("instance/p0", 6.0) == [Suspected("p0", 1)]
    assert observer.put("instance/p0", record(2)) == [Left("p0", 1), Joined(spec(incarnation=2))]


def reporting(observer: Observer, now: float, *names: str) -> None:
    observer.heard(now)
    for name in names:
        observer.put(f"report/{name}", encode(Report(name, 1, taken_s=now)))


def three(now: float = 0.0) -> Observer:
    """p0, p1 and d0, all of which have reported, in a store that answers."""
    observer = Observer()
    observer.heard(now)
    observer.snapshot({f"instance/{name}": record(name=name) for name in ("p0", "p1", "d0")}, now)
    reporting(observer, now, "p0", "p1", "d0")
    return observer


def answering(observer: Observer, since: float, until: float) -> None:
    for tenth in range(int(since * 10), int(until * 10) + 1):
        observer.heard(tenth / 10)


def test_one_that_vanishes_while_others_report_has_left() -> None:
    observer = three()
    answering(observer, 0.0, 3.0)
    reporting(observer, 3.0, "p1", "d0")
    assert observer.delete("instance/p0", 3.1) == [Left("p0", 1)]
    assert not observer.ill


def test_where_nobody_reports_any_more_the_registry_is_what_is_ill() -> None:
    """It answers this watcher, but none of the instances."""
    observer = three()
    answering(observer, 0.0, 3.0)
    vanished = [event for name in ("p0", "p1", "d0") for event in observer.delete(f"instance/{name}", 3.1)]
    assert vanished == [Suspected("p0", 1), Suspected("p1", 1), Suspected("d0", 1)]
    assert observer.ill
    assert observer.expire(100.0) == [], "however long it lasts"
    answering(observer, 100.0, 100.1)
    assert observer.put("instance/p1", record(name="p1")) == [Suspected("p1", 1, lost=False)]
    assert not observer.ill
    assert observer.expire(103.0) == [] and observer.expire(103.2) == [Left("d0", 1), Left("p0", 1)]


def test_who_never_comes_back_is_gone_in_the_end() -> None:
    observer = three()
    answering(observer, 0.0, 3.0)
    for name in ("p0", "p1", "d0"):
        observer.delete(f"instance/{name}", 3.1)
    assert observer.expire(3.1 + MOST_HELD_S) == [Left("d0", 1), Left("p0", 1), Left("p1", 1)]


@pytest.mark.parametrize("silence_s", [0.3, 1.4, 1.6, 20.0])
def test_a_lease_that_ran_out_in_a_silence_of_the_store_says_nothing(silence_s: float) -> None:
    """A stopped store that goes on again ends the leases before anybody could renew them. From half a lease on it counts."""
    observer = Observer()
    observer.heard(10.0)
    observer.snapshot({"instance/p0": record()}, 10.0)
    observer.heard(10.0 + silence_s)
    events = observer.delete("instance/p0", 10.1 + silence_s)
    if silence_s < 1.5:
        assert events == [Left("p0", 1)]
    else:
        assert events == [Suspected("p0", 1)]
        assert observer.put("instance/p0", record()) == [Suspected("p0", 1, lost=False)]


def test_one_that_said_it_would_leave_has_left_whatever_else_happens() -> None:
    observer = Observer()
    observer.heard(10.0)
    leaving = encode(InstanceRecord(lease_s=3.0, spec=spec("p0", Role.PREFILL, incarnation=1, draining=True)))
    observer.snapshot({"instance/p0": leaving}, 10.0)
    observer.heard(20.0)
    assert observer.delete("instance/p0", 20.0) == [Left("p0", 1)]


def test_an_incarnation_that_has_left_and_is_there_again_is_to_come_back_as_a_new_one() -> None:
    observer = Observer()
    observer.put("instance/p0", record(4))
    assert observer.delete("instance/p0", 1.0) == [Left("p0", 4)]
    assert observer.put("instance/p0", record(4)) == []
    assert [one.incarnation for one in observer.returned] == [4]


def test_an_incarnation_that_left_or_was_followed_never_comes_back() -> None:
    observer = Observer()
    observer.put("instance/p0", record(4))
    assert observer.put("instance/p0", record(3)) == []
    assert observer.delete("instance/p0", 1.0) == [Left("p0", 4)]
    assert observer.put("instance/p0", record(4)) == []
    assert observer.put("instance/p0", record(5)) == [Joined(spec(incarnation=5))]


def test_reports_of_the_unknown_and_of_other_incarnations_are_not_told() -> None:
    observer = Observer()
    assert observer.put("report/p0", encode(Report("p0", 1))) == []
    observer.put("instance/p0", record(2))
    assert observer.put("report/p0", encode(Report("p0", 1))) == []
    assert observer.put("report/p0", encode(Report("p0", 2))) == [Report("p0", 2)]
    assert observer.put("report/p0", encode(Report("p0", 2))) == []


@pytest.mark.parametrize(
    "change",
    [
        {"incarnation": 0},
        {"incarnation": 1 << 63},
        {"kv_blocks": -1},
        {"kv_blocks": 10**30},
        {"kv_blocks": "many"},
        {"context_tokens": -1},
        {"context_tokens": 10**30},
        {"spare_blocks": -1},
        {"kv_blocks": 10, "spare_blocks": 10},
        {"block_tokens": 0},
        {"link_bytes_per_s": -1.0},
        {"host_bytes_per_s": -1.0},
        {"max_seqs": -1},
        {"max_requests": 10**30},
        {"role": "boss"},
        {"url": "file:///etc/passwd"},
        {"decode_profile": [[1, -2, 0.1]]},
        {"name": "p1"},
    ],
    ids=str,
)
def test_a_record_that_makes_no_sense_is_garbage(change: dict[str, Any]) -> None:
    made = msgspec.json.decode(record())
    made["spec"] |= change
    with pytest.raises(Garbage):
        read_instance("p0", msgspec.json.encode(made))


@pytest.mark.parametrize("lease_s", [0, -1, 1e9])
def test_a_lease_that_makes_no_sense_is_garbage(lease_s: float) -> None:
    with pytest.raises(Garbage, match="lease_s"):
        read_instance("p0", msgspec.json.encode(msgspec.json.decode(record()) | {"lease_s": lease_s}))


def test_fields_of_a_later_version_are_ignored() -> None:
    made = msgspec.json.decode(record()) | {"capabilities": ["migrate"]}
    assert read_instance("p0", msgspec.json.encode(made)).spec == spec(incarnation=1)


@pytest.mark.parametrize(
    "value", [b"[" * 500_000, b'{"a":' * 100_000, b"9" * 500_000, b" " * (MAX_BYTES + 1), b"", b"\xff", b"null"], ids=lambda v: repr(v[:6])
)
def test_what_could_blow_a_parser_up_is_garbage(value: bytes) -> None:
    for read in (read_instance, read_report):
        with pytest.raises(Garbage):
            read("p0", value)


def test_a_record_that_is_too_long_is_garbage_though_it_makes_sense() -> None:
    for read, name, value in ((read_instance, "p0", record()), (read_report, "p0", encode(Report("p0", 1)))):
        read(name, value + b" " * (MAX_BYTES - len(value)))
        with pytest.raises(Garbage, match=f"{MAX_BYTES + 1} bytes"):
            read(name, value + b" " * (MAX_BYTES + 1 - len(value)))


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


def near(good: bytes) -> st.SearchStrategy[bytes]:
    """JSON like `good` with a few fields replaced by anything, or its bytes with some replaced."""
    made = msgspec.json.decode(good)
    keys = sorted(made.get("spec", made))

    def changed(with_what: dict[str, Any]) -> bytes:
        return msgspec.json.encode(made | {"spec": made["spec"] | with_what} if "spec" in made else made | with_what)

    def spoilt(cuts: list[tuple[int, int]]) -> bytes:
        spoilt = bytearray(good)
        for at, byte in cuts:
            spoilt[at % len(spoilt)] = byte
        return bytes(spoilt)

    bytewise = st.lists(st.tuples(st.integers(0, 999), st.integers(0, 255)), max_size=3).map(spoilt)
    return st.dictionaries(st.sampled_from(keys), json, max_size=3).map(changed) | bytewise


KEYS = st.sampled_from(["instance/p0", "report/p0", "instance/d0", "report/d0", "leader/x", "instance/", "x"]) | st.text(max_size=30)
VALUES = (
    st.binary(max_size=60)
    | json.map(msgspec.json.encode)
    | near(record())
    | near(encode(Report("p0", 1)))
    | st.builds(record, incarnation=st.integers(1, 4), name=st.sampled_from(["p0", "d0"]), role=st.sampled_from(Role))
    | st.builds(lambda name, k, w: encode(Report(name, k, waiting=w)), st.sampled_from(["p0", "d0"]), st.integers(1, 4), st.integers(0, 3))
)
STEPS = st.lists(
    st.tuples(st.just("put"), KEYS, VALUES)
    | st.tuples(st.just("delete"), KEYS)
    | st.tuples(st.just("snapshot"), st.dictionaries(KEYS, VALUES, max_size=4))
    | st.tuples(st.just("outage"))
    | st.tuples(st.just("wait"), st.sampled_from([0.5, 2.0, 10.0])),
    max_size=25,
)


@given(STEPS)
def test_whatever_the_store_shows_the_events_make_a_story(steps: list[tuple[Any, ...]]) -> None:
    """Joined before all else, Left last, incarnations rise, Suspected in pairs, reports of who is there; and nothing raises."""
    logging.getLogger("pdlab.real.registry").disabled = True
    observer, now = Observer(), 0.0
    here: dict[str, InstanceSpec] = {}
    highest: dict[str, int] = {}
    suspected: set[str] = set()

    def tell(event: WatchEvent) -> None:
        if isinstance(event, Joined):
            name, incarnation = event.spec.name, event.spec.incarnation
            assert incarnation > highest.get(name, 0) or (
                name in here and here[name] != event.spec and incarnation == here[name].incarnation
            )
            assert name not in suspected
            here[name], highest[name] = event.spec, incarnation
            return
        assert event.incarnation == here[event.instance].incarnation
        if isinstance(event, Left):
            del here[event.instance]
            suspected.discard(event.instance)
        elif isinstance(event, Suspected):
            assert event.lost is (event.instance not in suspected)
            suspected.symmetric_difference_update({event.instance})

    for step, *rest in steps:
        events: list[WatchEvent] = observer.expire(now)
        if step == "put":
            events += observer.put(*rest)
        elif step == "delete":
            events += observer.delete(*rest, now)
        elif step == "snapshot":
            events += observer.snapshot(*rest, now)
        elif step == "outage":
            observer.outage()
        else:
            now += rest[0]
        for event in events:
            tell(event)
        assert set(observer.known) == set(here)
    observer.snapshot({}, now)
    observer.expire(now + 4000)
    assert not observer.known


@pytest.mark.parametrize(
    "change",
    [
        {"waiting": UNKNOWN},
        {"waiting_tokens": -2},
        {"running": 10**30},
        {"decode_s": -0.5},
        {"steps": [[1, 100, 0, 0, -0.1]]},
        {"steps": [[1, 10**30, 0, 0, 0.1]]},
        {"steps": [[1, 100, 0, 0, 0.1]] * 9},
        {"steps": [[1, 100]]},
    ],
    ids=str,
)
def test_a_report_that_makes_no_sense_is_garbage(change: dict[str, Any]) -> None:
    made = msgspec.json.decode(encode(Report("p0", 1)))
    with pytest.raises(Garbage):
        read_report("p0", msgspec.json.encode(made | change))


def test_a_report_says_what_its_instance_cannot_know_and_its_steps() -> None:
    vague = Report("p0", 1, 2.0, waiting_tokens=UNKNOWN, context_tokens=UNKNOWN, steps=(StepTime(1, 100, 0, 0, 0.02),))
    assert read_report("p0", encode(vague)) == vague
