"""Who reaches whom, sans-IO. A way from one instance to another is closed when a transfer there has failed though both live, and tried
again by one request at a time: after 5 s, and after each failure twice as long, up to 60 s. A transfer that comes opens it.

Ways are known by the instances' names; a new incarnation begins with open ones.
"""

from __future__ import annotations

LEAST_PAUSE_S, MOST_PAUSE_S = 5.0, 60.0  # between two tries


class Closed:
    """A way on which nothing came."""

    __slots__ = ("pause_s", "trying", "until_s")

    def __init__(self, pause_s: float, until_s: float) -> None:
        self.pause_s = pause_s
        self.until_s = until_s  # when one may try
        self.trying = False  # one does


class Reach:
    """`closed` are the ways that are: (from, to). It stays the same dictionary."""

    __slots__ = ("closed",)

    def __init__(self) -> None:
        self.closed: dict[tuple[str, str], Closed] = {}

    def failed(self, src: str, dst: str, now: float) -> float:
        """A transfer did. Returns for how many seconds the way is closed; 0.0 where it was closed already: those that were under way
        together count once."""
        way = self.closed.get((src, dst))
        if way is not None and not way.trying and now < way.until_s:
            return 0.0
        pause_s = LEAST_PAUSE_S if way is None else min(2 * way.pause_s, MOST_PAUSE_S)
        self.closed[src, dst] = Closed(pause_s, now + pause_s)
        return pause_s

    def came(self, src: str, dst: str) -> bool:
        """A transfer did. Was the way closed?"""
        return self.closed.pop((src, dst), None) is not None

    def doubtful(self, src: str, dst: str) -> bool:
        """Has the last transfer there failed?"""
        return (src, dst) in self.closed

    def open(self, src: str, dst: str, now: float) -> bool:
        """May a request go there now? Of those after a pause the first one may; the others wait for what comes of it."""
        way = self.closed.get((src, dst))
        return way is None or now >= way.until_s

    def sends(self, src: str, dst: str, now: float) -> None:
        """A request goes there."""
        way = self.closed.get((src, dst))
        if way is not None:
            way.trying, way.until_s = True, now + way.pause_s

    def forget(self, name: str) -> None:
        """That instance has gone."""
        for way in [way for way in self.closed if name in way]:
            del self.closed[way]
