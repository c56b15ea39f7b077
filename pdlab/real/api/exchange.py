"""What a server needs beside its engine to take part in the exchange of KV."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from pdlab.real.api.backend import Exchanging
from pdlab.real.api.legs import Move, kv_lost
from pdlab.real.engine.messages import FromQueue, News, Submit
from pdlab.real.net.credentials import loopback
from pdlab.real.net.wire import FetchedFrom, FetchFrom
from pdlab.real.transfer.pair import ranks_of
from pdlab.real.transfer.result import TransferStopped


class Mover(Protocol):
    async def bring(
        self, move: Move, submit: Submit, arriving: asyncio.Queue[FromQueue], news: asyncio.Queue[News], given: Callable[[list[int]], None]
    ) -> None:
        """Take a running request over. Its tokens are to come in `arriving`; the news of its KV, which come there too, are passed on in
        `news`. `given` is told what was made elsewhere, before the first token comes. Raises ApiError; what it began at the source is then
        called off."""
        ...

    async def borrow(self, fetch: FetchFrom, submit: Submit, arriving: asyncio.Queue[FromQueue]) -> FetchedFrom | None:
        """Begin a request, the KV of its prompt's beginning read elsewhere; or where that is not to be had, computed: then what is to be
        told of it. Its tokens come in `arriving`. Never raises."""
        ...


class Directory(Protocol):
    """To whom this server connects: requests can name anybody. Both raise ApiError (409 kv_lost) where it does not."""

    async def check_descriptor(self, descriptor: bytes) -> None:
        """Whose KV is read, or written to."""
        ...

    async def check_url(self, url: str) -> None:
        """Who is asked, and sent the cluster's token."""
        ...


class SameHost:
    """Where there is neither registry nor token: processes of this host."""

    async def check_descriptor(self, descriptor: bytes) -> None:
        try:
            found = [rank.tcp for rank in ranks_of(descriptor)]
        except TransferStopped:
            return  # nobody can be reached by what cannot be read, and the engine says why
        for tcp in found:
            if tcp is not None and not loopback(tcp.host):
                raise kv_lost(f"{tcp.host} is another host, and this server has neither registry nor token")

    async def check_url(self, url: str) -> None:
        if not loopback(urlsplit(url).hostname or ""):
            raise kv_lost(f"{url} is another host, and this server has no registry")


SAME_HOST = SameHost()


@dataclass(frozen=True, slots=True)
class KvExchange:
    """`host` and `port`: where peers are told to find this server; as their request reached it where not given."""

    engine: Exchanging
    mover: Mover
    host: str = ""
    port: int = 0
    directory: Directory = SAME_HOST
