"""The event log: one JSON line for each `Router.handle` call, (now, event, actions), after a head that says what the router was.

From it a run can be replayed: a fresh router that is given the same events must answer with the same actions, bit for bit. Lines are
tagged JSON by msgspec, so that an event reads `{"type": "Arrived", ...}`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from pdlab import __version__
from pdlab.core.file_kinds import EVENT_LOG, in_place_of, kind_of_file
from pdlab.core.policy import Policy
from pdlab.core.router import Router
from pdlab.core.types import Action, AnyAction, AnyEvent, UsageError
from pdlab.experiment.deployment import Deployment
from pdlab.policies.load import source_hash
from pdlab.replay.log_file import LogFile

BLOCK_BYTES = 1 << 16  # read at a time to find the end of a line


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """The first line. `experiment` is the resolved experiment, from which the router can be built again."""

    pdlab: str
    seed: int
    policy: object
    policy_hash: str
    hash_tokens: int
    experiment: dict[str, object]


class Entry(msgspec.Struct, frozen=True, array_like=True):
    now: float
    event: AnyEvent
    actions: list[AnyAction]


def head_of(deployment: Deployment, policy: Policy, hash_tokens: int) -> Head:
    """The first line of its event log."""
    return Head(
        pdlab=__version__,
        seed=deployment.seed,
        policy=deployment.policy,
        policy_hash=source_hash(policy),
        hash_tokens=hash_tokens,
        experiment=deployment.resolved(),
    )


class EventLog:
    """Writes a log. Close it, or use it as a context manager. Where it cannot be written any more, as on a full disk, it ends with its last
    whole line; `stopped` says why, as `warn` is told, and `dropped` counts the lines that are missing: what it is a log of goes on. Raises
    OSError where it cannot be opened."""

    def __init__(self, path: Path, head: Head, *, warn: Callable[[str], object] | None = None) -> None:
        self.path = path
        self.stopped = ""
        self._warn = warn
        self._now = 0.0
        self._file = LogFile(path, self._stop)
        self._encode = msgspec.json.Encoder().encode
        self._file.write(self._encode(head) + b"\n")

    @property
    def dropped(self) -> int:
        return self._file.dropped

    def write(self, now: float, event: AnyEvent, actions: list[Action]) -> None:
        if self.stopped:
            self._file.write(b"")  # it counts
            return
        self._now = now
        self._file.write(self._encode((now, event, actions)) + b"\n")

    def flush(self) -> None:
        self._file.flush()

    def since(self, offset: int, most_bytes: int) -> tuple[bytes, int]:
        """Whole lines from that byte on, of `most_bytes` in all at most, or a single longer one; and how many bytes the log has by now.
        Raises OSError."""
        self.flush()
        with self.path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(offset)
            found = file.read(most_bytes)
            whole = found[: found.rfind(b"\n") + 1]
            return whole or found + file.readline(), size

    def close(self) -> None:
        self._file.close()

    def _stop(self, why: str) -> None:
        kept = f"{self.path} keeps what came before, as far as there is room"
        self.stopped = f"the event log stopped at {self._now:.3f} s ({why}): {kept}, and the run goes on"
        if self._warn is not None:
            self._warn(self.stopped)

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cut_to_lines(path: Path, most_bytes: int | None = None) -> None:
    """Shorten a log to whole lines, of `most_bytes` in all at most. Raises OSError."""
    with path.open("r+b") as file:
        end = file.seek(0, 2)
        end = end if most_bytes is None else min(end, most_bytes)
        while end:
            start = max(0, end - BLOCK_BYTES)
            file.seek(start)
            if (newline := file.read(end - start).rfind(b"\n")) >= 0:
                end = start + newline + 1
                break
            end = start
        file.truncate(end)


_read_head = msgspec.json.Decoder(Head).decode
_read_entry = msgspec.json.Decoder(Entry).decode


def read(path: Path) -> tuple[Head, Generator[Entry, None, None]]:
    """The head, and the entries one by one; who does not read all of them closes them. Raises UsageError naming the line that cannot
    be read."""
    file = path.open("rb")
    try:
        head = _read_head(file.readline())
    except msgspec.DecodeError as error:
        file.close()
        if instead := in_place_of(path, kind_of_file(path), EVENT_LOG):
            raise UsageError(instead) from None
        raise UsageError(f"{path}: line 1: not the head of an event log ({error}); give a whole file of --trace-events") from error
    return head, _entries(path, file)


def head_in(line: bytes) -> Head:
    """Of a log's first line. Raises UsageError."""
    try:
        return _read_head(line)
    except msgspec.DecodeError as error:
        raise UsageError(f"not the head of an event log ({error})") from error


def entries_in(lines: bytes) -> Generator[Entry, None, None]:
    """Of whole lines. Raises UsageError."""
    try:
        for line in lines.splitlines():
            yield _read_entry(line)
    except msgspec.DecodeError as error:
        raise UsageError(f"not a line of an event log: {error}") from error


def _entries(path: Path, file: BinaryIO) -> Generator[Entry, None, None]:
    with file:
        for number, line in enumerate(file, 2):
            try:
                yield _read_entry(line)
            except msgspec.DecodeError as error:
                if line.endswith(b"\n"):
                    raise UsageError(f"{path}: line {number}: {error}") from error
                raise UsageError(
                    f"{path}: line {number} is cut off, as when a run is killed while it writes; remove that line to replay those before it"
                ) from error


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a replay departs from the log: the event's place (its line), and both answers."""

    line: int
    now: float
    event: AnyEvent
    logged: list[AnyAction]
    replayed: list[Action]


def replay(entries: Iterable[Entry], router: Router) -> tuple[int, Difference | None]:
    """Feed a log's events to a fresh router, up to the first that it answers otherwise: what follows in the log does not fit what it knows
    then. Returns how many it was fed, and the difference."""
    count = 0
    for count, entry in enumerate(entries, 1):
        actions = router.handle(entry.event, entry.now)
        if actions != entry.actions:
            return count, Difference(count + 1, entry.now, entry.event, entry.actions, actions)
    return count, None
