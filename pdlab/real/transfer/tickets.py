"""The destination's book: which of its blocks a peer may push into, what has arrived, what is being written this moment.

A part (blocks x layers) of a ticket is written under `Part.writing()`. A ticket that is closed lets no new write begin, and resolves when
the last one has ended: whoever is told of its end can give its blocks to somebody else. Parts that overlap one being written wait for it,
so that an attempt that was given up cannot write after the one that replaced it.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from pdlab.real.transfer.blocks import Ids, Layers
from pdlab.real.transfer.result import Status, TransferResult, TransferStopped

REMEMBERED = 8192
Ended = Callable[[TransferResult], None]


class _Ticket:
    def __init__(self, blocks: Ids, layers: Layers, layer_block_bytes: int, ended: Ended) -> None:
        self.rows = {block: row for row, block in enumerate(blocks.tolist())}
        self.layers = layers
        self.layer_block_bytes = layer_block_bytes
        self.arrived: NDArray[np.bool_] = np.zeros((len(blocks), layers[1] - layers[0]), np.bool_)
        self.busy: NDArray[np.bool_] = np.zeros_like(self.arrived)
        self.writers = 0
        self.closed: tuple[Status, str] | None = None
        self.pushed_by: set[tuple[str, str]] = set()
        self.started = time.monotonic()
        self.ended = ended

    def result(self) -> TransferResult:
        assert self.closed is not None
        return TransferResult(
            self.closed[0], int(self.arrived.sum()) * self.layer_block_bytes, time.monotonic() - self.started, self.closed[1]
        )


class TicketPart:
    """One push into a ticket. `arrived`: an earlier attempt brought it, nothing is to be written."""

    def __init__(self, tickets: Tickets, name: str, ticket: _Ticket, rows: NDArray[np.intp], columns: slice, arrived: bool) -> None:
        self.tickets, self.name, self.ticket, self.rows, self.columns, self.arrived = tickets, name, ticket, rows, columns, arrived

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
            self.ticket.arrived[self.rows, self.columns] = True
            if self.ticket.arrived.all():
                self.tickets.close(self.name, "done", "")

    def leave(self) -> None:
        """Nothing more is written by it."""
        with self.tickets.changed:
            if not self.arrived:
                self.ticket.busy[self.rows, self.columns] = False
            self.tickets.changed.notify_all()


class Tickets:
    """Threads write under it, the event loop opens and closes. `ended` callbacks come from any thread, once for each ticket."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self._open: dict[str, _Ticket] = {}
        self._ended: OrderedDict[str, TransferResult] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def open(self, name: str, blocks: Ids, layers: Layers, layer_block_bytes: int, ended: Ended) -> None:
        """`blocks` in these layers may be written by pushes that name it. No two open tickets share a block."""
        with self.changed:
            assert name not in self._open and name not in self._ended, f"ticket {name} was used before"
            for other, ticket in self._open.items():
                both = ticket.rows.keys() & set(blocks.tolist())
                assert not both, f"ticket {other} already expects block {min(both)}"
            self._open[name] = _Ticket(blocks, layers, layer_block_bytes, ended)
            if not len(blocks):
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

    def begin(self, name: str, peer: tuple[str, str], blocks: Ids, layers: Layers, deadline: float) -> TicketPart:
        """Write `blocks` in `layers` under this ticket, or Trouble: an unknown or ended one, blocks outside, a part partly here. Waits
        for an overlapping part until `deadline`."""
        with self.changed:
            while True:
                ticket = self._open.get(name)
                if ticket is None or ticket.closed is not None:
                    if ticket is None and name not in self._ended:
                        raise TransferStopped(f"ticket {name} is not expected here")
                    status, reason = (self._ended[name].status, self._ended[name].reason) if ticket is None else ticket.closed or ("", "")
                    if status == "done":
                        return TicketPart(
                            self, name, _Ticket(blocks[:0], layers, 0, lambda _: None), np.zeros(0, np.intp), slice(0, 0), True
                        )
                    raise TransferStopped(f"ticket {name} is over: {reason or status}", "expired")
                rows, columns = self._place(name, ticket, blocks, layers)
                if not ticket.busy[rows, columns].any():
                    break
                if not self.changed.wait(max(0.0, deadline - time.monotonic())):
                    raise TransferStopped(f"ticket {name}: an earlier push of the same blocks is still under way")
            here = ticket.arrived[rows, columns]
            if here.any() and not here.all():
                raise TransferStopped(f"ticket {name}: some of these blocks and layers have arrived already")
            ticket.pushed_by.add(peer)
            if not here.all():
                ticket.busy[rows, columns] = True
            return TicketPart(self, name, ticket, rows, columns, bool(here.all()))

    def of_peer(self, peer: tuple[str, str]) -> list[str]:
        """Open tickets that this peer has pushed to."""
        with self.changed:
            return [name for name, ticket in self._open.items() if peer in ticket.pushed_by]

    @staticmethod
    def _place(name: str, ticket: _Ticket, blocks: Ids, layers: Layers) -> tuple[NDArray[np.intp], slice]:
        if not (ticket.layers[0] <= layers[0] < layers[1] <= ticket.layers[1]):
            raise TransferStopped(f"ticket {name} expects layers {ticket.layers[0]} to {ticket.layers[1]}, not {layers[0]} to {layers[1]}")
        try:
            rows = np.fromiter((ticket.rows[block] for block in blocks.tolist()), np.intp, len(blocks))
        except KeyError as missing:
            raise TransferStopped(f"ticket {name} does not expect block {missing}") from None
        if len(np.unique(rows)) != len(rows):
            raise TransferStopped(f"ticket {name}: a block is named twice")
        return rows, slice(layers[0] - ticket.layers[0], layers[1] - ticket.layers[0])
