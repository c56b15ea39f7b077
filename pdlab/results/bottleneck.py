"""Which resource holds a run back, and by what evidence.

Two questions, asked in this order.

*Where did the requests that missed lose their time?* When fewer than 90 % of the arrivals met their objectives, each miss votes for
the stage that cost it most: a missed TTFT for waiting, prefill, or (where the first token comes from the decode instance) the
transfer; a missed TPOT for the transfer, the wait for room, or the decode steps; one that never ended votes for the stage it stuck in.
Waiting for prefill is blamed on prefill only if prefill was in fact busy while something waited: a prefill instance that idles while
its queue grows is being held back by what comes after it. (A full decode instance refuses reservations, blocks stay leased, prefill stops.)
A decode instance is full when its blocks are used up, or when it decodes as many sequences as `engine.max_seqs` lets it. A server does not
tell that bound; it is inferred there where requests wait, blocks are free, and the sequences stay at the most there ever were.

*What is used up?* Otherwise, the most downstream resource that is saturated, for the same reason: everything before it can be busy or
blocked on its account, nothing behind it can. Prefill compute is saturated from 90 % busy on, a link from 85 % of its bytes, decode
memory when its KV blocks are full while sequences wait. A busy decode instance proves nothing: it is busy with one sequence as with
hundreds, which is why decode is judged by its blocks and by its step times.

Use is taken over the window in which the resource had work offered, so that an idle tail does not dilute it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdlab.core.types import Role, Stage
from pdlab.results.causes import DECODED, MOVED, PREFILLED, QUEUED, ROOM, Misses, find_causes
from pdlab.results.headroom import decode_headroom
from pdlab.results.records import Column, InstanceUse, LinkUse, Records, Samples, latencies, met_both, met_tpot, met_ttft
from pdlab.results.units import percent, seconds

ATTAINED = 0.9  # DESIGN's capacity is the highest rate with this attainment
PREFILL_SATURATED = 0.9
PREFILL_BUSY = 0.7  # enough to blame a queue for prefill on prefill
LINK_SATURATED = 0.85
KV_FULL = 0.95  # of its blocks; the watermark keeps some free
FULL_TIME = 0.2  # share of reports full and waiting that makes decode memory saturated
SLOTS_FULL = 0.95  # of engine.max_seqs; where that is not known, of the most sequences that an instance ever decoded
SLOTS_TIME = 0.5  # share of reports at the most ever that says a bound is met; what only fluctuates is seldom near its highest


@dataclass(frozen=True, slots=True)
class _Use:
    """How used each resource was, as fractions of 1, and who was the most used."""

    prefill: float
    prefill_mean: float
    prefill_at: InstanceUse | None
    link: float
    link_at: LinkUse | None
    full: float  # share of a decode instance's reports with its blocks full and sequences waiting
    kv_peak: float
    kv_at: InstanceUse | None
    preemptions: int
    queueing: float  # of the time in which anything waited for prefill, the share that the busiest instance computed prefill; inf: never
    slots: float  # share of a decode instance's reports that show it decode as many sequences as it may, or as it ever did
    slots_most: int
    slots_at: InstanceUse | None
    decode: InstanceUse | None  # whose decode steps took the most time
    compute_bound: float

    @property
    def kv_saturated(self) -> bool:
        return self.full >= FULL_TIME

    @property
    def prefill_held_back(self) -> bool:
        """Did prefill idle while its queue grew?"""
        return self.queueing < PREFILL_BUSY

    @property
    def slots_saturated(self) -> bool:
        exact = self.slots_at is not None and self.slots_at.max_seqs is not None
        return self.slots >= (FULL_TIME if exact else SLOTS_TIME)

    @property
    def link_saturated(self) -> bool:
        return self.link >= LINK_SATURATED

    @property
    def decode_resource(self) -> str:
        return "decode compute" if self.compute_bound >= 0.5 else "decode memory"


def find_bottleneck(
    records: Records,
    samples: Samples,
    instances: Sequence[InstanceUse],
    links: Sequence[LinkUse],
    *,
    slo: tuple[float, float],
    duration_s: float,
    policy: str | Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`resource` (prefill compute, decode memory, decode slots, decode compute, link, none), `role`, `instance` (or the link's name),
    `evidence` in one sentence; `misses`, the phase in which most were lost, and `causes` of them (None and empty where there are none);
    decode's `headroom`, where step times are known; and `use`: how used each resource was, between 0 and 1.

    `slo` is (ttft_s, tpot_s); `duration_s` the run's; `policy` is what the experiment calls it.
    """
    found = records.columns()
    derived = latencies(found)
    good = met_both(found, derived, slo)
    use = _measure(found, samples, instances, links, duration_s)
    headroom = decode_headroom(samples, instances, slo[1])
    misses, lost = _lost(found, derived, good, slo, records.instances)
    if good.size and good.mean() < ATTAINED:
        verdict = _by_misses(found, misses, lost, use)
    else:
        verdict = _by_saturation(use) or _nothing(use)
        if lost is not None:
            verdict = {**verdict, "evidence": f"{verdict['evidence']}; {lost.words}"}
    return {
        **verdict,
        "misses": None
        if lost is None
        else {"requests": lost.requests, "phase": lost.phase, "share": lost.share, "median_s": lost.median_s},
        "causes": [asdict(cause) for cause in find_causes(misses, samples, instances, headroom, policy)] if misses is not None else [],
        "headroom": None if headroom is None else headroom.figures(),
        "use": {"prefill compute": use.prefill, "link": use.link, "decode memory": use.kv_peak},
    }


