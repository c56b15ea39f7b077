"""What a policy sees: the cluster as the router knows it.

Three sources, kept apart since they differ in age: an instance's last *report*, stale by its period and delay; the router's own
*ledger* of what it has assigned and not yet seen end, exact; and what it has assigned *since* that report was taken. Policies
read; only the router writes.
"""

from __future__ import annotations

import random
import re
from bisect import bisect
from collections import deque
from collections.abc import Iterator, Sequence
from math import inf

import msgspec

from pdlab.core.predict import DecodePredictor, PrefillPredictor, learn
from pdlab.core.ranked import Changes, Ranked
from pdlab.core.reach import Reach
from pdlab.core.types import MIGRATE, UNKNOWN, InstanceSpec, InstanceState, Report, Request, Role, Stage

UNBOUNDED = 1 << 40  # KV blocks, or requests at once, of an instance that does not tell how many it has, or takes
FORGET = 0.1  # of a link's best rate with each transfer that does not reach it
QUEUED_P = Stage.QUEUED_P  # enum look-ups cost
ROUNDING = 1e-6  # of a step: what is made at its very end is made


class LiveRequest:
    """A live request as the router keeps it: who serves it, and since when."""

    __slots__ = (
        "attempt",
        "avoid",
        "decode",
        "decode_since_s",
        "decode_tokens",
        "due_s",
        "expires_s",
        "goes_on",
        "losses",
        "migrating",
        "prefill",
        "prefill_tokens",
        "request",
        "sent_tokens",
        "stage",
    )

    def __init__(self, request: Request, expires_s: float = inf) -> None:
        self.request = request
        self.expires_s = expires_s  # when it is given up
        self.stage: Stage = QUEUED_P
        self.attempt = 0
        self.losses = 0  # attempts that an instance or a transfer took with it
        self.prefill: Instance | None = None  # computes its prompt, or holds the KV until it is moved
        self.decode: Instance | None = None
        self.migrating: Instance | None = None  # where it is being moved
        self.avoid: Instance | None = None  # a decode instance that its KV did not reach
        self.decode_since_s = 0.0
        self.sent_tokens = 0  # that its client has from earlier attempts
        self.prefill_tokens = -1  # what it stands for in its prefill instance's ledger; -1: nothing
        self.decode_tokens = 0  # and in its decode instance's
        self.due_s = 0.0  # by when its KV transfer must be done
        self.goes_on = True  # whoever decodes it in this attempt can go on from a token that another has made


