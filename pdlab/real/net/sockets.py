"""TCP connections whose other end is dead, slow, or idle: told apart.

A dead end is given up within about 10 s: while nothing is under way by the kernel's keep-alive, else by what it left unacknowledged
(`Reading`). TCP_USER_TIMEOUT would do both, but ends connections to readers that are well and only pause: Linux counts a closed window as
data that nobody takes.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from dataclasses import dataclass

UNANSWERED = 6  # the kernel's tries in a row, the pause between them doubled each time: 6 to 13 s
_INFO = struct.Struct("=8B24I4Q3I")  # struct tcp_info of Linux 4.6 and later, to tcpi_notsent_bytes
_RETRANSMITS, _PROBES, _UNACKED, _BYTES_ACKED, _NOT_SENT = 2, 3, 12, 34, 38


def keep_alive(sock: socket.socket) -> None:
    """Break a connection whose other end has gone without a word (a cut cable, a host that is off) within about 10 s while nothing is said.
    No more than a wish where the system lacks it."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
            if (option := getattr(socket, name, None)) is not None:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of what was sent. `unanswered` tries to reach the other end in a row; `pending`: something waits to be taken;
    `acked_bytes` since the connection began."""

    unanswered: int
    pending: bool
    acked_bytes: int


def sent(sock: socket.socket, waiting_bytes: int) -> Sent | None:
    """`waiting_bytes` are those that the kernel has not got yet. None where the system does not tell."""
    try:
        raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
        fields = _INFO.unpack(raw)
    except (OSError, AttributeError, struct.error):
        return None
    pending = waiting_bytes > 0 or fields[_UNACKED] > 0 or fields[_NOT_SENT] > 0
    return Sent(max(fields[_RETRANSMITS], fields[_PROBES]) if pending else 0, pending, fields[_BYTES_ACKED])


class Reading:
    """One connection's other end, sans-IO: is it dead, or idle for too long? One that pauses is neither."""

    def __init__(self, idle_s: float) -> None:
        self.idle_s = idle_s
        self._acked_bytes = -1
        self._since_s = 0.0

    def judge(self, sent: Sent, now: float) -> str:
        """Why the connection is to be given up; empty: it is not."""
        if sent.unanswered >= UNANSWERED:
            return "its other end does not answer any more"
        if not sent.pending or sent.acked_bytes != self._acked_bytes:
            self._acked_bytes, self._since_s = sent.acked_bytes, now
        elif now - self._since_s >= self.idle_s:
            return f"its reader has taken nothing for {self.idle_s:g} s"
        return ""