@dataclass(frozen=True, slots=True)
class _Lost:
    """Of the `requests` that missed, the `share` that lost most time in the `phase` in which most did, and how much time."""

    requests: int
    phase: str
    share: float
    median_s: float

    @property
    def words(self) -> str:
        misses = f"{self.requests:,} misses" if self.requests > 1 else "1 miss"
        return f"{percent(self.share)} of {misses} lost most time {self.phase} (median {seconds(self.median_s)})"


def _lost(
    found: Mapping[str, Column], derived: Mapping[str, Column], good: NDArray[np.bool_], slo: tuple[float, float], names: Sequence[str]
) -> tuple[Misses | None, _Lost | None]:
    """Where those lost their time that missed, though they were served."""
    missed = ~good & ~(found["status"] >= Stage.ABORTED)
    if not missed.any():
        return None, None
    part = {name: column[missed] for name, column in found.items()}
    late = {name: column[missed] for name, column in derived.items()}
    cost = _stage_costs(part, slo[1], ~met_ttft(part, late, slo), ~met_tpot(part, late, slo))
    worst = np.argmax(np.column_stack(list(cost.values())), axis=1)
    votes = np.bincount(worst, minlength=len(cost))
    phase = list(cost)[int(votes.argmax())]
    spent = float(np.median(cost[phase][cost[phase] > 0])) if (cost[phase] > 0).any() else 0.0
    rows = np.flatnonzero(missed)[worst == int(votes.argmax())]
    tpot = derived["tpot_s"][rows]
    typical_s = float(np.nanmedian(tpot)) if (~np.isnan(tpot)).any() else math.nan
    lost = _Lost(int(missed.sum()), phase, float(votes.max() / votes.sum()), spent)
    return Misses(found, rows, phase, names, typical_s), lost