class Instance:
    """One instance in the router's view."""

    __slots__ = (
        "bit",
        "booked",
        "busy",
        "decode_predictor",
        "decode_requests",
        "decode_step_s",
        "decode_tokens",
        "decoding",
        "flipped_s",
        "heard_s",
        "index",
        "kv_tokens",
        "most_requests",
        "most_tokens",
        "name",
        "place",
        "prefill_predictor",
        "prefill_requests",
        "prefill_tokens",
        "report",
        "role",
        "room",
        "since_decode_tokens",
        "since_prefill_tokens",
        "spec",
        "state",
        "unreported",
    )

    def __init__(self, spec: InstanceSpec, bit: int, blind: set[str] | None = None) -> None:
        self.spec = spec
        self.name = spec.name
        self.place = _place(spec.name)
        self.index = -1  # among all instances, by name: the tie-break everywhere
        self.bit = bit  # in the prefix index
        self.role = spec.role
        self.kv_tokens = (spec.kv_blocks or UNBOUNDED) * spec.block_tokens  # KV capacity; where it is not known, more than anybody uses
        self.most_tokens = spec.most_tokens  # prompt and output of one request that it can ever serve
        self.most_requests = spec.max_requests or UNBOUNDED  # that it takes in at once
        self.state = InstanceState.READY
        self.report = Report(spec.name, spec.incarnation, -1.0, free_blocks=spec.kv_blocks)
        self.prefill_requests = 0  # dispatched, prompt not yet computed
        self.prefill_tokens = 0  # of those, prompt tokens not believed cached
        self.decode_requests = 0  # assigned to decode here, not yet ended
        self.decode_tokens = 0  # of those, prompt tokens
        self.decoding: dict[int, LiveRequest] = {}  # by request id, in the order of assignment
        self.since_prefill_tokens = 0  # assigned since the last report was taken
        self.since_decode_tokens = 0
        self.unreported: deque[tuple[float, int, int]] = deque()
        self.prefill_predictor = PrefillPredictor(spec.prefill_profile, spec.name, blind)
        self.decode_predictor = DecodePredictor(spec.decode_profile, spec.name, blind)
        self.decode_step_s = 0.0  # from a token of a sequence that decodes here to its next, between the last two reports that saw some
        self.booked: dict[int, None] = {}  # where it does not tell: what its prefix cache is believed to hold, least recently used first
        self.flipped_s = -1e18  # when its role last changed
        self.heard_s = 0.0  # when its last report came
        self.room = inf  # once it has refused a reservation: KV tokens that it may be asked for, by what has ended since and its reports
        self.busy = False  # it has as many requests as it takes at once

    def __repr__(self) -> str:
        return f"<{self.name} {self.role} {self.state}>"

    @property
    def ready(self) -> bool:
        """May be given new work."""
        return self.state is InstanceState.READY or self.state is InstanceState.LEASE_LOST

    @property
    def full(self) -> bool:
        """It refused a reservation, and what has come free since is given away."""
        return self.room <= 0.0

    def can(self, what: str) -> bool:
        """Has it that one of `types.CAPABILITIES`?"""
        return what in self.spec.capabilities

    @property
    def has_place(self) -> bool:
        """For one request more, by the router's ledger. One that is computed and decoded here is in both halves of it."""
        return self.prefill_requests < self.most_requests and self.decode_requests < self.most_requests

    @property
    def used_tokens(self) -> int:
        """KV tokens in use by the last report, and those sent there since."""
        return self.report.used_blocks * self.spec.block_tokens + self.since_decode_tokens

    @property
    def free_tokens(self) -> int:
        """KV tokens still free (or evictable) by the last report, less those sent there since."""
        return self.report.free_blocks * self.spec.block_tokens - self.since_decode_tokens

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens waiting to be computed here by the last report, and those sent since."""
        return self.report.waiting_tokens + self.since_prefill_tokens

    def hear(self, report: Report) -> None:
        """Its latest report, complete."""
        before, steps = self.report, report.decode_steps
        if steps > before.decode_steps:
            self.decode_step_s = (report.decode_s - before.decode_s) / (steps - before.decode_steps)
        elif 0 < steps < before.decode_steps:  # a server that counts from its start, and has started anew
            self.decode_step_s = report.decode_s / steps
        self.report = report
        for step in report.steps:
            learn(self.prefill_predictor, self.decode_predictor, step)

    def ttft_s(self, tokens: int) -> float:
        """Predicted seconds to prefill `tokens` alone; 0.0 while nothing is known, which the router then says."""
        return self.prefill_predictor.seconds(tokens)

    def tpot_s(self, batch: int, context_tokens: int) -> float:
        """Predicted seconds of a decode step of `batch` sequences holding `context_tokens` in all; 0.0 while nothing is known."""
        return self.decode_predictor.seconds(batch, context_tokens)


def _place(name: str) -> tuple[list[str | int], str]:
    """decode-2 comes before decode-10."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split("([0-9]+)", name))], name


