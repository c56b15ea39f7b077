"""Hash chains, kept small: a chain is a few runs of consecutive ids, since whoever names new units names them one after another.

A million sessions' turns would be gigabytes as tuples; as runs they are tens of bytes each. A chain becomes a tuple when it is looked at.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np

_LEAST, _MOST = -(2**63), 2**63 - 1


class Chains(Sequence[tuple[int, ...]]):
    """A sequence of tuples of ids. It grows by `append` and `append_runs`; what is in it stays as it is.

    Ids are best within 64 bits with a sign; wider ones are kept too, but a list of first ids then takes the array's place.
    """

    __slots__ = ("_ends", "_first", "_length")

    def __init__(self, chains: Iterable[Sequence[int]] = ()) -> None:
        self._first: array[int] | list[int] = array("q")
        self._length = array("i")
        self._ends = array("q", [0])
        for chain in chains:
            self.append(chain)

    def append(self, chain: Sequence[int]) -> None:
        """Add a chain."""
        if not chain:
            self._ends.append(len(self._first))
            return
        try:
            ids = np.array(chain, np.int64)
        except OverflowError:
            self.append_runs((wide, 1) for wide in chain)
            return
        before, after = ids[:-1], ids[1:]
        starts = np.concatenate(([0], np.flatnonzero((after - 1 != before) | (after < before)) + 1))
        self._first.extend(ids[starts].tolist())
        self._length.extend(np.diff(starts, append=len(ids)).tolist())
        self._ends.append(len(self._first))

    def append_runs(self, runs: Iterable[tuple[int, int]]) -> None:
        """Add a chain given as its runs, (first id, how many)."""
        for first, length in runs:
            if length:
                if not _LEAST <= first <= _MOST and isinstance(self._first, array):
                    self._first = list(self._first)
                self._first.append(first)
                self._length.append(length)
        self._ends.append(len(self._first))

    def runs(self, index: int) -> list[tuple[int, int]]:
        """The runs of one chain, (first id, how many)."""
        start, end = self._ends[index], self._ends[index + 1]
        return list(zip(self._first[start:end], self._length[start:end], strict=True))

    def take(self, rows: Iterable[int]) -> Chains:
        """The chains of the given rows."""
        taken = Chains()
        for row in rows:
            taken.append_runs(self.runs(row))
        return taken

    def cut(self, lengths: Iterable[int]) -> Chains:
        """The beginnings of all chains, none longer than its one of `lengths`."""
        shorter = Chains()
        for row, left in enumerate(lengths):
            runs = []
            for first, length in self.runs(row):
                if left <= 0:
                    break
                runs.append((first, min(length, left)))
                left -= length
            shorter.append_runs(runs)
        return shorter

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> Chains: ...
    def __getitem__(self, index: int | slice) -> tuple[int, ...] | Chains:
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"chain {index} of {len(self)}")
        index %= len(self)
        start, end = self._ends[index], self._ends[index + 1]
        if end - start == 1:
            first = self._first[start]
            return tuple(range(first, first + self._length[start]))
        ids: list[int] = []
        for run in range(start, end):
            first = self._first[run]
            ids.extend(range(first, first + self._length[run]))
        return tuple(ids)
