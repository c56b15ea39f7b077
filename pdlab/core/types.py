"""The nouns of pdlab, and what passes between a decider and its world.

A world turns what happens into *events*; a decider answers with *actions*. Both are frozen, compared by value, and written
to the event log as tagged JSON by msgspec (chosen over dataclasses: a frozen one costs ten times as much to make, and the
log needs no hand-written codec). Times are seconds on the world's clock, sizes are in tokens, blocks or bytes as named.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from enum import IntEnum, StrEnum
from math import inf
from typing import Protocol

import msgspec


class UsageError(Exception):
    """The user's mistake: one line that names the value and the remedy. The CLI prints it and exits with status 2."""


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.5) -> str:
    """Words for a UsageError that name the nearest of what is known, or none where nothing is near."""
    near = get_close_matches(word.lower(), list(known), n=1, cutoff=cutoff)
    return f"; nearest is {near[0]}" if near else ""


class Lines(Protocol):
    """What takes a log's lines: a file, or one that outlives a full disk."""

    def write(self, line: bytes, /) -> int: ...
    def close(self) -> None: ...


# What an instance may say it can do; vLLM's servers can "pull", and nothing else of it.
PULL, PUSH, LAYERS, RESERVE, MIGRATE, MADE, SWITCH, DRAIN = "pull", "push", "push_by_layer", "reserve", "migrate", "made", "switch", "drain"
CAPABILITIES = (PULL, PUSH, LAYERS, RESERVE, MIGRATE, MADE, SWITCH, DRAIN)


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"

    @property
    def prefills(self) -> bool:
        return self is not Role.DECODE

    @property
    def decodes(self) -> bool:
        return self is not Role.PREFILL


class InstanceState(StrEnum):
    JOINING = "joining"
    READY = "ready"
    LEASE_LOST = "lease_lost"
    SUSPECT = "suspect"
    DRAINING = "draining"
    SWITCHING = "switching"
    GONE = "gone"


class Stage(IntEnum):
    """Where a request is. Every stage has a deadline; the last five end it."""

    QUEUED_P = 0
    PREFILL = 1
    LEASED = 2
    QUEUED_D = 3
    TRANSFER = 4
    DECODE = 5
    MIGRATING = 6
    DONE = 7
    ABORTED = 8
    EXPIRED = 9
    REJECTED = 10
    FAILED = 11

    @property
    def ended(self) -> bool:
        return self >= Stage.DONE


class Request(msgspec.Struct, frozen=True, gc=False):
    """What the router knows of a request; never its output length.

    `hashes` is the chain of its prompt's full prefix blocks (see `Workload.hash_tokens`); empty means nothing of it is shared
    with any other request. A higher `priority` goes first. SLOs left None are the experiment's. `session` and `tenant` say what it belongs
    to; "": nothing. An `offline` request is in no hurry.
    """

    id: int
    arrival_s: float
    prompt_tokens: int
    hashes: tuple[int, ...] = ()
    priority: int = 0
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    n: int = 1
    best_of: int = 1
    session: str = ""
    tenant: str = ""
    offline: bool = False


class InstanceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance says of itself when it joins. Profiles are measured or modelled points for predictors:
    (prompt_tokens, seconds) and (batch, context_tokens in all, seconds); without any, predictors start from the steps it tells of.
    `core.instance_spec` makes it. 0 stands for what is not known."""

    name: str
    role: Role
    incarnation: int = 0
    kv_blocks: int
    block_tokens: int = 16
    block_bytes: int = 0
    host: str = ""
    max_seqs: int = 0
    max_batch_tokens: int = 0
    prefix_cache: bool = True
    tells_cache: bool = True  # its reports tell what its prefix cache has `stored` and `evicted`
    prefill_profile: tuple[tuple[int, float], ...] = ()
    decode_profile: tuple[tuple[int, int, float], ...] = ()
    link_bytes_per_s: float = 0.0  # nominal, to instances on other hosts
    host_bytes_per_s: float = 0.0  # nominal, to instances on its own
    url: str = ""
    engine: str = "pdlab"  # or vllm: what answers at `url`
    model: str = ""  # the name it serves
    capabilities: tuple[str, ...] = CAPABILITIES  # those of them that it has
    descriptor: str = ""  # of its KV memory, for peers
    draining: bool = False  # nothing new, please
    max_requests: int = 0  # that it takes in at once; 0: any number
    context_tokens: int = 0  # of prompt and output together, at most, as its model and `engine.max_model_len` have it; 0: not known
    spare_blocks: int = 0  # that admitting a prompt leaves free: no single request gets these
    rack: str = ""  # where its host is
    zone: str = ""
    sequence_tokens: int = 0  # that its KV memory can hold of one request, where that is more than `kv_blocks` say, as layers have windows

    @property
    def kv_most_tokens(self) -> float:
        """Prompt and output of one request that its KV memory can hold; infinite where `kv_blocks` is 0, which is not known. The last
        token's KV is never written."""
        if self.sequence_tokens:
            return self.sequence_tokens
        return (self.kv_blocks - self.spare_blocks) * self.block_tokens + 1 if self.kv_blocks else inf

    @property
    def most_tokens(self) -> float:
        """Prompt and output of one request that it can ever serve."""
        return min(self.kv_most_tokens, self.context_tokens or inf)