def _measure(
    found: Mapping[str, Column], samples: Samples, instances: Sequence[InstanceUse], links: Sequence[LinkUse], duration_s: float
) -> _Use:
    window = _span(found["arrival_s"], found["first_token_s"], duration_s)
    prefill = {
        use: min(1.0, _prefill_s(use) / max(min(use.up_s, window or use.up_s), 1e-9)) for use in instances if Role(use.role).prefills
    }
    moving = _span(found["transfer_start_s"], found["transfer_end_s"], duration_s)
    link = {use: min(1.0, use.utilisation * duration_s / max(moving, 1e-9)) for use in links}
    decoders = [use for use in instances if Role(use.role).decodes]
    waits_s = _covered_s(found["arrival_s"], np.where(np.isnan(found["prefill_start_s"]), duration_s, found["prefill_start_s"]))
    full = _full_fraction(samples, [use.name for use in instances])
    slots = _slots_fraction(samples, instances)
    prefill_at = max(prefill, key=lambda x: prefill[x], default=None)
    link_at = max(link, key=lambda x: link[x], default=None)
    kv_at = max(decoders, key=lambda x: (full.get(x.name, 0.0), x.kv_use_peak), default=None)
    slots_at = max(decoders, key=lambda x: slots.get(x.name, (0.0, 0)), default=None)
    slots_share, slots_most = slots.get(slots_at.name, (0.0, 0)) if slots_at else (0.0, 0)
    busy = sum(use.decode_busy_s for use in decoders)
    return _Use(
        prefill=prefill[prefill_at] if prefill_at else 0.0,
        prefill_mean=sum(prefill.values()) / len(prefill) if prefill else 0.0,
        prefill_at=prefill_at,
        link=link[link_at] if link_at else 0.0,
        link_at=link_at,
        full=full.get(kv_at.name, 0.0) if kv_at else 0.0,
        kv_peak=kv_at.kv_use_peak if kv_at else 0.0,
        kv_at=kv_at,
        preemptions=sum(use.preemptions for use in decoders),
        queueing=max(map(_prefill_s, prefill), default=0.0) / waits_s if waits_s else math.inf,
        slots=slots_share,
        slots_most=slots_most,
        slots_at=slots_at,
        decode=max(decoders, key=lambda x: x.decode_busy_s, default=None),
        compute_bound=sum(use.decode_busy_s * use.compute_bound_fraction for use in decoders) / busy if busy else 0.0,
    )


def _prefill_s(use: InstanceUse) -> float:
    """A mixed instance's decode steps take compute from its prefill; they count where prefill is the larger part."""
    return use.busy_s if use.role == Role.MIXED and use.prefill_busy_s >= use.decode_busy_s else use.prefill_busy_s


def _span(starts: Column, ends: Column, otherwise: float) -> float:
    begun, over = starts[~np.isnan(starts)], ends[~np.isnan(ends)]
    return max(0.0, min(otherwise, float(over.max() - begun.min()))) if begun.size and over.size else otherwise


def _covered_s(starts: Column, ends: Column) -> float:
    """How long at least one of these intervals lasted."""
    order = np.argsort(starts)
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    return float(np.maximum(ends - np.fmax(starts, np.concatenate(([-math.inf], ends[:-1]))), 0.0).sum())


def _full_fraction(samples: Samples, names: Sequence[str]) -> dict[str, float]:
    """For each instance, the share of its reports under load that show its blocks used up and sequences waiting."""
    instance = samples.column("instance")
    waiting, running = samples.column("waiting"), samples.column("running")
    full = (samples.column("used_blocks") >= KV_FULL * samples.column("kv_blocks")) & (waiting > 0)
    loaded = waiting + running > 0
    known = samples.instances or list(names)
    return {name: float(full[mine].mean()) for k, name in enumerate(known) if (mine := (instance == k) & loaded).any()}


def _slots_fraction(samples: Samples, instances: Sequence[InstanceUse]) -> dict[str, tuple[float, int]]:
    """For each instance that decoded, the share of its reports under load at, or nearly at, the most sequences it may decode, where that is
    not known ever decoded; and how many these are."""
    instance, running = samples.column("instance"), samples.column("running")
    loaded = samples.column("waiting") + running > 0
    bounds = {use.name: use.max_seqs for use in instances}
    prefill = {use.name for use in instances if use.role == Role.PREFILL}
    found = {}
    for k, name in enumerate(samples.instances or list(bounds)):
        mine = running[(instance == k) & loaded]
        if mine.size and mine.any() and name not in prefill:
            most = bounds.get(name) or int(mine.max())
            found[name] = (float((mine >= SLOTS_FULL * most).mean()), most)
    return found


