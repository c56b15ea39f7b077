"""What passes between a router and an instance beside OpenAI's own fields: JSON by msgspec, never pickle.
`docs/reference/protocol.md` explains it.

Sizes and counts from a peer are bounded here, before anything is made of them.
"""

from __future__ import annotations

from typing import Any

import msgspec

PROTOCOL = 1
MOST_IDS = 1 << 20  # block or token ids in one message
RELAY_HEADER = "x-pdlab-relay-to"
TOKEN_HEADER = "x-pdlab-token"
TIMELINE_HEADER = "x-pdlab-timeline"
TRACE_HEADERS = ("traceparent", "tracestate")  # W3C's
Carrier = tuple[str, str]  # their values; empty: not there


class PushTo(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a prefill instance is to write: blocks that a decode instance has reserved under `ticket`. The first `cached_tokens` are
    there."""

    descriptor: str
    ticket: str
    block_ids: list[int]
    cached_tokens: int = 0
    granularity: str = "request"  # chunk, layer
    deadline_s: float = 30.0


class MigrateFrom(msgspec.Struct, frozen=True):
    """The instance (its URL) and the leg (its X-Request-Id) that decode now."""

    url: str
    leg: str


class FetchFrom(msgspec.Struct, frozen=True, omit_defaults=True):
    """The instance (its URL) that is believed to hold the KV of the prompt's first `tokens`. Whatever does not come from there within
    `deadline_s` is computed. `holder` is its name, for who asks."""

    url: str
    tokens: int
    deadline_s: float = 30.0
    holder: str = ""


class FetchedFrom(msgspec.Struct, frozen=True, omit_defaults=True):
    """What came of a FetchFrom: KV of so many tokens, in `bytes`, which took `seconds`."""

    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    unreachable: bool = False


class Extra(msgspec.Struct, frozen=True, omit_defaults=True):
    """The `pdlab` object within `kv_transfer_params`. `made`: output tokens that exist already, which the decode leg goes on from; without
    KV to read they are computed with the prompt. `events`: send this stream's events, too. `reserve`: take blocks, and wait for
    /pdlab/v1/continue. `descriptor` and `kv_tokens`: of the KV that waits at the prefill instance; `blocks` that lie there.

    `deadline_s`: within which all KV must be here; what is reserved waits for its prompt, too. `fetch`: what a leg that computes the
    prompt is to read before."""

    made: list[int] = []
    events: bool = False
    reserve: bool = False
    push: PushTo | None = None
    migrate: MigrateFrom | None = None
    fetch: FetchFrom | None = None
    descriptor: str = ""
    kv_tokens: int = 0
    deadline_s: float = 30.0


class KvParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """vLLM's `kv_transfer_params` (NIXL, pull), both ways, and what pdlab adds. `remote_request_id` names the lease at the prefill
    instance."""

    do_remote_prefill: bool = False
    do_remote_decode: bool = False
    remote_engine_id: str | None = None
    remote_request_id: str | None = None
    remote_block_ids: list[Any] | None = None  # ids, or a list of them for each group of KV caches (here: one)
    remote_host: str | None = None
    remote_port: int | None = None
    remote_num_tokens: int | None = None
    tp_size: int | None = None
    transfer_mode: str | None = None
    pdlab: Extra | None = None

    def block_ids(self) -> list[int]:
        """Flat. Raises ValueError where they are no block ids, or too many."""
        ids = self.remote_block_ids or []
        if ids and isinstance(ids[0], list):
            if len(ids) != 1:
                raise ValueError(f"remote_block_ids has {len(ids)} groups of KV caches, one is supported")
            ids = ids[0]
        if len(ids) > MOST_IDS or not all(type(one) is int and 0 <= one < 1 << 31 for one in ids):
            raise ValueError("remote_block_ids must be block ids")
        return ids


class StreamEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """The `pdlab` object of a chunk of a stream. `event` is "reserved" (with ticket, descriptor, block_ids, cached_tokens), "transferred"
    (all KV is here: bytes, the seconds they took, how long ago the last came, transport, and the `made` tokens that it goes on from),
    "prefilled" (the prompt was computed here, `queue_s` after it came, but for its `cached_tokens`; `fetched`, what came of a prefix
    that was to be read), or "moved" (the last: the request was migrated away)."""

    event: str
    ticket: str = ""
    descriptor: str = ""
    block_ids: list[int] = []
    cached_tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    waited_s: float = 0.0
    transport: str = ""
    made: int = 0
    queue_s: float = 0.0
    fetched: FetchedFrom | None = None


class Continue(msgspec.Struct, frozen=True, omit_defaults=True):
    """POST /pdlab/v1/continue: a leg that has reserved may decode when its KV is here. `kv_transfer_params`: where to pull it from;
    without, it is pushed."""

    leg: str
    made: list[int] = []
    kv_transfer_params: KvParams | None = None


class LeaseBody(msgspec.Struct, frozen=True):
    """POST /pdlab/v1/release and /renew: what is leased as `lease` is not needed any more, or for `lease_s` more. A renewal is answered
    404 `lease_unknown` where the lease has ended."""

    lease: str
    lease_s: float = 30.0


class ExportBody(msgspec.Struct, frozen=True, omit_defaults=True):
    """POST /pdlab/v1/export, from a migration's destination to its source. The blocks of a running leg are leased; with `stop` it stands
    still, with `resume` it goes on (the migration is called off)."""

    leg: str
    stop: bool = False
    resume: bool = False
    lease_s: float = 30.0


class ExportAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer: KV of the first `kv_tokens` tokens, in `block_ids`, leased as `lease`; `made` are all output tokens so far."""

    lease: str = ""
    descriptor: str = ""
    block_ids: list[int] = []
    kv_tokens: int = 0
    made: list[int] = []


class LendBody(msgspec.Struct, frozen=True):
    """POST /pdlab/v1/lend, from an instance that is about to compute a prompt: lease what the prefix cache holds of the blocks of these
    `hashes`, from the first on. Answered like an export; without a lease where it holds none."""

    hashes: list[int]
    lease_s: float = 30.0


class RoleChange(msgspec.Struct, frozen=True):
    """POST /pdlab/v1/role."""

    role: str


class Rejoin(msgspec.Struct, frozen=True):
    """POST /pdlab/v1/rejoin: a router did not reach this incarnation, and counts it as gone. It is to come back as a new one."""

    incarnation: int


class About(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """GET /pdlab/v1/instance. `spec` is its InstanceSpec as JSON, `state` ready, draining, or switching."""

    protocol: int = PROTOCOL
    engine_id: str = ""
    state: str = "ready"
    spec: msgspec.Raw = msgspec.Raw(b"{}")
    in_flight: int = 0
    leaked_blocks: int = 0


def trace_lines(carrier: Carrier) -> bytes:
    """The lines of a request's head that carry it; what is no header's value is left out."""
    named = zip(TRACE_HEADERS, carrier, strict=True)
    return b"".join(f"{name}: {value}\r\n".encode("ascii") for name, value in named if value and value.isascii() and value.isprintable())