# ---------------------------------------------------------------- events


class Event(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Something that happened in a world."""


class Arrived(Event, frozen=True):
    """`max_tokens` bounds its output; for the router's account of what instances can hold, and not shown to policies."""

    request: Request
    max_tokens: int = 1


class Cancelled(Event, frozen=True):
    """The client went away."""

    request_id: int


class Joined(Event, frozen=True):
    spec: InstanceSpec


class Left(Event, frozen=True):
    """An incarnation is gone. `sent` maps each of its running requests whose client has output tokens of this attempt to their number.
    `died`: there is evidence that it did; else it lost its place in the registry, which says nothing against its requests."""

    instance: str
    incarnation: int
    sent: dict[int, int] = {}
    died: bool = True


UNKNOWN = -1  # in a Report, of what an instance cannot know


class StepTime(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How long one step took: `batch` sequences decoded, attending to `context_tokens` KV tokens in all; `prompt_tokens` of prompts were
    computed. `squared_tokens` is what attention has to do for these: (cached + new)^2 - cached^2, summed over the step's chunks."""

    batch: int
    context_tokens: int
    prompt_tokens: int
    squared_tokens: int
    seconds: float


class Report(Event, frozen=True):
    """An instance's load as it was at `taken_s`, which can lie well before its delivery. `core.report` makes it of a scheduler's state.

    A *sequence* is a request, or one of its candidates (best_of); the other candidates come into being when the first one's prompt is
    computed. It *waits* while it has no KV blocks, and *runs* from then on until it ends, is handed on, or is preempted. What is only
    reserved for or leased to another instance does neither, and counts in the blocks alone. What an instance cannot know is UNKNOWN
    (a vLLM server's queue, in tokens): the router puts what its own ledger says in its place before a policy sees it.
    """

    instance: str
    incarnation: int = 0
    taken_s: float = 0.0
    waiting: int = 0  # sequences in the queue
    waiting_tokens: int = 0  # prompt tokens still to compute, of those that wait and of those that run
    running: int = 0  # sequences whose prompt is being computed, or that decode
    context_tokens: int = 0  # KV tokens that the next decode step attends to
    used_blocks: int = 0  # referenced: running, reserved, leased
    free_blocks: int = 0  # free, or kept by the prefix cache alone
    waiting_head_blocks: int = 0  # that the prompt of the first in the queue takes
    waiting_blocks: int = 0  # that the prompts of all in the queue take
    preempted: int = 0  # since start
    decode_steps: int = 0  # since start, those with prompts beside included
    decode_s: float = 0.0  # since start, from a token of the sequences that decode to their next, summed over these steps
    stored: tuple[int, ...] = ()  # prefix hashes that came into the cache since the last report, and are there
    evicted: tuple[int, ...] = ()  # prefix hashes that left it since, and are not there
    steps: tuple[StepTime, ...] = ()  # some of those since the last report, for predictors: at most one of each kind


class Refused(Event, frozen=True):
    """A decode instance that was asked had no room to reserve for a request; the router waits for room or asks another."""

    request_id: int
    attempt: int
    instance: str


class PrefillDone(Event, frozen=True):
    """The prompt is computed on `instance`, which now leases its KV blocks. `cached_tokens` were found in its prefix cache."""

    request_id: int
    attempt: int
    instance: str
    cached_tokens: int = 0


class Fetched(Event, frozen=True):
    """What came of a Fetch, told as the prompt is computed: the KV of `tokens` of it was read from `holder`, which no longer had the rest;
    `size_bytes` in `seconds`. 0 tokens: nothing came, and all was computed. `unreachable`: the two do not reach each other."""

    request_id: int
    attempt: int
    instance: str
    holder: str
    tokens: int = 0
    size_bytes: int = 0
    seconds: float = 0.0
    unreachable: bool = False


class Transferred(Event, frozen=True):
    """All of a hand-off's KV is on `instance`. `size_bytes` of it flowed in `seconds`; 0.0: nobody has measured, or it was pushed while it
    was computed, and at that pace."""

    request_id: int
    attempt: int
    instance: str
    size_bytes: int = 0
    seconds: float = 0.0


class TransferFailed(Event, frozen=True):
    """A hand-off or migration ended without the KV. `lost`: the source no longer holds it either, and the client has `sent` tokens."""

    request_id: int
    attempt: int
    src: str
    dst: str
    reason: str
    lost: bool = False
    sent: int = 0


class Unreachable(Event, frozen=True):
    """The KV of a hand-off or migration did not get from `src` to `dst`, both of which live: they do not reach each other. `held`: it
    waits at `src` still, so that another may read it; of a migration, the request goes on there."""

    request_id: int
    attempt: int
    src: str
    dst: str
    reason: str
    held: bool = False


class Migrated(Event, frozen=True):
    """A request decodes at `dst` from now on. `size_bytes` and `seconds` as in Transferred, summed over the stages of its copy."""

    request_id: int
    attempt: int
    src: str
    dst: str
    size_bytes: int = 0
    seconds: float = 0.0


class Lost(Event, frozen=True):
    """An attempt broke off on `instance`, which lives on: its connection broke, or it dropped the request. The client has `sent` tokens of
    this attempt. Not `charged`: it was never asked, or was too busy to answer."""

    request_id: int
    attempt: int
    instance: str
    reason: str
    sent: int = 0
    charged: bool = True


class Finished(Event, frozen=True):
    request_id: int
    attempt: int
    instance: str
    output_tokens: int = 0


class Failed(Event, frozen=True):
    """An instance cannot serve this request at all (too long for it, broken model)."""

    request_id: int
    attempt: int
    instance: str
    reason: str


class Switched(Event, frozen=True):
    """A role switch is complete: drained, switched, ready."""

    instance: str
    incarnation: int
    role: Role


class Drained(Event, frozen=True):
    """An instance takes nothing new (`draining`), on its own or an operator's account; or takes work again."""

    instance: str
    incarnation: int
    draining: bool = True


class Leads(Event, frozen=True):
    """Of several routers on one cluster one leads: it alone resizes."""

    leading: bool


class RegistryAway(Event, frozen=True):
    """The registry does not answer, or shows nobody of those who were there; or is well again (`away` False)."""

    away: bool = True


class Suspected(Event, frozen=True):
    """The registry lost sight of an instance (`lost`), or found it again."""

    instance: str
    incarnation: int
    lost: bool = True


class Tick(Event, frozen=True):
    """`Router.tick_s` have passed: deadlines are checked, and the policy's migrate and resize may be asked. `late_s`: the router itself
    stood still for so long before it, and could hear nobody."""

    late_s: float = 0.0


# ---------------------------------------------------------------- actions


class Action(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Something a world shall do."""


class Dispatch(Action, frozen=True):
    """Prefill the request on `instance`. With `decode` set, that instance has to reserve room before prefill starts; where
    it is `instance` itself, the request stays there. `sent_tokens` of its output were delivered by an earlier attempt and
    belong to the prompt now. `goes_on`: whoever decodes it can go on from output tokens that another has made, so that the first may be
    the prefill instance's."""

    request_id: int
    attempt: int
    instance: str
    decode: str | None = None
    sent_tokens: int = 0
    goes_on: bool = True


class Fetch(Action, frozen=True):
    """Before the Dispatch that follows: `instance` first reads from `holder` what that still has of the first `tokens` of the prompt's KV,
    and computes the rest. Where nothing comes it computes all."""

    request_id: int
    attempt: int
    instance: str
    holder: str
    tokens: int


class Handoff(Action, frozen=True):
    """Move the KV of a prefilled request from `src` to `dst`, and decode there. `src` itself: no transfer."""

    request_id: int
    attempt: int
    src: str
    dst: str


class Migrate(Action, frozen=True):
    """Move a running request, staged, while it goes on decoding."""

    request_id: int
    attempt: int
    src: str
    dst: str


class Abort(Action, frozen=True):
    """Drop an attempt on an instance and free its blocks."""

    request_id: int
    attempt: int
    instance: str


class End(Action, frozen=True):
    """The request is over without success: `stage` is ABORTED, EXPIRED, REJECTED or FAILED. `unfit`: the request itself is at fault.
    `overload`: there is too much to do now, and it may come again later."""

    request_id: int
    stage: Stage
    reason: str
    unfit: bool = False
    overload: bool = False


class Switch(Action, frozen=True):
    """Drain, then change role. The world answers with Switched."""

    instance: str
    role: Role


class Stop(Action, frozen=True):
    """Drain an instance, then let it leave."""

    instance: str


class Evict(Action, frozen=True):
    """An instance was silent for too long: fence it. The world answers with Left."""

    instance: str
    incarnation: int


class Scale(Action, frozen=True):
    """Start `count` instances of a role; only where autoscaling is on. A policy may ask for a negative count: the router then
    names who has to Stop."""

    count: int
    role: Role


class Notice(Action, frozen=True):
    """What whoever runs the cluster should know: for the log."""

    text: str


AnyEvent = (
    Arrived
    | Cancelled
    | Joined
    | Left
    | Report
    | Refused
    | PrefillDone
    | Fetched
    | Transferred
    | TransferFailed
    | Unreachable
    | Migrated
    | Lost
    | Finished
    | Failed
    | Switched
    | Drained
    | Leads
    | RegistryAway
    | Suspected
    | Tick
)
AnyAction = Dispatch | Fetch | Handoff | Migrate | Abort | End | Switch | Stop | Evict | Scale | Notice