def _by_saturation(use: _Use) -> dict[str, Any] | None:
    if use.kv_saturated and use.kv_at:
        return _verdict("decode memory", use.kv_at, _kv_words(use))
    if use.link_saturated and use.link_at:
        return _verdict("link", use.link_at, _link_words(use))
    if use.prefill >= PREFILL_SATURATED and use.prefill_at:
        return _verdict("prefill compute", use.prefill_at, _prefill_words(use))
    return None


def _nothing(use: _Use) -> dict[str, Any]:
    parts = []
    if use.prefill_at:
        parts.append(f"prefill was busy {percent(use.prefill)} of the time at most ({use.prefill_at.name})")
    if use.kv_at:
        parts.append(f"KV use peaked at {percent(use.kv_peak)} ({use.kv_at.name})")
    if use.link_at:
        parts.append(f"links carried {percent(use.link)} of their capacity at most ({use.link_at.name})")
    return _verdict("none", None, "nothing is used up: " + ", ".join(parts) if parts else "nothing ran")


def _by_misses(found: Mapping[str, Column], misses: Misses | None, lost: _Lost | None, use: _Use) -> dict[str, Any]:
    refused = found["status"] >= Stage.ABORTED
    if lost is None or misses is None or refused.sum() > lost.requests:
        words = f"{percent(refused.mean())} of the requests were rejected or failed"
        verdict = _by_saturation(use)
        if verdict is None:
            return _verdict("none", None, f"{words}, though nothing is used up: see the reasons")
        return {**verdict, "evidence": f"{words}; {verdict['evidence']}"}
    resource, where, why = _blame(misses.phase, use)
    return _verdict(resource, where, f"{lost.words}; {why}")


def _stage_costs(
    part: Mapping[str, Column], tpot_slo_s: float, late_ttft: NDArray[np.bool_], late_tpot: NDArray[np.bool_]
) -> dict[str, Column]:
    """Seconds that each missed request lost in each stage that counts towards the objective it missed. Of its decode steps, only what
    they took beyond the objective is lost."""
    # Of a request cut off by the end of the run, the open stage lasts till the run's last known moment.
    times = [part[name] for name in ("arrival_s", "first_token_s", "finish_s")]
    now = max((float(np.nanmax(t)) for t in times if t.size and not np.isnan(t).all()), default=0.0)
    first = part["first_token_s"]
    by_decode = first > part["transfer_end_s"]  # its first token came from the decode instance
    prefilled = np.where(by_decode | np.isnan(first), np.fmin(part["handoff_s"], part["transfer_start_s"]), first)
    open_prefill = np.where(np.isnan(part["prefill_start_s"]), np.nan, now)
    queue = np.where(np.isnan(part["prefill_start_s"]), now, part["prefill_start_s"]) - part["arrival_s"]
    prefill = np.where(np.isnan(prefilled), open_prefill, prefilled) - part["prefill_start_s"]
    transfer = np.where(np.isnan(part["transfer_end_s"]) & ~np.isnan(part["transfer_start_s"]), now, part["transfer_end_s"])
    # A transfer that overlaps prefill delays nobody until prefill is over.
    sending = transfer - np.fmax(part["transfer_start_s"], prefilled)
    room = np.fmax(part["transfer_start_s"] - prefilled, 0.0) + np.nan_to_num(np.fmax(part["decode_start_s"] - part["transfer_end_s"], 0.0))
    stuck = ~np.isnan(prefilled) & np.isnan(part["transfer_start_s"]) & np.isnan(part["decode_start_s"]) & np.isnan(part["finish_s"])
    room = np.where(stuck, now - prefilled, room)
    decode = np.where(np.isnan(part["finish_s"]), now, part["finish_s"]) - np.fmax(part["decode_start_s"], first)
    budget = np.where(np.isnan(part["tpot_slo_s"]), tpot_slo_s, part["tpot_slo_s"])
    steps = np.maximum(part["output_tokens"] / np.maximum(part["n"], 1) - 1, 0)
    decode = decode - np.where(steps > 0, budget, 0.0) * steps
    after_first = late_tpot & ~np.isnan(prefilled)
    moved_early = late_ttft & (by_decode | np.isnan(first))
    cost = {
        QUEUED: np.where(late_ttft, queue, 0.0),
        PREFILLED: np.where(late_ttft, prefill, 0.0),
        ROOM: np.where((after_first & ~by_decode) | moved_early, room, 0.0),
        MOVED: np.where((after_first & ~by_decode) | moved_early, sending, 0.0),
        DECODED: np.where(after_first, decode, 0.0),
    }
    return {name: np.maximum(np.nan_to_num(seconds_lost), 0.0) for name, seconds_lost in cost.items()}


