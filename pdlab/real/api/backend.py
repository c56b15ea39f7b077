"""What the HTTP process needs of an engine. `pdlab.real.instance.engine_client.EngineClient` is one, in a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

from prometheus_client.core import Metric

from pdlab.core.types import Report, Stage
from pdlab.real.engine.messages import (
    Exported,
    FromQueue,
    Proceed,
    Ready,
    Receive,
    Resume,
    Step,
    StructuredOutputs,
    Submit,
    Tokens,
    Vocabulary,
)


class Ended(Tokens, frozen=True):
    """The last of a candidate that did not succeed; `finish` is "abort" or "error". `stage` says how the request ended; `unfit`: the
    request itself is at fault, and `error` is for the client; `overload`: it may come again when there is less to do."""

    stage: Stage = Stage.FAILED
    unfit: bool = False
    overload: bool = False


class Backend(Protocol):
    """`down` says why the engine has ended, or None."""

    ready: Ready
    down: str | None

    @property
    def load(self) -> Step:
        """The last step's."""
        ...

    def submit(self, submit: Submit, arriving: asyncio.Queue[FromQueue] | None = None) -> asyncio.Queue[FromQueue]:
        """The tokens of all candidates arrive in the queue, each one's last with `finish` set; several requests may share a given queue.
        An engine that is down gives every candidate finish "error"."""
        ...

    def cancel(self, id: int, candidate: int = -1) -> None:
        """Drop a request or one of its candidates (-1: all). Harmless when it has ended."""
        ...


class Exchanging(Backend, Protocol):
    """An engine that passes KV to others, and takes theirs. A request's queue brings the news of its KV before the tokens that follow.
    `on_load` is called when there is another `load`, or it is `down`."""

    on_load: Callable[[], None]

    def receive(self, receive: Receive, arriving: asyncio.Queue[FromQueue]) -> None: ...
    def proceed(self, proceed: Proceed) -> None: ...
    def resume(self, resume: Resume, arriving: asyncio.Queue[FromQueue]) -> None: ...
    def release(self, lease: str) -> None: ...
    def renew(self, lease: str, lease_s: float = 30.0) -> None: ...

    async def leased(self, lease: str) -> bool:
        """Does it hold, with all that was asked before? An engine that is down holds nothing."""
        ...

    async def export(self, id: int, stop: bool = False, resume: bool = False, lease_s: float = 30.0) -> Exported:
        """Of an engine that is down: an answer with `error`."""
        ...

    async def lend(self, hashes: tuple[int, ...], lease_s: float = 30.0) -> Exported:
        """Likewise; without a lease where none of these blocks is cached."""
        ...

    def report(self, name: str, incarnation: int) -> Report:
        """The load after the last step; `stored` and `evicted` since the last call."""
        ...


@runtime_checkable
class Timed(Protocol):
    """An engine that can tell a request's stages afterwards."""

    def timeline(self, id: int) -> dict[str, Any] | None: ...


@runtime_checkable
class Routing(Protocol):
    """An engine that is a router: it tells of its own work, and of its instances."""

    def families(self) -> Iterable[Metric]: ...

    def targets(self) -> list[dict[str, Any]]:
        """Where Prometheus finds the instances."""
        ...


@runtime_checkable
class Compiling(Protocol):
    """An engine that is to know a grammar before a request that needs it."""

    async def compile(self, structured: StructuredOutputs, vocabulary: Vocabulary) -> str:
        """Why there is no such grammar, in one line, or ""."""
        ...


@runtime_checkable
class Foreign(Protocol):
    """Do only engines that are not pdlab's stand behind it?"""

    @property
    def foreign(self) -> bool: ...