class PrefixIndex:
    """Which instance holds which prefix block, as the router believes: guessed on dispatch, corrected by reports.

    One integer a block, one bit an instance, so that a look-up costs the blocks anybody holds, not blocks x instances.
    """

    __slots__ = ("hash_tokens", "holders")

    def __init__(self, hash_tokens: int = 16) -> None:
        self.holders: dict[int, int] = {}
        self.hash_tokens = hash_tokens

    def add(self, hashes: Sequence[int], bit: int) -> None:
        holders = self.holders
        for h in hashes:
            holders[h] = holders.get(h, 0) | bit

    def discard(self, hashes: Sequence[int], bit: int) -> None:
        holders = self.holders
        for h in hashes:
            mask = holders.get(h, 0) & ~bit
            if mask:
                holders[h] = mask
            else:
                holders.pop(h, None)

    def book(self, hashes: Sequence[int], instance: Instance) -> None:
        """An instance is about to hold these. One without a prefix cache never does; of one that does not tell what it evicts, no more is
        believed than its KV memory can hold, the least recently used forgotten first, a prompt's tail before its head."""
        spec = instance.spec
        if not spec.prefix_cache:
            return
        self.add(hashes, instance.bit)
        if spec.tells_cache:
            return
        booked = instance.booked
        for h in reversed(hashes):
            booked.pop(h, None)
            booked[h] = None
        excess = len(booked) - instance.kv_tokens // self.hash_tokens
        if excess > 0:
            oldest = [h for h, _ in zip(booked, range(excess), strict=False)]
            for h in oldest:
                del booked[h]
            self.discard(oldest, instance.bit)

    def drop(self, bit: int) -> None:
        """Forget an instance."""
        self.holders = {h: mask for h, m in self.holders.items() if (mask := m & ~bit)}

    def leading(self, hashes: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield (mask, blocks): the instances in `mask` hold exactly that many leading blocks. Holders of none are left out."""
        holders, depth, mask = self.holders, 0, -1
        for h in hashes:
            still = holders.get(h, 0) & mask
            if still != mask and depth:
                yield mask & ~still, depth
            mask = still
            if not mask:
                return
            depth += 1
        if depth:
            yield mask, depth


class Links:
    """What the router knows of the network, by pair (from, to): the bytes it has sent on their way and not seen arrive, and the bandwidth.
    That is what transfers have reached, the best of the last ones, since others may have shared the way; until one was measured, what the
    narrower of the two says of its own links."""

    __slots__ = ("_reached", "moving")

    def __init__(self) -> None:
        self.moving: dict[LiveRequest, tuple[Instance, Instance, int]] = {}  # whose KV is on its way: from, to, tokens
        self._reached: dict[tuple[str, str], float] = {}  # bytes/s

    @property
    def in_flight_bytes(self) -> dict[tuple[str, str], int]:
        """All of a request's KV counts, as the destination holds it, whatever is there already. Where an instance does not tell the bytes
        of its blocks, none are counted."""
        found: dict[tuple[str, str], int] = {}
        for src, dst, tokens in self.moving.values():
            size = -(-tokens // dst.spec.block_tokens) * dst.spec.block_bytes
            if size:
                found[src.name, dst.name] = found.get((src.name, dst.name), 0) + size
        return found

    def bytes_per_s(self, src: Instance, dst: Instance) -> float:
        """0.0: not known."""
        reached = self._reached.get((src.name, dst.name))
        if reached is not None:
            return reached
        same_host = src.spec.host and src.spec.host == dst.spec.host
        ends = [end.spec.host_bytes_per_s if same_host else end.spec.link_bytes_per_s for end in (src, dst)]
        return min(ends)

    def transfer_s(self, src: Instance, dst: Instance, size_bytes: float) -> float:
        """Seconds to move `size_bytes` after what is on that way already; 0.0 where no bandwidth is known."""
        bytes_per_s = self.bytes_per_s(src, dst)
        queued = self.in_flight_bytes.get((src.name, dst.name), 0)
        return (queued + size_bytes) / bytes_per_s if bytes_per_s else 0.0

    def arrive(self, live: LiveRequest, size_bytes: int = 0, seconds: float = 0.0) -> None:
        """It is there, or will not come. So many bytes took so long; 0.0 seconds: nobody knows."""
        moving = self.moving.pop(live, None)
        if moving is not None:
            self.reached(moving[0], moving[1], size_bytes, seconds)

    def reached(self, src: Instance, dst: Instance, size_bytes: int, seconds: float) -> None:
        """So many bytes took so long; 0.0 seconds: nobody knows."""
        if seconds > 0.0 and size_bytes > 0 and dst.spec.block_bytes:
            pair = src.name, dst.name
            rate, best = size_bytes / seconds, self._reached.get(pair, 0.0)
            self._reached[pair] = rate if rate > best else best + FORGET * (rate - best)

    def forget(self, name: str) -> None:
        """An instance is gone: what comes back under its name may be elsewhere."""
        self._reached = {pair: rate for pair, rate in self._reached.items() if name not in pair}


class Capacity:
    """Who can hold what, so that nobody is asked to hold what it never can. `tokens` is the router's: by request id, what each live request
    may grow to, prompt and output. Policies may ask who can hold a request, and are not shown how long it is."""

    __slots__ = ("_tokens",)

    def __init__(self, tokens: dict[int, int]) -> None:
        self._tokens = tokens

    def can_decode(self, live: LiveRequest, instance: Instance) -> bool:
        """Whoever decodes it holds all of it in the end."""
        return self._tokens.get(live.request.id, 0) <= instance.most_tokens

    def can_prefill(self, live: LiveRequest, instance: Instance) -> bool:
        """One of role prefill holds its prompt, what its client has already included; any other keeps what it has prefilled."""
        if instance.role is Role.PREFILL:
            return live.request.prompt_tokens + live.sent_tokens < instance.most_tokens
        return self.can_decode(live, instance)

    def shortfall(self, live: LiveRequest, instances: Sequence[Instance]) -> str:
        """Why none of `instances` (at least one) can hold it, in numbers: those of the one that could hold the most."""
        prompt, tokens = live.request.prompt_tokens, self._tokens[live.request.id]
        most = max(x.most_tokens for x in instances)
        too_long = prompt >= most
        largest = [x for x in instances if x.most_tokens == most]
        x = next((x for x in largest if (x.role.prefills if too_long else x.role.decodes)), largest[0])
        what = f"its prompt of {prompt:,} tokens" if too_long else f"with {prompt:,} tokens of prompt and {tokens - prompt:,} of output it"
        if most < x.spec.kv_most_tokens:
            return f"{what} exceeds the context of {x.spec.context_tokens:,} tokens that {x.name} has"
        if x.spec.sequence_tokens:
            return f"{what} exceeds the {x.spec.sequence_tokens:,} tokens that the KV memory of {x.name} can hold of one request"
        total = x.spec.kv_blocks
        blocks = -(-(prompt if too_long else tokens - 1) // x.spec.block_tokens)
        if blocks > total:
            return f"{what} needs {blocks:,} KV blocks, more than the {total:,} that {x.name} has"
        allowed = total - x.spec.spare_blocks
        allows = f"{allowed:,} of {total:,} that {x.name} lets one request have (engine.watermark)"
        return f"{what} needs {blocks:,} KV blocks, more than the {allows}"


class Cluster:
    """What every hook is given. Asked about one request, `instances`, `prefill` and `decode` leave out whoever can never hold it."""

    __slots__ = (
        "_known",
        "autoscale",
        "blind",
        "capacity",
        "changes",
        "decode",
        "degraded",
        "hash_tokens",
        "index",
        "instances",
        "links",
        "live",
        "now",
        "prefill",
        "reach",
        "ready",
        "rng",
        "smallest_tokens",
        "tpot_slo_s",
        "ttft_slo_s",
    )

    def __init__(
        self,
        rng: random.Random,
        *,
        hash_tokens: int = 16,
        ttft_slo_s: float = 1.0,
        tpot_slo_s: float = 0.05,
        capacity: Capacity | None = None,
    ) -> None:
        self.now = 0.0
        self.rng = rng
        self.instances: list[Instance] = []  # every known one, by index
        self.changes: Changes[Instance] = Changes()  # whose ledger, or report, has changed
        self.prefill: Ranked[Instance] = self.ranked([])  # that may be given prompts (role prefill or mixed, ready, not busy), by index
        self.decode: Ranked[Instance] = self.ranked([])  # that may be given sequences to decode (ready, not full, not busy), by index
        self.ready = False  # is there any ready instance
        self.smallest_tokens = inf  # prompt and output of one request that each ready instance can serve
        self.degraded = False  # nobody of role decode or mixed is left: prefill instances decode
        self.live: dict[int, LiveRequest] = {}  # every request that has not ended
        self.capacity = capacity or Capacity({})
        self.reach = Reach()
        self._known: dict[str, Instance] = {}  # by name
        self.index = PrefixIndex(hash_tokens)
        self.links = Links()
        self.blind: set[str] = set()  # instances whose predictors were asked with nothing to go by
        self.hash_tokens = hash_tokens
        self.autoscale: tuple[int, int] | None = None  # the least and the most instances that a policy may scale to; None: it may not
        self.ttft_slo_s = ttft_slo_s
        self.tpot_slo_s = tpot_slo_s

    def admit(self, spec: InstanceSpec) -> Instance:
        """A new instance, or another incarnation of a known one. They are kept in the order of their names: who comes up first is chance,
        and may not decide where ties break."""
        instances = self.instances
        known = self._known.get(spec.name)
        made = Instance(spec, known.bit if known is not None else 1 << len(instances), self.blind)
        self._known[spec.name] = made
        if known is not None:
            made.index = known.index
            instances[made.index] = made
            return made
        place = bisect(instances, made.place, key=lambda x: x.place)
        instances.insert(place, made)
        for index in range(place, len(instances)):
            instances[index].index = index
        return made

    def refresh(self) -> None:
        """Rebuild the two candidate lists after an instance joined, left, or changed role or state. When nobody of a role is left, the
        others serve both phases."""
        ready = [x for x in self.instances if x.ready]
        self.ready = bool(ready)
        self.smallest_tokens = min([x.most_tokens for x in ready], default=inf)
        self.prefill = self.ranked([x for x in [x for x in ready if x.role is not Role.DECODE] or ready if not x.busy])
        decode = [x for x in ready if x.role is not Role.PREFILL]
        self.degraded = not decode
        self.decode = self.ranked([x for x in decode or ready if not x.full and not x.busy])

    def ranked(self, candidates: list[Instance]) -> Ranked[Instance]:
        """Those whose least the policy may ask for."""
        return Ranked(candidates, self.changes)

    def able(self, live: LiveRequest) -> tuple[list[Instance], Ranked[Instance], Ranked[Instance], bool]:
        """`instances`, `prefill`, `decode` and `degraded`, as if there were nobody but those who can ever hold this request."""
        capacity, ready = self.capacity, [x for x in self.instances if x.ready]
        holders = [x for x in ready if capacity.can_decode(live, x)]
        decode = [x for x in holders if x.role is not Role.PREFILL]
        if not decode:
            free = [x for x in holders if not x.busy]
            known = [x for x in self.instances if capacity.can_decode(live, x)]
            return known, self.ranked(free), self.ranked([x for x in free if not x.full]), True
        prefill = [x for x in ready if x.role is not Role.DECODE and capacity.can_prefill(live, x)]
        known = [x for x in self.instances if capacity.can_decode(live, x) or capacity.can_prefill(live, x)]
        free = [x for x in decode if not x.full and not x.busy]
        return known, self.ranked([x for x in prefill or decode if not x.busy]), self.ranked(free), False

    def can_migrate(self, live: LiveRequest, target: Instance) -> bool:
        """May a decoding request be moved there now? Both instances must be able to, and reach each other; of several candidates none is
        moved."""
        source = live.decode
        return (
            source is not None
            and source is not target
            and live.request.best_of == 1
            and source.can(MIGRATE)
            and target.can(MIGRATE)
            and self.capacity.can_decode(live, target)
            and self.reach.open(source.name, target.name, self.now)
        )

    def can_fetch(self, holder: Instance, instance: Instance) -> bool:
        """May `instance` read a prefix from `holder` now, before it computes a prompt? Whoever can export what runs can lend what is
        cached, to those whose blocks have as many tokens: it is found by the hashes of blocks."""
        return (
            holder is not instance
            and holder.ready
            and holder.spec.block_tokens == instance.spec.block_tokens
            and holder.can(MIGRATE)
            and instance.can(MIGRATE)
            and self.reach.open(holder.name, instance.name, self.now)
        )

    def cached_tokens(self, request: Request) -> dict[Instance, int]:
        """Prompt tokens each instance is believed to hold, contiguous from the first; instances that hold none are left out.
        At least the last prompt token is always computed."""
        if not request.hashes:
            return {}
        found: dict[Instance, int] = {}
        most = request.prompt_tokens - 1
        for mask, blocks in self.index.leading(request.hashes):
            tokens = min(blocks * self.hash_tokens, most)
            for instance in self.instances:
                if instance.bit & mask:
                    found[instance] = tokens
        return found

    def context_tokens(self, running: LiveRequest) -> int:
        """Estimated KV tokens of a decoding request: its prompt, and what its instance's step time lets it have made since."""
        decode = running.decode
        if decode is None or decode.decode_step_s <= 0.0:
            return running.request.prompt_tokens + running.sent_tokens
        made = int((self.now - running.decode_since_s) / decode.decode_step_s + ROUNDING)
        return running.request.prompt_tokens + running.sent_tokens + max(0, made)

    def completed(self, report: Report, instance: Instance) -> Report:
        """A report, what its instance cannot know replaced by what the router's own ledger says. What was assigned since it was taken is
        left out, as in any report."""
        knows_load = report.waiting_tokens >= 0 and report.context_tokens >= 0 and report.waiting_blocks >= 0
        if knows_load and report.used_blocks >= 0 and report.free_blocks >= 0 and report.waiting_head_blocks >= 0:
            return report
        tokens = report.waiting_tokens
        if tokens == UNKNOWN:
            tokens = max(0, instance.prefill_tokens - instance.since_prefill_tokens)
        context = report.context_tokens
        if context == UNKNOWN:
            held = sum([self.context_tokens(live) for live in instance.decoding.values()])
            context = max(0, held - instance.since_decode_tokens)
        block_tokens = instance.spec.block_tokens
        used, free = report.used_blocks, report.free_blocks
        if used == UNKNOWN:
            used = -(-(tokens + context) // block_tokens)
        if free == UNKNOWN:
            free = max(0, instance.kv_tokens // block_tokens - used)
        queue, head = report.waiting_blocks, report.waiting_head_blocks
        if queue == UNKNOWN:
            queue = -(-tokens // block_tokens) if report.waiting else 0
        if head == UNKNOWN:
            head = -(-queue // report.waiting) if report.waiting else 0
        return msgspec.structs.replace(
            report,
            waiting_tokens=tokens,
            context_tokens=context,
            used_blocks=used,
            free_blocks=free,
            waiting_blocks=queue,
            waiting_head_blocks=head,
        )