def _blame(stage: str, use: _Use) -> tuple[str, InstanceUse | LinkUse | None, str]:
    if stage == MOVED:
        return "link", use.link_at, _link_words(use)
    if stage == DECODED:
        return _blame_decode(use)
    if stage == ROOM:
        return _slots(use) if use.slots_saturated and not use.kv_saturated else ("decode memory", use.kv_at, _kv_words(use))
    if stage == QUEUED and use.prefill_held_back:
        if use.kv_saturated:
            return "decode memory", use.kv_at, _kv_words(use)
        if use.link_saturated:
            return "link", use.link_at, _link_words(use)
        if use.slots_saturated:
            return _slots(use)
    return "prefill compute", use.prefill_at, _prefill_words(use)


def _blame_decode(use: _Use) -> tuple[str, InstanceUse | None, str]:
    if use.kv_saturated:
        return "decode memory", use.kv_at, _kv_words(use)
    if use.decode and use.decode.role == Role.MIXED and use.decode.prefill_busy_s > use.decode.decode_busy_s:
        return "prefill compute", use.prefill_at, f"prefill takes the larger part of mixed instances' time; {_prefill_words(use)}"
    bound = "arithmetic" if use.decode_resource == "decode compute" else "memory bandwidth"
    share = use.compute_bound if bound == "arithmetic" else 1 - use.compute_bound
    room = f"KV use peaked at {percent(use.kv_peak)}"
    return use.decode_resource, use.decode, f"decode steps were bound by {bound} {percent(share)} of the time, {room}"


def _slots(use: _Use) -> tuple[str, InstanceUse | None, str]:
    where, share = use.slots_at, percent(use.slots)
    assert where is not None, "slots are some instance's"
    peak = f"though its KV use peaked at {percent(where.kv_use_peak)}"
    if where.max_seqs is not None:
        words = f"{where.name} decoded the {where.max_seqs:,} sequences that engine.max_seqs lets it, or nearly, in {share} of its reports"
        return "decode slots", where, f"{words}, {peak}"
    words = f"{where.name} decoded {use.slots_most:,} sequences at most, and about that many in {share} of its reports"
    return "decode slots", where, f"{words}, {peak}: engine.max_seqs bounds it"


def _prefill_words(use: _Use) -> str:
    name = use.prefill_at.name if use.prefill_at else "no instance"
    return f"{name} was busy with prefill {percent(use.prefill)} of the time, all that prefill {percent(use.prefill_mean)}"


def _kv_words(use: _Use) -> str:
    name = use.kv_at.name if use.kv_at else "no instance"
    preempted = f", {use.preemptions:,} preemptions" if use.preemptions else ""
    peak = f"peak {percent(use.kv_peak)}{preempted}"
    if use.full == 0.0 and use.kv_at is not None:  # whoever finds no room waits elsewhere
        return f"{name}'s KV use was {percent(use.kv_at.kv_use_mean)} on average ({peak})"
    return f"{name} had its KV blocks full with sequences waiting in {percent(use.full)} of its reports ({peak})"


def _link_words(use: _Use) -> str:
    if use.link_at is None:
        return "no link was used"
    rate = use.link_at.capacity_bytes_per_s / 1e9
    return f"{use.link_at.name} carried {percent(use.link)} of its {rate:.3g} GB/s, up to {use.link_at.peak_flows} transfers at once"


def _verdict(resource: str, where: InstanceUse | LinkUse | None, evidence: str) -> dict[str, Any]:
    role = str(where.role) if isinstance(where, InstanceUse) else None
    return {"resource": resource, "role": role, "instance": where.name if where else None, "evidence": evidence}
