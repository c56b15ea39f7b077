"""What `kv_transfer_params` ask of this instance, checked: the leg of a request whose KV goes to another instance, or comes from one.

Everything here was sent by a peer, or by a client who says to be one: counts, ids and strings are bounded before the engine sees them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pdlab.real.api.errors import ApiError, bad
from pdlab.real.api.requests import Ask, check_tokens
from pdlab.real.engine.messages import Held, Push, Ready, Source
from pdlab.real.net.wire import TOKEN_HEADER, Extra, FetchFrom, KvParams, PushTo
from pdlab.real.transfer.pair import tokens_held

PARAM = "kv_transfer_params"
GRANULARITIES = ("request", "chunk", "layer")
NOWHERE = Source(b"", "", [], 0)
MOST_NAME, MOST_DESCRIPTOR, MOST_SECONDS = 1024, 1 << 18, 3600.0


@dataclass(frozen=True, slots=True)
class Alone:
    """An ordinary request, whose stream tells how its prompt fared. The KV of its beginning may be fetched before."""

    fetch: FetchFrom | None = None


@dataclass(frozen=True, slots=True)
class Prefill:
    """Compute the prompt and one token; the KV is leased, or written to where `push` says. That of its beginning may be fetched before."""

    push: Push | None
    fetch: FetchFrom | None = None


@dataclass(frozen=True, slots=True)
class Pull:
    """Decode with KV that is read elsewhere, or computed here where nobody has it any more (NOWHERE). `made` tokens exist already. With
    `events` the stream tells when it is here."""

    source: Source
    made: list[int]
    deadline_s: float
    events: bool


@dataclass(frozen=True, slots=True)
class Here:
    """Decode what is leased here as `lease`."""

    lease: str
    made: list[int]
    events: bool


@dataclass(frozen=True, slots=True)
class Reserve:
    """Take blocks, and wait to be told where the KV is."""

    made: list[int]
    deadline_s: float
    events: bool = True


@dataclass(frozen=True, slots=True)
class Move:
    """Take over what `leg` decodes at the instance `url`."""

    url: str
    leg: str
    deadline_s: float
    events: bool = True


Leg = Alone | Prefill | Pull | Here | Reserve | Move


def check_origin(params: KvParams | None, of_the_cluster: bool) -> None:
    """Other instances are named, and KV is held for them, at the word of the cluster's own only. Raises ApiError."""
    if params is not None and not of_the_cluster:
        raise ApiError(
            401,
            f"{PARAM} needs the cluster's token: send {TOKEN_HEADER}, or Authorization: Bearer TOKEN",
            param=PARAM,
            code="invalid_token",
        )


def leg_of(params: KvParams | None, ready: Ready, exchanges: bool) -> Leg | None:
    """None: an ordinary request, also where what is needed to read the KV is missing (as at vLLM). Raises ApiError naming the field."""
    if params is None:
        return None
    extra = params.pdlab or Extra()
    if params.do_remote_decode and params.do_remote_prefill:
        raise bad(f"{PARAM}: do_remote_decode and do_remote_prefill exclude each other", PARAM)
    if not exchanges:
        if extra != Extra():
            raise bad(f"{PARAM}.pdlab: this server does not exchange KV", PARAM)
        return None
    if params.do_remote_decode:
        return Prefill(None if extra.push is None else _push(extra.push), None if extra.fetch is None else _fetch(extra.fetch))
    if not params.do_remote_prefill:
        if extra.fetch is not None and not extra.events:
            raise bad(f"{PARAM}.pdlab.fetch needs do_remote_decode, or pdlab.events", PARAM)
        return Alone(None if extra.fetch is None else _fetch(extra.fetch)) if extra.events else None
    deadline_s = _seconds(extra.deadline_s, "pdlab.deadline_s")
    check_tokens(extra.made, ready.vocab, f"{PARAM}.pdlab.made")
    if extra.migrate is not None:
        leg = _name(extra.migrate.leg, "pdlab.migrate.leg")
        return Move(_url(extra.migrate.url, "pdlab.migrate.url"), leg, deadline_s)
    if extra.reserve:
        return Reserve(extra.made, deadline_s)
    if params.remote_request_id and ready.engine_id and params.remote_engine_id == ready.engine_id:
        return Here(_name(params.remote_request_id, "remote_request_id"), extra.made, extra.events)
    if (source := source_of(params, ready)) is not None:
        return Pull(source, extra.made, deadline_s, extra.events)
    if not extra.made:
        return None
    if params.remote_request_id or params.remote_block_ids or extra.descriptor:
        raise bad(f"{PARAM}.pdlab.made needs all of remote_block_ids, remote_request_id and pdlab.descriptor, or none", PARAM)
    return Pull(NOWHERE, extra.made, deadline_s, extra.events)


