"""Connections whose other end vanished without a word must break by themselves: the options that see to it are set."""

from __future__ import annotations

import socket
import sys

import pytest

from pdlab.real.api.http_server import bind


def test_small_answers_do_not_wait_for_the_clients_ack() -> None:
    """Nagle's algorithm would cost 40 ms each: uvicorn writes head and body apart."""
    with bind("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        listening.setblocking(True)
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the options are Linux's")
def test_a_silent_end_is_noticed_within_ten_seconds() -> None:
    with bind("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        listening.setblocking(True)
        accepted, _ = listening.accept()
        with accepted:
            idle, interval, count = (
                accepted.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert idle + interval * count <= 11
