"""Record the logs anew, all or those named, where they differ from a run of today: `python -m tests.logs.record [NAME ...]`.

Only where behaviour is meant to change; the commit says why.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tests.logs.catalogue import BY_NAME
from tests.logs.recording import Recording, difference


def record(recording: Recording) -> str:
    """What was done, in words. Raises SystemExit where the log would not hold what it is there for."""
    log = recording.run()
    if lacks := recording.lacks(log):
        raise SystemExit(f"{recording.name}: not recorded, since it is there for more: {'; '.join(lacks)}; change {recording.name}.yaml")
    departs = difference(recording.recorded(), log) if recording.path.exists() else "there was no log of it"
    if not departs:
        return f"{recording.name}: as recorded, {len(log.entries):,} entries"
    recording.write(log)
    return f"{recording.name}: recorded anew, {len(log.entries):,} entries, {recording.path.stat().st_size:,} bytes; {departs}"


def main(names: Sequence[str]) -> None:
    for name in names:
        if name not in BY_NAME:
            raise SystemExit(f"there is no log {name!r}; there are {', '.join(BY_NAME)}")
    for name in names or BY_NAME:
        print(record(BY_NAME[name]))


if __name__ == "__main__":
    main(sys.argv[1:])
