"""Ranks of other hosts come to rank 0's port: with the token, each once, and else they are told why not."""

from __future__ import annotations

import socket
import threading

import pytest

from pdlab.core.types import UsageError
from pdlab.real.instance.rank_meeting import address_of, come_to, listener, meet
from tests.support.ports import free_port


def test_ranks_come_each_once_and_with_the_token() -> None:
    master = f"127.0.0.1:{free_port()}"
    joined: dict[int, socket.socket] = {}
    server = listener(master)
    meeting = threading.Thread(target=meet, args=(server, {1, 2}, 3, "secret", lambda rank, sock, where: joined.update({rank: sock})))
    meeting.start()
    said: list[str] = []
    with pytest.raises(UsageError, match="has another token: give all nodes the same --internal-token"):
        come_to(master, 1, 3, "other", said.append)
    with pytest.raises(UsageError, match="rank 0 has 3 ranks, not 4"):
        come_to(master, 1, 4, "secret", said.append)
    with socket.create_connection(address_of(master)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    one = come_to(master, 1, 3, "secret", said.append)
    with pytest.raises(UsageError, match="rank 1 is not waited for: give each node its own --node-rank"):
        come_to(master, 1, 3, "secret", said.append)
    two = come_to(master, 2, 3, "secret", said.append)
    meeting.join(10)
    assert sorted(joined) == [1, 2] and not said
    for sock, theirs in ((one, joined[1]), (two, joined[2])):
        sock.sendall(b"x")
        assert theirs.recv(1) == b"x"
        sock.close()
        theirs.close()


@pytest.mark.parametrize("master", ["10.0.0.1", ":29500", "host:", "host:99999"])
def test_an_address_without_host_or_port_is_refused(master: str) -> None:
    with pytest.raises(UsageError, match="is not host:port"):
        address_of(master)