def check_leg(leg: Leg, asked: Ask, stream: bool, prompts: int) -> None:
    """Does it go with the rest of the request? Raises ApiError."""
    candidates, most = asked.sampling.best_of, asked.sampling.max_tokens
    if prompts > 1:
        raise bad(f"{PARAM} goes with one prompt, not {prompts}", "prompt")
    if isinstance(leg, Alone):
        if leg.fetch is not None and candidates > 1:
            raise bad(f"{PARAM}.pdlab.fetch: n and best_of must be 1, not {candidates}", "n")
        return
    if asked.sampling.prompt_logprobs is not None and not isinstance(leg, Prefill):
        raise bad("log-probabilities of the prompt come from who computes it, not with KV that is there: ask the prefill leg", PARAM)
    if isinstance(leg, Prefill):
        if candidates > 1:
            raise bad(f"n and best_of must be 1 where {PARAM} has do_remote_decode, not {candidates}", "n")
        if most != 1:
            raise bad(f"max_tokens must be 1 where {PARAM} has do_remote_decode, not {most}", "max_tokens")
        if stream:
            raise bad(f"stream must be false where {PARAM} has do_remote_decode", "stream")
        return
    if isinstance(leg, Reserve | Move) and not stream:
        raise bad(f"{PARAM}.pdlab.{'reserve' if isinstance(leg, Reserve) else 'migrate'} needs stream: true", "stream")
    if candidates > 1 and (isinstance(leg, Move) or leg.made):
        raise bad(f"{PARAM}.pdlab: tokens that are made belong to one candidate, so n and best_of must be 1", "n")
    if not isinstance(leg, Move) and leg.made:
        check_made(leg.made, most, f"{PARAM}.pdlab.made")


def check_made(made: list[int], max_tokens: int, field: str) -> None:
    if len(made) >= max_tokens:
        raise bad(f"{field} has {len(made)} tokens, which leaves none of max_tokens {max_tokens}", field.split(".")[0])


def source_of(params: KvParams, ready: Ready) -> Source | None:
    """Where KV is to be read; None where that is not said. Raises ApiError naming the field."""
    extra = params.pdlab or Extra()
    try:
        blocks = params.block_ids()
    except ValueError as error:
        raise bad(f"{PARAM}.{error}", PARAM) from None
    if not blocks or not extra.descriptor or not params.remote_request_id:
        return None
    kv_tokens, at = extra.kv_tokens or params.remote_num_tokens or 0, descriptor(extra.descriptor, "pdlab.descriptor")
    if not 0 < kv_tokens <= (most := tokens_held(len(blocks), at, ready.block_tokens)):
        size = most // len(blocks)
        raise bad(f"{PARAM}.pdlab.kv_tokens {kv_tokens} is not what {len(blocks)} blocks of {size} tokens hold", PARAM)
    return Source(at, _name(params.remote_request_id, "remote_request_id"), blocks, kv_tokens)


def handed_on(held: Held, ready: Ready, host: str, port: int) -> dict[str, Any]:
    """A prefill leg's `kv_transfer_params`: vLLM's, and what pdlab adds."""
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [held.blocks],
        "remote_engine_id": ready.engine_id,
        "remote_request_id": held.lease,
        "remote_host": host,
        "remote_port": port,
        "tp_size": ready.tp,
        "remote_num_tokens": held.kv_tokens,
        "transfer_mode": "pull",
        "pdlab": {"descriptor": ready.descriptor.decode(), "kv_tokens": held.kv_tokens},
    }


def kv_lost(why: str, cause: str = "failed") -> ApiError:
    return ApiError(409, f"the KV did not come: {why}", code="kv_lost", cause=cause)


def descriptor(text: str, field: str, param: str = PARAM) -> bytes:
    found = text.encode(errors="replace")
    if not 0 < len(found) <= MOST_DESCRIPTOR:
        raise bad(f"{param}.{field} has {len(found)} bytes, it must have 1 to {MOST_DESCRIPTOR}", param)
    return found


def bounded(text: str, field: str) -> str:
    """A name. Raises ApiError where it is empty or too long."""
    if not 0 < len(text) <= MOST_NAME:
        raise bad(f"{field} has {len(text)} characters, it must have 1 to {MOST_NAME}", field.split(".")[0])
    return text


def seconds(value: float, field: str) -> float:
    if not (math.isfinite(value) and 0 < value <= MOST_SECONDS):
        raise bad(f"{field} must be above 0 and at most {MOST_SECONDS:g} s, not {value:g}", field.split(".")[0])
    return value


def _name(text: str, field: str) -> str:
    return bounded(text, f"{PARAM}.{field}")


def _url(text: str, field: str) -> str:
    if not _name(text, field).startswith(("http://", "https://")):
        raise bad(f"{PARAM}.{field} {text[:80]!r} is neither http nor https", PARAM)
    return text.rstrip("/")


def _fetch(asked: FetchFrom) -> FetchFrom:
    if not 0 < asked.tokens < 1 << 31:
        raise bad(f"{PARAM}.pdlab.fetch.tokens {asked.tokens} is out of range", PARAM)
    deadline_s = _seconds(asked.deadline_s, "pdlab.fetch.deadline_s")
    return FetchFrom(_url(asked.url, "pdlab.fetch.url"), asked.tokens, deadline_s)


def _seconds(value: float, field: str) -> float:
    return seconds(value, f"{PARAM}.{field}")


def _push(to: PushTo) -> Push:
    if to.granularity not in GRANULARITIES:
        raise bad(f"{PARAM}.pdlab.push.granularity must be one of {', '.join(GRANULARITIES)}, not {to.granularity[:80]!r}", PARAM)
    try:
        blocks = KvParams(remote_block_ids=to.block_ids).block_ids()
    except ValueError:
        raise bad(f"{PARAM}.pdlab.push.block_ids must be block ids", PARAM) from None
    if not 0 <= to.cached_tokens < 1 << 31:
        raise bad(f"{PARAM}.pdlab.push.cached_tokens {to.cached_tokens} is out of range", PARAM)
    return Push(
        descriptor(to.descriptor, "pdlab.push.descriptor"),
        _name(to.ticket, "pdlab.push.ticket"),
        blocks,
        to.cached_tokens,
        to.granularity,
        _seconds(to.deadline_s, "pdlab.push.deadline_s"),
    )
