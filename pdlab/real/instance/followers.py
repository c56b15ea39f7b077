"""Rank 0's hold on the other ranks of its instance: starts those of this host, tells all of them each pass, and knows at once when one has
gone. An instance lives as long as all of its ranks."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import subprocess
import threading
import time
from collections.abc import Callable

import msgspec

from pdlab.core.types import UsageError
from pdlab.real.engine.options import EngineOptions
from pdlab.real.host.processes import MODULE
from pdlab.real.instance.rank_meeting import listener, meet
from pdlab.real.instance.rank_messages import FROM_RANK, Begin, FromRank, RankBroken, RankReady, RankSocket, Settled, frame
from pdlab.real.transfer.rank_wire import KvMoved, KvNoted

SAYS_WHY_S = 1.0  # for the word of a rank that has failed, after others have noticed
PROCESS = "pdlab.real.instance.rank_process"


class RankLost(Exception):
    """A rank has gone, so the instance ends; which, and why."""


class Follower:
    """One rank. `name`: for people."""

    def __init__(self, rank: int, link: RankSocket, name: str, process: subprocess.Popen[bytes] | None = None) -> None:
        self.rank, self.link, self.name, self.process = rank, link, name, process


class Followers:
    """The ranks from 1 on. `lost(why)` is called once, from another thread, when the first of them has gone."""

    def __init__(self, options: EngineOptions, lost: Callable[[str], None]) -> None:
        self.options, self._lost = options, lost
        self.all: list[Follower] = []
        self.gone = ""
        self.descriptors: dict[int, bytes] = {}  # of the KV memory of each
        self.kv_answered: Callable[[KvNoted | KvMoved], None] = lambda answer: None  # from any thread
        self._ready: queue.SimpleQueue[tuple[Follower, FromRank | None]] = queue.SimpleQueue()
        self._serving = self._closing = False
        self._went = threading.Event()
        self._lock = threading.Lock()
        self._parents: list[socket.socket] = []
        self._listener: socket.socket | None = None

    def start(self) -> None:
        """Start the processes of this host. Raises UsageError where rank 0 cannot be met."""
        if self.options.nnodes > 1:
            self._listener = listener(self.options.master)
        for rank in self.options.ranks_here[1:]:
            ours, theirs = socket.socketpair()
            process, parent = start_rank(self.options, theirs)
            self._parents.append(parent)
            self._add(Follower(rank, RankSocket(ours), f"rank {rank} (process {process.pid})", process))

    def meet(self) -> None:
        """Until the ranks of other hosts have come. Raises UsageError."""
        if self._listener is not None:
            missing = set(range(self.options.tp)) - set(self.options.ranks_here)
            meet(self._listener, missing, self.options.tp, self.options.kv_token, self._joined)

    def _joined(self, rank: int, sock: socket.socket, where: str) -> None:
        self._add(Follower(rank, RankSocket(sock), f"rank {rank} on {where}"))

    def _add(self, follower: Follower) -> None:
        self.all.append(follower)
        threading.Thread(target=self._listen, args=(follower,), name=f"rank {follower.rank}", daemon=True).start()

    def begin(self, host: str, port: int) -> None:
        """Tell each who it is, and where all meet."""
        for follower in self.all:
            options = msgspec.structs.replace(self.options, kv_token="")
            self._send(follower, frame(Begin(follower.rank, options, host, port, host if follower.process is not None else "")))

    def await_ready(self, fingerprint: str) -> None:
        """Until all have loaded their part. Raises UsageError with what one of them has found, RankLost where one has gone."""
        for _ in self.all:
            follower, news = self._ready.get()
            if isinstance(news, RankBroken):
                raise (UsageError if news.usage else RankLost)(f"{follower.name}: {news.reason}")
            if news is None:
                raise RankLost(self._why(follower))
            assert isinstance(news, RankReady), "nothing is asked before"
            self.descriptors[follower.rank] = news.descriptor
            if news.fingerprint != fingerprint:
                raise UsageError(f"{follower.name} has another model than rank 0, or other weights: give all nodes the same --model")
        self._serving = True

    def settled(self) -> None:
        """The first passes are over."""
        self.tell(Settled())

    def tell(self, message: msgspec.Struct) -> None:
        """To all. Raises RankLost."""
        raw = frame(message)
        for follower in self.all:
            self._send(follower, raw)

    def tell_one(self, rank: int, message: msgspec.Struct) -> None:
        """To one, from any thread. Of one that has gone the engine hears elsewhere."""
        for follower in self.all:
            if follower.rank == rank:
                with contextlib.suppress(OSError):
                    follower.link.send(message)

    def _send(self, follower: Follower, raw: bytes) -> None:
        try:
            follower.link.send_raw(raw)
        except OSError:
            raise RankLost(self.why() or self._why(follower)) from None

    def _listen(self, follower: Follower) -> None:
        broken = ""
        for raw in follower.link.raw():
            news = FROM_RANK.decode(raw)
            if isinstance(news, RankBroken):
                broken = news.reason
            if isinstance(news, KvNoted | KvMoved):
                self.kv_answered(news)
            elif not self._serving:
                self._ready.put((follower, news))
        if not self._closing:
            self._gone(f"{follower.name}: {broken}" if broken else self._why(follower))
            self._ready.put((follower, None))

    def _why(self, follower: Follower) -> str:
        if follower.process is None:
            return f"{follower.name} has gone"
        with contextlib.suppress(subprocess.TimeoutExpired):
            follower.process.wait(SAYS_WHY_S)
        status = follower.process.returncode
        how = "has hung up" if status is None else f"was killed by signal {-status}" if status < 0 else f"has ended with status {status}"
        return f"{follower.name} {how}"

    def _gone(self, why: str) -> None:
        with self._lock:
            if self.gone:
                return
            self.gone = why
        self._went.set()
        if self._serving:
            self._lost(why)

    def why(self) -> str:
        """Which rank has gone, and why, waiting a moment for the word of it; "": none has."""
        self._went.wait(SAYS_WHY_S)
        return self.gone

    def close(self) -> None:
        """End them: each does when its socket closes."""
        self._closing = True
        for follower in self.all:
            with contextlib.suppress(OSError):
                follower.link.sock.shutdown(socket.SHUT_RDWR)
        for parent in self._parents:
            parent.close()
        until_s = time.monotonic() + 5.0
        for follower in self.all:
            if follower.process is not None:
                try:
                    follower.process.wait(max(0.0, until_s - time.monotonic()))
                except subprocess.TimeoutExpired:
                    follower.process.kill()
                    follower.process.wait()


def start_rank(options: EngineOptions, to_rank_0: socket.socket) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A rank's process on this host, which speaks to rank 0 by the socket given, and our end of another: when that closes, it ends."""
    ours, theirs = socket.socketpair()
    with to_rank_0, theirs:
        fds = [to_rank_0.fileno(), theirs.fileno()]
        process = subprocess.Popen(
            [*MODULE, PROCESS, *map(str, fds)],
            pass_fds=fds,
            env=environment(options),
        )
    ours.sendall(frame(options))
    return process, ours


def environment(options: EngineOptions) -> dict[str, str]:
    """Of a rank's process: OpenMP threads as are its share."""
    found = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if options.rank_threads:
        found["OMP_NUM_THREADS"] = str(options.rank_threads)
    return found
