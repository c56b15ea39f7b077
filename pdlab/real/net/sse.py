"""Server-sent events, sans-IO: bytes in as they come, events out. Lines are read as the standard has them, and more forgivingly where
servers are careless: an event is there as soon as its reader can read it, and need not end with an empty line.
"""

from __future__ import annotations

from collections.abc import Callable

MOST_EVENT_BYTES = 16 << 20
BOM = b"\xef\xbb\xbf"

Hear = Callable[[bytes, bytes], bool]


class Events:
    """`hear(data, name)` gets each event; `name` is empty where the server gives none. It says False where this is no whole event yet: then
    it is asked again when the next line of data is there, with both. `done`: [DONE] has come, and nothing is heard after it. `unread` is
    the data of an event that could not be read, `too_long`: one grew beyond MOST_EVENT_BYTES."""

    def __init__(self, hear: Hear) -> None:
        self._hear = hear
        self._line = bytearray()  # that has not ended
        self._data = b""  # of an event that is not whole
        self._name = b""
        self._cr = False  # what has come so far ends with a carriage return, whose line feed may follow
        self.done = self.too_long = False
        self.unread = b""

    def feed(self, part: bytes) -> None:
        """Raises what `hear` raises."""
        if self._cr or b"\r" in part:
            part = self._line_feeds(part)
        cut = part.rfind(b"\n")
        if cut < 0:
            self._line += part
            self.too_long = self.too_long or len(self._line) > MOST_EVENT_BYTES
            return
        whole = part[:cut]
        if self._line:
            whole = bytes(self._line) + whole
            self._line.clear()
        if cut + 1 < len(part):
            self._line += part[cut + 1 :]
        for line in whole.split(b"\n"):
            if line.startswith(b"data:"):
                self._read(line[5:].strip())
            elif not line:
                if self._data:
                    self.unread, self._data = self.unread or self._data, b""
                self._name = b""
            elif line.startswith(b"event:"):
                self._name = line[6:].strip()
            elif line.startswith(BOM + b"data:"):
                self._read(line[8:].strip())

    def _read(self, data: bytes) -> None:
        """A line of data. Together with those before it, it is the event as soon as it can be read."""
        if not data or self.done:
            return
        if data == b"[DONE]":
            self.done = True
            return
        if self._data:
            data = self._data + b"\n" + data
        self._data = b"" if self._hear(data, self._name) else data
        if len(self._data) > MOST_EVENT_BYTES:
            self.too_long, self._data = True, b""

    def _line_feeds(self, part: bytes) -> bytes:
        """With every end of a line as one line feed."""
        if self._cr:
            part = part.removeprefix(b"\n")
        self._cr = part.endswith(b"\r")
        return part.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
