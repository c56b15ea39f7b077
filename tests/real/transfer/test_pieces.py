"""Pieces of memory: copied and sent, by the compiled loop and without a compiler."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from pdlab.kernels.cpu_build import library
from pdlab.real.transfer import pieces


@pytest.fixture(params=["compiled", "numpy"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "numpy":
        monkeypatch.setenv("PDLAB_KERNELS", "reference")
    for cached in (library, pieces._compiled):
        cached.cache_clear()
    assert pieces.can_send() == (request.param == "compiled")
    yield
    for cached in (library, pieces._compiled):
        cached.cache_clear()


@pytest.mark.parametrize("read_next", [False, True])
@pytest.mark.parametrize(("piece_bytes", "aside"), [(64, 0), (4096, 0), (192, 16), (192, 8), (100, 0), (7, 3)])
def test_each_piece_lands_where_it_belongs_and_nothing_else_changes(loop: None, piece_bytes: int, aside: int, read_next: bool) -> None:
    rng = np.random.default_rng(piece_bytes)
    source, target = (rng.integers(0, 256, 64 * piece_bytes + 64, np.uint8) for _ in range(2))
    a, b = rng.permutation(64)[:20] * piece_bytes, rng.permutation(64)[:20] * piece_bytes + aside
    expected = target.copy()
    for there, here in zip(a, b, strict=True):
        expected[here : here + piece_bytes] = source[there : there + piece_bytes]
    pieces.copy_pieces(source.ctypes.data + a, target.ctypes.data + b, piece_bytes, read_next=read_next)
    assert np.array_equal(target, expected)
    pieces.copy_pieces(a[:0], b[:0], piece_bytes)
    assert np.array_equal(target, expected)


@pytest.mark.skipif(not pieces.can_send(), reason="no C++ compiler")
def test_pieces_are_sent_in_their_order_however_little_the_socket_takes() -> None:
    rng = np.random.default_rng(1)
    memory, order = rng.integers(0, 256, 3000 * 1000, np.uint8), rng.permutation(3000)
    waits, came = [], bytearray()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        receiver = threading.Thread(target=lambda: [came.extend(some) for some in iter(lambda: theirs.recv(777), b"")])
        receiver.start()

        def wait() -> None:
            waits.append(1)
            select.select([], [ours], [], 60)

        pieces.send_pieces(ours.fileno(), memory.ctypes.data + order * 1000, 1000, wait)
        ours.shutdown(socket.SHUT_WR)
        receiver.join()
    assert waits
    assert came == memory.reshape(3000, 1000)[order].tobytes()


@pytest.mark.skipif(not pieces.can_send(), reason="no C++ compiler")
def test_a_socket_that_was_hung_up_says_so() -> None:
    memory = np.zeros(1 << 20, np.uint8)
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, pytest.raises(OSError, match=os.strerror(32)):
        pieces.send_pieces(ours.fileno(), memory.ctypes.data + np.arange(256) * 4096, 4096, lambda: None)
