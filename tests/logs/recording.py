"""Event logs that lie here, NAME.jsonl.zst beside the experiment NAME.yaml: what was decided in a run, and where a run of today departs.

The head is kept without what says nothing of the decisions (version, the hash of the policy's source, the experiment, which lies beside).
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import msgspec
import zstandard

from pdlab.core.types import Action, Arrived, Dispatch, Event, Handoff, PrefillDone, Report
from pdlab.experiment.experiment import Experiment
from pdlab.experiment.make_router import router
from pdlab.replay.log import Entry, Head, read, replay

FOLDER = Path(__file__).parent
ABSENT = object()
SHOWN = 400  # characters of an event or of actions

# What an event or action can have beside its kind.
TRAITS: dict[str, Callable[[Event | Action], bool]] = {
    "best_of": lambda x: isinstance(x, Arrived) and x.request.best_of > 1,
    "priority": lambda x: isinstance(x, Arrived) and x.request.priority > 0,
    "own objective": lambda x: isinstance(x, Arrived) and x.request.ttft_slo_s is not None,
    "prefix": lambda x: isinstance(x, Arrived) and bool(x.request.hashes),
    "cached": lambda x: isinstance(x, PrefillDone) and x.cached_tokens > 0,
    "evicted": lambda x: isinstance(x, Report) and bool(x.evicted),
    "preempted": lambda x: isinstance(x, Report) and x.preempted > 0,
    "paired": lambda x: isinstance(x, Dispatch) and x.decode is not None,
    "stays": lambda x: (isinstance(x, Dispatch) and x.decode == x.instance) or (isinstance(x, Handoff) and x.dst == x.src),
    "again": lambda x: isinstance(x, Dispatch) and x.attempt > 1,
    "goes on": lambda x: isinstance(x, Dispatch) and x.sent_tokens > 0,
}


@dataclass(frozen=True, slots=True)
class Log:
    head: Head
    entries: list[Entry]

    @classmethod
    def read(cls, path: Path) -> Log:
        head, entries = read(path)
        return cls(head, list(entries))

    def tally(self) -> Counter[str]:
        """How often it has each kind of event and action, and each trait."""
        counts: Counter[str] = Counter()
        for entry in self.entries:
            for x in (entry.event, *entry.actions):
                counts[type(x).__name__] += 1
                counts.update(trait for trait, has in TRAITS.items() if has(x))
        return counts


@dataclass(frozen=True, slots=True)
class Recording:
    """`play(experiment, path)` runs it and writes its log; `holds` is what it is there for: of each kind or trait, at least so many."""

    name: str
    play: Callable[[Experiment, Path], object]
    holds: Mapping[str, int]
    folder: Path = FOLDER

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.jsonl.zst"

    def experiment(self) -> Experiment:
        return Experiment.load(self.folder / f"{self.name}.yaml")

    def run(self) -> Log:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / self.name
            self.play(self.experiment(), path)
            return Log.read(path)

    def recorded(self) -> Log:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / self.name
            path.write_bytes(zstandard.decompress(self.path.read_bytes()))
            return Log.read(path)

    def write(self, log: Log) -> None:
        head = msgspec.structs.replace(log.head, pdlab="", policy_hash="", experiment={})
        lines = msgspec.json.Encoder().encode_lines([head, *log.entries])
        self.path.write_bytes(zstandard.compress(lines, 19))

    def lacks(self, log: Log) -> list[str]:
        """What it is there for and does not hold."""
        counts = log.tally()
        return [f"{counts[what]} x {what}, and {least} are wanted" for what, least in self.holds.items() if counts[what] < least]

    def rerun(self) -> str:
        """Run it once more; where its log departs from the recorded one, in words."""
        return self._in_words(difference(self.recorded(), self.run()))

    def replayed(self) -> str:
        """Give the recorded events to a fresh router; where its answers depart, in words."""
        log = self.recorded()
        decider = router(self.experiment(), hash_tokens=log.head.hash_tokens)
        events, departure = replay(log.entries, decider)
        if departure is None:
            return ""
        entry = log.entries[events - 1]
        words = _departure(events - 1, entry, Entry(entry.now, entry.event, departure.replayed))
        whose = f"of {len(log.entries):,} recorded events, the first that a fresh router answers otherwise"
        return self._in_words(f"{whose} is {words}")

    def _in_words(self, departure: str) -> str:
        if not departure:
            return ""
        command = f"python -m tests.logs.record {self.name}"
        return f"{self.path.name}: {departure}\nIf that is meant, record it anew and say why in the commit: {command}"


def difference(recorded: Log, now: Log) -> str:
    """The first one, in words; none where equal, times and other real numbers within 1e-9."""
    for field in ("seed", "policy", "hash_tokens"):
        was, is_ = getattr(recorded.head, field), getattr(now.head, field)
        if was != is_:
            return f"the head's {field} was {was!r}, and is {is_!r} now"
    for index, (was, is_) in enumerate(zip_longest(recorded.entries, now.entries)):
        if was != is_ and (words := _departure(index, was, is_)):
            lengths = f"of {len(recorded.entries):,} recorded entries, {len(now.entries):,} now"
            return f"{lengths}, the first that differs is {words}{_counts(recorded, now)}"
    return ""


def _counts(recorded: Log, now: Log) -> str:
    was, is_ = recorded.tally(), now.tally()
    changed = [f"{was[kind]} x {kind}, now {is_[kind]}" for kind in sorted({*was, *is_}) if was[kind] != is_[kind]]
    return f"\n  in all         {'; '.join(changed) or 'as many of each kind as before'}"


def _departure(index: int, was: Entry | None, is_: Entry | None) -> str:
    """Two entries at one place, side by side; nothing where they are equal but for rounding."""
    if was is None or is_ is None:
        only = was or is_
        assert only is not None
        whose = "recorded, and the log ends before it now" if is_ is None else "new, and the recorded log ends before it"
        lines = [f"number {index}, which is {whose}:", f"  at             {only.now:.9f} s", f"  event          {_shown(only.event)}"]
        return "\n".join([*lines, f"  actions        {_shown(only.actions)}"])
    where = _unlike("", _plain(was), _plain(is_))
    if where is None:
        return ""
    path, old, new = where
    lines = [f"number {index}, in its {path}: {_shown(old)} recorded, {_shown(new)} now"]
    lines.append(f"  at             {was.now:.9f} s" + (f" recorded, {is_.now:.9f} s now" if was.now != is_.now else ""))
    for name, old, new in (("event", was.event, is_.event), ("actions", was.actions, is_.actions)):
        if _unlike("", msgspec.to_builtins(old), msgspec.to_builtins(new)) is None:
            lines.append(f"  {name:14} {_shown(old)}")
        else:
            lines += [f"  {name:8}then   {_shown(old)}", f"  {name:8}now    {_shown(new)}"]
    return "\n".join(lines)


def _plain(entry: Entry) -> dict[str, object]:
    return {"time": entry.now, "event": msgspec.to_builtins(entry.event), "actions": msgspec.to_builtins(entry.actions)}


def _unlike(path: str, old: object, new: object) -> tuple[str, object, object] | None:
    """(where, both values) of the first difference between plain values."""
    if isinstance(old, float) and isinstance(new, float):
        return None if math.isclose(old, new, rel_tol=1e-12, abs_tol=1e-9) else (path, old, new)
    parts: Sequence[tuple[object, object, object]]
    if isinstance(old, dict) and isinstance(new, dict):
        parts = [(key, old.get(key, ABSENT), new.get(key, ABSENT)) for key in {**old, **new}]
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple):
        parts = [(i, a, b) for i, (a, b) in enumerate(zip_longest(old, new, fillvalue=ABSENT))]
    else:
        return None if old == new else (path, old, new)
    return next((at for key, a, b in parts if (at := _unlike(f"{path}.{key}".lstrip("."), a, b)) is not None), None)


def _shown(value: object) -> str:
    text = "nothing" if value is ABSENT else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"
