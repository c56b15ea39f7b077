"""Candidates that can be asked for the least of them without looking at all.

    cluster.decode.least(tokens)            as min(cluster.decode, key=tokens), where tokens(x) is of what is known of x alone

The answer comes off a heap. The router notes whose figures have changed; these are put in again, and what is there twice counts as it is
now. It is a list like any other besides.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from heapq import heapify, heappop, heappush
from typing import Any, Generic, TypeVar

X = TypeVar("X")
FEW = 16  # of so many the least is found sooner by looking at each
_MOST_RANKINGS = 8  # of one list: a function made anew for each question is looked up by nobody again
_MOST_CHANGES = 4096


class Changes(Generic[X]):
    """Whose figures have changed, in order, while anybody wants to know. `age` counts how often those of long ago were left out."""

    __slots__ = ("age", "those", "wanted")

    def __init__(self) -> None:
        self.those: list[X] = []
        self.age = 0
        self.wanted = False

    def note(self, x: X) -> None:
        if len(self.those) >= _MOST_CHANGES:
            self.those = []
            self.age += 1
        self.those.append(x)


class Ranked(list[X]):
    """What `changes` tells of its members decides nothing but how soon an answer is there. Who is in it does not change."""

    __slots__ = ("_alike", "_rankings", "changes")

    def __init__(self, members: Iterable[X], changes: Changes[X]) -> None:
        super().__init__(members)
        self.changes = changes
        self._rankings: dict[Callable[[X], Any], KeyedHeap[X]] = {}
        self._alike: dict[Callable[[X], Hashable], list[Ranked[X]]] = {}

    def least(self, key: Callable[[X], Any]) -> X | None:
        """The first of those for which `key`, a function of a module, is least; None where there is nobody."""
        if len(self) < FEW:
            return min(self, key=key, default=None)
        ranking = self._rankings.get(key)
        if ranking is None:
            if len(self._rankings) >= _MOST_RANKINGS:
                return min(self, key=key)
            self.changes.wanted = True
            ranking = self._rankings[key] = KeyedHeap(self, key, self.changes)
        return ranking.least()

    def alike(self, what: Callable[[X], Hashable]) -> list[Ranked[X]]:
        """Those that have `what`, which never changes, in common, in lists of their own."""
        found = self._alike.get(what)
        if found is None:
            groups: dict[Hashable, list[X]] = {}
            for x in self:
                groups.setdefault(what(x), []).append(x)
            found = self._alike[what] = [Ranked(members, self.changes) for members in groups.values()]
        return found


class KeyedHeap(Generic[X]):
    """Each member is in the heap with the figures that it has now, and perhaps with some that it had."""

    __slots__ = ("age", "changes", "heap", "key", "place", "read")

    def __init__(self, members: Iterable[X], key: Callable[[X], Any], changes: Changes[X]) -> None:
        self.place = {x: index for index, x in enumerate(members)}
        self.key, self.changes = key, changes
        self._begin()

    def _begin(self) -> None:
        key, changes = self.key, self.changes
        self.heap = [(key(x), index, x) for x, index in self.place.items()]
        heapify(self.heap)
        self.age, self.read = changes.age, len(changes.those)

    def least(self) -> X:
        heap, key, changes = self.heap, self.key, self.changes
        if changes.age != self.age or len(heap) > 4 * len(self.place):
            self._begin()
            return self.heap[0][2]
        those, place = changes.those, self.place
        for index in range(self.read, len(those)):
            x = those[index]
            if x in place:
                heappush(heap, (key(x), place[x], x))
        self.read = len(those)
        while True:
            figures, _, x = heap[0]
            if key(x) == figures:
                return x
            heappop(heap)
