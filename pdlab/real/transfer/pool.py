"""Connections kept open between transfers, as many as were ever needed at once, at most `IDLE` at rest for each peer."""

from __future__ import annotations

import threading
import time

from pdlab.real.transfer.connection import PeerConnection, Self
from pdlab.real.transfer.descriptor import Descriptor, Way
from pdlab.real.transfer.result import TransferStopped

IDLE = 8
Key = tuple[Descriptor, Way]


class Pool:
    """A connection is one thread's while it is out."""

    def __init__(self, own: Self) -> None:
        self._own = own
        self._lock = threading.Lock()
        self._idle: dict[Key, list[PeerConnection]] = {}
        self._closed = False

    def take(self, peer: Descriptor, *, way: Way, deadline: float) -> PeerConnection:
        """One at rest that is still alive, else a new one. Trouble: the peer cannot be reached."""
        while True:
            with self._lock:
                if self._closed:
                    raise TransferStopped("this endpoint is closed")
                idle = self._idle.get((peer, way))
                if not idle:
                    self._idle.pop((peer, way), None)
                    break
                found = idle.pop()
            if found.alive():
                found.deadline = deadline
                return found
            found.close()
        return PeerConnection.connect(peer, self._own, way=way, deadline=min(deadline, time.monotonic() + 5.0))

    def give(self, connection: PeerConnection) -> None:
        """Back, between two exchanges."""
        with self._lock:
            idle = self._idle.setdefault((connection.peer, connection.way), [])
            if not self._closed and len(idle) < IDLE:
                idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle = [connection for found in self._idle.values() for connection in found]
            self._idle.clear()
        for connection in idle:
            connection.close()
