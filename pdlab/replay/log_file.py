"""A file of lines that is written while a run goes on: where the disk is full it ends with its last whole line, and the run goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

BUFFER_BYTES = 8 << 10


class LogFile:
    """Takes lines. At the first error it calls `on_stop(why)`; after that none is written any more, and `dropped` counts what is missing.
    What stands in the file ends with a whole line, so that it can be replayed. Raises OSError where the file cannot be opened."""

    def __init__(self, path: Path, on_stop: Callable[[str], object]) -> None:
        self.path = path
        self.stopped = ""  # why
        self.dropped = 0  # lines
        self._on_stop = on_stop
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._lines: list[bytes] = []
        self._waiting_bytes = 0
        self._whole_bytes = 0  # that the file has, up to its last whole line

    def write(self, line: bytes) -> int:
        if self.stopped:
            self.dropped += 1
            return len(line)
        self._lines.append(line)
        self._waiting_bytes += len(line)
        if self._waiting_bytes >= BUFFER_BYTES:
            self.flush()
        return len(line)

    def flush(self) -> None:
        lines, self._lines, self._waiting_bytes = self._lines, [], 0
        if self.stopped or not lines:
            return
        rest = memoryview(b"".join(lines))
        written = 0
        try:
            while written < len(rest):
                written += os.write(self._fd, rest[written:])
        except OSError as error:
            self._stop(error, lines, written)
        else:
            self._whole_bytes += written

    def close(self) -> None:
        if self._fd >= 0:
            self.flush()
            fd, self._fd = self._fd, -1
            try:
                os.close(fd)
            except OSError as error:  # a file system may say only now that it is full
                if not self.stopped:
                    self.stopped = _words(error)
                    self._on_stop(self.stopped)

    def _stop(self, error: OSError, lines: list[bytes], written: int) -> None:
        self.stopped = _words(error)
        ends = [end for end in accumulate(map(len, lines)) if end <= written]
        self.dropped += len(lines) - len(ends)
        self._whole_bytes += ends[-1] if ends else 0
        with suppress(OSError):  # no regular file
            os.ftruncate(self._fd, self._whole_bytes)
        self._on_stop(self.stopped)


def _words(error: OSError) -> str:
    return error.strerror or str(error)
