"""A refactor replays the recorded logs: same events, same actions, in both worlds and in a fresh router."""

from __future__ import annotations

import dataclasses
import shutil
import typing
from pathlib import Path

import msgspec
import pytest

from pdlab.core.types import AnyAction, AnyEvent
from pdlab.replay.log import Entry
from tests.logs.catalogue import BY_NAME, RECORDINGS
from tests.logs.record import main, record
from tests.logs.recording import FOLDER, Log, Recording, difference

EACH = pytest.mark.parametrize("recording", RECORDINGS, ids=lambda recording: recording.name)


@EACH
def test_run_once_more_it_gives_the_recorded_log(recording: Recording) -> None:
    if departs := recording.rerun():
        pytest.fail(departs, pytrace=False)


@EACH
def test_a_fresh_router_answers_the_recorded_events_with_the_recorded_actions(recording: Recording) -> None:
    if departs := recording.replayed():
        pytest.fail(departs, pytrace=False)


@EACH
def test_a_log_holds_what_it_is_there_for(recording: Recording) -> None:
    assert not recording.lacks(recording.recorded())


def test_every_kind_of_event_and_of_action_is_in_some_log() -> None:
    seen = {kind for recording in RECORDINGS for kind in recording.recorded().tally()}
    kinds = {kind.__name__ for kind in (*typing.get_args(AnyEvent), *typing.get_args(AnyAction))}
    assert not kinds - seen, "add what brings it about to an experiment of tests/logs, and `python -m tests.logs.record` it"


def test_nothing_else_lies_there_and_all_of_it_is_small() -> None:
    for suffix in (".yaml", ".jsonl.zst"):
        assert {path.name.removesuffix(suffix) for path in FOLDER.glob(f"*{suffix}")} == BY_NAME.keys()
    assert sum(path.stat().st_size for path in FOLDER.glob("*.*")) < 1_000_000


# ------------------------------------------------------------ the net itself


@pytest.fixture(scope="module")
def log() -> Log:
    return BY_NAME["load"].recorded()


def with_entry(log: Log, index: int, **changes: object) -> Log:
    entries = [*log.entries]
    entries[index] = msgspec.structs.replace(entries[index], **changes)
    return Log(log.head, entries)


def dispatched(log: Log) -> tuple[int, Entry]:
    return next((i, entry) for i, entry in enumerate(log.entries) if entry.actions and i > 50)


def test_another_action_is_told_with_its_place_and_time_and_both_answers(log: Log) -> None:
    i, entry = dispatched(log)
    other = msgspec.structs.replace(entry.actions[0], instance="elsewhere")
    words = difference(log, with_entry(log, i, actions=[other]))
    instance = entry.actions[0].instance
    assert f"number {i}, in its actions.0.instance: {instance!r} recorded, 'elsewhere' now" in words
    assert f"{entry.now:.9f} s" in words
    for line in (repr(entry.event), f"then   {entry.actions!r}", f"now    {[other]!r}"):
        assert line in words


def test_a_time_may_differ_by_rounding_and_not_by_more(log: Log) -> None:
    i, entry = dispatched(log)
    assert not difference(log, with_entry(log, i, now=entry.now + 5e-10))
    assert f"number {i}, in its time" in difference(log, with_entry(log, i, now=entry.now + 2e-9))


def test_a_log_that_ends_early_or_late_differs(log: Log) -> None:
    shorter = Log(log.head, log.entries[:-1])
    assert "ends before it now" in difference(log, shorter)
    assert "which is new" in difference(shorter, log)


def test_a_new_version_is_no_difference_and_another_seed_is(log: Log) -> None:
    head = msgspec.structs.replace(log.head, pdlab="99", policy_hash="other", experiment={"name": "other"})
    assert not difference(log, Log(head, log.entries))
    assert "seed was 11, and is 12 now" in difference(log, Log(msgspec.structs.replace(log.head, seed=12), log.entries))


@pytest.fixture
def copied(tmp_path: Path) -> Recording:
    """The smallest experiment's, in a folder of its own."""
    for path in (FOLDER / "load.yaml", FOLDER / "load.jsonl.zst"):
        shutil.copy(path, tmp_path)
    return dataclasses.replace(BY_NAME["load"], folder=tmp_path)


def change(recording: Recording, old: str, new: str) -> None:
    path = recording.folder / f"{recording.name}.yaml"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_another_policy_is_caught_by_both_and_recorded_anew_on_demand(copied: Recording) -> None:
    change(copied, "dispatch: power_of_two", "dispatch: random")
    for departs in (copied.rerun(), copied.replayed()):
        assert departs.endswith("say why in the commit: python -m tests.logs.record load")
    assert "a fresh router answers otherwise" in copied.replayed()
    assert "recorded anew" in record(copied)
    assert not copied.rerun()
    assert not copied.replayed()
    before = copied.path.read_bytes()
    assert "as recorded" in record(copied)
    assert copied.path.read_bytes() == before


def test_a_log_without_what_it_is_there_for_is_not_recorded(copied: Recording) -> None:
    before = copied.path.read_bytes()
    change(copied, "- {at_s: 10.0, lose_reports: decode-1}", "")
    with pytest.raises(SystemExit, match=r"load: not recorded, since it is there for more: .*0 x Evict, and 1 are wanted"):
        record(copied)
    assert copied.path.read_bytes() == before


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(SystemExit, match="there is no log 'lode'; there are load, prefix, "):
        main(["lode"])
