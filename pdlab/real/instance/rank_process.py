"""The process of a rank other than 0: `python -m pdlab.real.instance.rank_process FD_RANK_0 FD_PARENT`.

Its parent, on this host, tells it the options that are this host's; then rank 0 tells it who it is, and each pass. It holds no books. When
either has gone it ends at once, whatever it does: a rank alone computes nothing.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from pdlab.core.types import UsageError
from pdlab.real.engine.options import OPTIONS, EngineOptions
from pdlab.real.engine.passes import Pass
from pdlab.real.host.logs import inherited
from pdlab.real.instance.rank_messages import (
    TO_RANK,
    Begin,
    RankBroken,
    RankReady,
    RankSocket,
    Settled,
    ToRank,
    endpoint_options,
    read_frame,
)
from pdlab.real.transfer.rank_wire import ToRankKv

if TYPE_CHECKING:
    from pdlab.real.transfer.rank_kv import RankKv

log = logging.getLogger(__name__)
OF_A_HOST = ("model", "device", "threads", "node_rank", "kv_token", "kv_host", "kv_advertise")


def main() -> int:
    """Exits with 0 when rank 0 has gone, with 1 when broken."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    link = RankSocket(socket.socket(fileno=int(sys.argv[1])))
    parent = socket.socket(fileno=int(sys.argv[2])).makefile("rb")
    own = OPTIONS.decode(read_frame(parent))
    inbox: queue.SimpleQueue[ToRank] = queue.SimpleQueue()
    name = "?"
    kv = KvDesk()
    threading.Thread(target=_read, args=(link, inbox, kv), name="rank 0", daemon=True).start()
    threading.Thread(target=_end_with, args=(parent,), name="parent", daemon=True).start()
    try:
        with inherited():
            begin = inbox.get()
            assert isinstance(begin, Begin), "rank 0 says first who this is"
            name = str(begin.rank)
            own_keys = {key: getattr(own, key) for key in OF_A_HOST}
            run(link, inbox, kv, begin, msgspec.structs.replace(begin.options, **own_keys))
    except UsageError as error:
        link.send(RankBroken(str(error), usage=True))
    except Exception as error:
        log.exception("rank %s has failed", name)
        link.send(RankBroken(f"{type(error).__name__}: {error}"))
    return 1


class KvDesk:
    """Takes what rank 0 says about KV, in the thread that reads, so that none of it waits for a pass."""

    def __init__(self) -> None:
        self.rank_kv: RankKv

    def serve(self, rank_kv: RankKv) -> None:
        self.rank_kv = rank_kv

    def take(self, message: ToRankKv) -> None:
        self.rank_kv.take(message)


def _read(link: RankSocket, inbox: queue.SimpleQueue[ToRank], kv: KvDesk) -> None:
    for raw in link.raw():
        message = TO_RANK.decode(raw)
        if isinstance(message, Begin | Pass | Settled):
            inbox.put(message)
        else:
            kv.take(message)
    os._exit(0)


def _end_with(parent: BinaryIO) -> None:
    parent.read()
    os._exit(0)


def run(link: RankSocket, inbox: queue.SimpleQueue[ToRank], kv: KvDesk, begin: Begin, options: EngineOptions) -> None:
    """Load this rank's part, and follow rank 0."""
    from pdlab.real.engine.load import device_of, fingerprint_of, load_model
    from pdlab.real.host.background import Background
    from pdlab.real.models.process_group import GroupExchange, meeting
    from pdlab.real.models.ranks import Ranks
    from pdlab.real.transfer.endpoint import KvEndpoint
    from pdlab.real.transfer.rank_kv import RankKv

    device = device_of(options.device_of_rank(begin.rank))
    store = meeting(begin.host, begin.port)
    exchange = GroupExchange.over(store, begin.rank, options.tp, device, begin.address or link.address)
    ranks = Ranks(begin.rank, options.tp, exchange, options.ep)
    model = load_model(options, device, ranks)
    runner, fingerprint = model.runner(options), fingerprint_of(model.model.config, options)
    if options.kv_name:
        background = Background("kv")
        given = endpoint_options(options, fingerprint, begin.rank, secrets.token_hex(4), model.model.config.kv_heads)
        endpoint = KvEndpoint(runner.kv, **given)
        background.run(endpoint.start())
        kv.serve(RankKv(endpoint, background, link.send))
        link.send(RankReady(fingerprint, endpoint.descriptor()))
    else:
        link.send(RankReady(fingerprint))
    runner.make_room()
    while True:
        match inbox.get():
            case Pass() as step:
                runner.follow(step)
            case Settled():
                runner.settle_memory()
            case other:
                raise AssertionError(f"{type(other).__name__} came in the middle")


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)
