"""What the HTTP process needs of an engine. `pdlab.real.engine.client.EngineClient` is one, in a process of its own."""

from __future__ import annotations

import asyncio
from typing import Protocol

from pdlab.real.engine.messages import Ready, Step, Submit, Tokens


class Engine(Protocol):
    """`load` is the last step's; `down` says why the engine has ended, or None."""

    ready: Ready
    load: Step
    down: str | None

    def submit(self, submit: Submit, arriving: asyncio.Queue[Tokens] | None = None) -> asyncio.Queue[Tokens]:
        """The tokens of all candidates arrive in the queue, each one's last with `finish` set; several requests may share a given queue.
        An engine that is down gives every candidate finish "error"."""
        ...

    def cancel(self, id: int, candidate: int = -1) -> None:
        """Drop a request or one of its candidates (-1: all). Harmless when it has ended."""
        ...
