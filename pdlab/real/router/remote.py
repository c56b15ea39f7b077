"""An instance as the live world reaches it: one incarnation of it, whatever engine answers there, over HTTP or a stand-in of the tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from pdlab.core.types import InstanceSpec, Report, Role
from pdlab.real.engine.messages import Sampling, Scored
from pdlab.real.net.http import Broken
from pdlab.real.net.wire import Carrier, Continue, FetchedFrom, KvParams, StreamEvent

ALIVE_S = 1.0


@dataclass(frozen=True, slots=True)
class LegAsk:
    """One leg of a request: `leg` is its X-Request-Id, unique for each attempt and instance. `tokens` is the prompt, output tokens of
    earlier attempts included, or these are `made` in `params`; `sampling.max_tokens` what remains to be made, with those. `hashes` is the
    prompt's chain (a stand-in's engine needs it; over HTTP the instance computes its own)."""

    leg: str
    request_id: int
    attempt: int
    tokens: list[int]
    sampling: Sampling
    priority: int = 0
    hashes: tuple[int, ...] = ()
    params: KvParams | None = None
    raw_params: bytes | None = None  # what the prefill instance answered, to be passed on word for word where `params` is None
    ttft_slo_s: float | None = None  # None: the experiment's
    tpot_slo_s: float | None = None
    waited_s: float = 0.0  # by its client, before this leg
    through: str = ""  # the URL of the instance that passes the answer on; empty: it comes straight
    trace: Carrier | None = None  # its span, for the instance's own
    offline: bool = False


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The prefill leg's answer: its token (with log-probabilities where asked for), and the `kv_transfer_params` for the decode leg, as
    they came (`raw_params`, None: no KV waits there) and as read. `finish`: "stop" where the token ended the request, else "length".
    `scores` are those of the prompt, where they were asked for, and `fetched` what came of a prefix that was to be read."""

    token: int
    finish: str
    cached_tokens: int = 0
    queue_s: float = 0.0
    raw_params: bytes | None = None
    params: KvParams | None = None
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None
    scores: list[Scored] | None = None
    fetched: FetchedFrom | None = None


class LegTokens(msgspec.Struct, frozen=True):
    """New tokens of one candidate of a leg, in order; `finish` "stop" or "length" ends it. `scores` of the prompt come before the first."""

    candidate: int
    tokens: list[int]
    finish: str | None = None
    logprobs: list[float] | None = None
    top: list[list[tuple[int, float]]] | None = None
    scores: list[Scored] | None = None


LegNews = LegTokens | StreamEvent
Hear = Callable[[LegNews], None]


class InstanceFull(Exception):
    """No room to reserve here now. The router waits or asks another."""


class Unfit(Exception):
    """This instance can never serve this request: its words are for the client."""


class Busy(Broken):
    """It takes nothing new now: it drains, loads, or has lost its place."""


class Fenced(Busy):
    """The instance has lost its place in the registry: this incarnation is over, whatever the registry shows."""


class TransferTrouble(Exception):
    """The KV did not come to the decode instance; both instances live. `cause` is a word of `api.metrics.CAUSES`."""

    def __init__(self, message: str = "", *, cause: str = "failed") -> None:
        super().__init__(message)
        self.cause = cause


class Remote(Protocol):
    """What the world asks of an instance. Cancelling the task that awaits a leg makes the instance drop it."""

    spec: InstanceSpec

    async def prefill(self, ask: LegAsk) -> Prefilled:
        """Compute the prompt and one token, and lease the KV. Raises Full (its queue is closed), Unfit, Broken."""
        ...

    async def decode(self, ask: LegAsk, hear: Hear) -> None:
        """A leg that makes tokens, to their end: alone (no params), from KV to be pulled, reserved for (`params.pdlab.reserve`), or
        migrated here. `hear` is told its news as they come, also while the leg is being cancelled. Raises Full, Unfit, Broken,
        TransferTrouble, and what `hear` raises."""
        ...

    async def proceed(self, go: Continue) -> None:
        """Tell a leg that has reserved where its KV is, and what was made. Raises Broken."""
        ...

    async def release(self, lease: str) -> None:
        """What is leased under that name is not needed. Never raises."""
        ...

    async def renew(self, lease: str) -> bool:
        """For another 30 s. False: it has ended, or nobody answers."""
        ...

    async def alive(self, within_s: float = ALIVE_S) -> bool | None:
        """Is it well? False: it says itself that it is not, or nobody listens there; None: no answer in time. Never raises."""
        ...

    async def load(self) -> Report | None:
        """Its report, asked of itself: while the registry is away. None: no answer in time."""
        ...

    async def switch(self, role: Role) -> None:
        """Begin to drain, then change role; the registry tells when it has. Raises Broken."""
        ...

    async def drain(self) -> None:
        """Begin to drain, then leave. Raises Broken."""
        ...

    async def rejoin(self) -> None:
        """It is to come back as a new incarnation: this one counts as gone. Never raises."""
        ...

    def close(self) -> None:
        """Nothing more will be asked of it: hang up."""
        ...
