"""Who is at the other end of a Unix socket, as the kernel says. An abstract address can be called, and taken, by every user of a host."""

from __future__ import annotations

import os
import socket
import struct

_CREDENTIALS = struct.Struct("3i")  # process, user, group


def user_of(sock: socket.socket) -> int:
    """The user id that the other end had when the two were connected."""
    assert sock.family == socket.AF_UNIX, "only the ends of a Unix socket are known to the kernel"
    _, user, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(user)


def stranger(sock: socket.socket) -> str:
    """Why nothing is to be told to the other end; empty: it is of this process's user."""
    theirs, ours = user_of(sock), os.geteuid()
    return "" if theirs == ours else f"the two ends run as users {theirs} and {ours}"
