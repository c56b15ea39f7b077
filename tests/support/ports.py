"""Ports of this machine for servers that tests start."""

from __future__ import annotations

import contextlib
import random
import socket


def free_port() -> int:
    """Not one that the system gives to those who do not mind which: it stays free until a server takes it, and while that is down."""
    while True:
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", random.SystemRandom().randrange(20_000, 32_000)))
            return int(listener.getsockname()[1])
