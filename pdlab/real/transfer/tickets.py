"""The destination's book: which of its blocks peers may push into, what has arrived, what is being written this moment.

A part (runs x layers x heads) of a ticket is written under `Part.writing()`. A ticket that is closed lets no new write begin, and resolves
when the last one has ended: whoever is told of its end can give its blocks to somebody else. Parts that overlap one being written wait for
it, so that an attempt that was given up cannot write after the one that replaced it.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pdlab.core.kv_plan import runs_of
from pdlab.real.transfer.blocks import Ids, KvPart, Layers
from pdlab.real.transfer.result import Status, TransferResult, TransferStopped

REMEMBERED = 8192
Ended = Callable[[TransferResult], None]
Place = tuple[NDArray[np.intp], slice, slice]  # rows (runs), layers and heads of what is expected


@dataclass(frozen=True, slots=True)
class Expected:
    """KV that is to come: of a sequence's `tokens`, the first of which begins its first block, in blocks of `block_tokens`."""

    blocks: Ids
    block_tokens: int
    tokens: int
    layers: Layers
    heads: int


class _Ticket:
    """Its rows are runs of as many tokens as the first push has, `unit`: 0 before."""

    def __init__(self, expected: Expected, ended: Ended) -> None:
        self.expected, self.ended = expected, ended
        self.unit = self.run_bytes = 0
        self.writers = 0
        self.closed: tuple[Status, str] | None = None
        self.pushed_by: set[tuple[str, str]] = set()
        self.started = time.monotonic()

    def lay_out(self, unit: int, run_bytes: int) -> None:
        """`run_bytes`: of one run of one head in one layer, on the way here."""
        e = self.expected
        runs = runs_of(e.blocks, e.block_tokens, unit, range(e.tokens))
        self.unit, self.run_bytes = unit, run_bytes
        self.order = np.argsort(runs)
        self.runs = runs[self.order]
        self.arrived: NDArray[np.bool_] = np.zeros((len(runs), e.layers[1] - e.layers[0], e.heads), np.bool_)
        self.busy: NDArray[np.bool_] = np.zeros_like(self.arrived)

    @property
    def untouched(self) -> bool:
        """Has nothing come, and is nothing on its way?"""
        return not self.unit or not (self.arrived.any() or self.busy.any())

    def place(self, name: str, part: KvPart) -> Place:
        """Where a part lies in what is expected, or Trouble."""
        e = self.expected
        if part.unit != self.unit:
            raise TransferStopped(f"ticket {name}: runs of {part.unit} tokens, where others have come in {self.unit}")
        if not (e.layers[0] <= part.layers[0] < part.layers[1] <= e.layers[1]):
            raise TransferStopped(f"ticket {name} expects layers {e.layers[0]} to {e.layers[1]}, not {part.layers[0]} to {part.layers[1]}")
        at = np.searchsorted(self.runs, part.runs)
        known = self.runs[np.minimum(at, len(self.runs) - 1)] == part.runs
        if not known.all():
            missing = int(part.runs[~known][0]) // (e.block_tokens // self.unit)
            raise TransferStopped(f"ticket {name} does not expect block {missing}{', or not all of it' if missing in e.blocks else ''}")
        if len(np.unique(at)) != len(at):
            raise TransferStopped(f"ticket {name}: a block is named twice")
        columns = slice(part.layers[0] - e.layers[0], part.layers[1] - e.layers[0])
        return self.order[at], columns, slice(part.heads.start, part.heads.stop)

    def result(self) -> TransferResult:
        assert self.closed is not None
        came = int(self.arrived.sum()) * self.run_bytes if self.unit else 0
        return TransferResult(self.closed[0], came, time.monotonic() - self.started, self.closed[1])


