"""What a server needs beside its engine to take part in the exchange of KV."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pdlab.real.api.engine import Exchanging
from pdlab.real.api.legs import Move
from pdlab.real.engine.messages import FromQueue, News, Submit


class Mover(Protocol):
    async def bring(
        self, move: Move, submit: Submit, arriving: asyncio.Queue[FromQueue], news: asyncio.Queue[News], given: Callable[[list[int]], None]
    ) -> None:
        """Take a running request over. Its tokens are to come in `arriving`; the news of its KV, which come there too, are passed on in
        `news`. `given` is told what was made elsewhere, before the first token comes. Raises ApiError; what it began at the source is then
        called off."""
        ...


@dataclass(frozen=True, slots=True)
class Exchange:
    """`host` and `port`: where peers are told to find this server; as their request reached it where not given."""

    engine: Exchanging
    mover: Mover
    host: str = ""
    port: int = 0
