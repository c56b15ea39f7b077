"""The timelines of a live world: of requests under way, and of the last that have ended."""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice

from pdlab.core.types import Request, Stage
from pdlab.results.timeline import Book, Timeline

KEPT = 4096  # timelines of requests that have ended
MOST_ROWS = 1 << 18  # of requests, and of reports


class Timelines:
    def __init__(self) -> None:
        self.book = Book(MOST_ROWS)
        self.gaps = self.book.gaps
        self._known: dict[int, Timeline] = {}
        self._ended: OrderedDict[int, None] = OrderedDict()

    def begin(self, request: Request) -> Timeline:
        line = self._known[request.id] = Timeline(request)
        return line

    def end(self, line: Timeline, now: float, stage: Stage, reason: str | None, received_tokens: int) -> None:
        """Write a request's row."""
        line.received_tokens = received_tokens
        line.ended(stage, now, reason)
        self.book.write(line)
        self._ended[line.request.id] = None
        while len(self._ended) > KEPT:
            del self._known[self._ended.popitem(last=False)[0]]

    def latest(self, most: int) -> list[dict[str, object]]:
        """Of those under way and the last that have ended, the newest first, as `of` has them."""
        return [line.figures() for line in islice(reversed(self._known.values()), most)]

    def of(self, request_id: int) -> dict[str, object]:
        """Under the names of `records.FIELDS`. Empty where the request is not known (any more)."""
        line = self._known.get(request_id)
        return {} if line is None else line.figures()