class TicketPart:
    """One push into a ticket. `arrived`: an earlier attempt brought it, nothing is to be written."""

    def __init__(self, tickets: Tickets, name: str, ticket: _Ticket | None, place: Place, arrived: bool) -> None:
        self.tickets, self.name, self._ticket, self.place, self.arrived = tickets, name, ticket, place, arrived

    @property
    def ticket(self) -> _Ticket:
        assert self._ticket is not None, "nothing is to be written"
        return self._ticket

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around every write into the blocks. Trouble once the ticket is closed."""
        tickets, ticket = self.tickets, self.ticket
        with tickets.changed:
            if ticket.closed is not None:
                raise TransferStopped(f"ticket {self.name} is over: {ticket.closed[1] or ticket.closed[0]}", "expired")
            ticket.writers += 1
        try:
            yield
        finally:
            with tickets.changed:
                ticket.writers -= 1
                tickets.settle(self.name, ticket)

    def commit(self) -> None:
        """All of it is here and sound."""
        with self.tickets.changed:
            if self.ticket.closed is not None:
                raise TransferStopped(f"ticket {self.name} is over: {self.ticket.closed[1] or self.ticket.closed[0]}", "expired")
            self.ticket.arrived[self.place] = True
            if self.ticket.arrived.all():
                self.tickets.close(self.name, "done", "")

    def leave(self) -> None:
        """Nothing more is written by it."""
        with self.tickets.changed:
            if not self.arrived:
                self.ticket.busy[self.place] = False
            self.tickets.changed.notify_all()


class Tickets:
    """Threads write under it, the event loop opens and closes. `ended` callbacks come from any thread, once for each ticket."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self._open: dict[str, _Ticket] = {}
        self._ended: OrderedDict[str, TransferResult] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def open(self, name: str, expected: Expected, ended: Ended) -> None:
        """What is expected may be written by pushes that name it. No two open tickets share a block."""
        with self.changed:
            assert name not in self._open and name not in self._ended, f"ticket {name} was used before"
            for other, ticket in self._open.items():
                both = np.intersect1d(ticket.expected.blocks, expected.blocks)
                assert not len(both), f"ticket {other} already expects block {both[0]}"
            self._open[name] = _Ticket(expected, ended)
            if not len(expected.blocks):
                self.close(name, "done", "")

    def close(self, name: str, status: Status, reason: str) -> bool:
        """False: it had ended before. It resolves at once, or with the last write under way."""
        with self.changed:
            ticket = self._open.get(name)
            if ticket is None or ticket.closed is not None:
                return False
            ticket.closed = status, reason
            self.settle(name, ticket)
            self.changed.notify_all()
            return True

    def settle(self, name: str, ticket: _Ticket) -> None:
        """Resolve a closed ticket that nobody writes any more."""
        if ticket.closed is None or ticket.writers or self._open.get(name) is not ticket:
            return
        del self._open[name]
        self._ended[name] = result = ticket.result()
        while len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)
        ticket.ended(result)

    def begin(self, name: str, peer: tuple[str, str], part: KvPart, run_bytes: int, deadline: float) -> TicketPart:
        """Write a part under this ticket, or Trouble: an unknown or ended one, blocks outside, a part partly here. Waits for an overlapping
        part until `deadline`. `run_bytes`: of one run of one head in one layer, on the way here."""
        with self.changed:
            while True:
                ticket = self._open.get(name)
                if ticket is None or ticket.closed is not None:
                    if ticket is None and name not in self._ended:
                        raise TransferStopped(f"ticket {name} is not expected here")
                    status, reason = (self._ended[name].status, self._ended[name].reason) if ticket is None else ticket.closed or ("", "")
                    if status == "done":
                        return TicketPart(self, name, None, (np.zeros(0, np.intp), slice(0, 0), slice(0, 0)), True)
                    raise TransferStopped(f"ticket {name} is over: {reason or status}", "expired")
                if ticket.untouched:
                    ticket.lay_out(part.unit, run_bytes)
                place = ticket.place(name, part)
                if not ticket.busy[place].any():
                    break
                if not self.changed.wait(max(0.0, deadline - time.monotonic())):
                    raise TransferStopped(f"ticket {name}: an earlier push of the same blocks is still under way")
            here = ticket.arrived[place]
            if here.any() and not here.all():
                raise TransferStopped(f"ticket {name}: some of these blocks and layers have arrived already")
            ticket.pushed_by.add(peer)
            if not here.all():
                ticket.busy[place] = True
            return TicketPart(self, name, ticket, place, bool(here.all()))

    def of_peer(self, peer: tuple[str, str]) -> list[str]:
        """Open tickets that this peer has pushed to."""
        with self.changed:
            return [name for name, ticket in self._open.items() if peer in ticket.pushed_by]
