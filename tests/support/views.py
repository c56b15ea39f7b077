"""What a router's policy is shown, event by event, and where two runs depart from each other.

A `Witness` stands where a world's event log does. With every event it writes down the view that the policy has of the cluster after it:
whatever is in the slots of each instance, request and link, found by name, so that a new field is compared without being mentioned here.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import zip_longest
from typing import Any

import msgspec

from pdlab.core.router import Router
from pdlab.core.types import Action, Arrived, Event, Request
from pdlab.core.view import Cluster, Instance, LiveRequest

TOLERANCE = 1e-6  # of times and other real numbers: two clocks add up the same steps in another order
PROMPTS = (64, 700, 3000)  # tokens that the predictors are asked for
BATCHES = ((1, 500), (12, 9000))  # sequences, and tokens of their context
KV_BYTES = 1 << 26  # that the links are asked for
SKIPPED = frozenset(
    {"_known", "capacity", "index", "instances", "links", "live", "rng"}
)  # of a cluster: asked below, or no policy's affair
SHOWN = 300  # characters of a value

Values = Mapping[str, object]


class Counted(int):
    """Tokens counted by the clock: one more or less where that differs in its last digit."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int) and abs(self - other) <= 1

    __hash__ = int.__hash__


@dataclass(frozen=True, slots=True)
class View:
    """What a policy may look at: of the cluster, of each instance, of each live request; by the names of their fields."""

    cluster: Values
    instances: Mapping[str, Values]
    requests: Mapping[str, Values]

    def parts(self) -> Iterator[tuple[str, Values]]:
        yield "the cluster", self.cluster
        yield from self.instances.items()
        yield from self.requests.items()


@dataclass(frozen=True, slots=True)
class Seen:
    now: float
    event: Event
    actions: Sequence[Action]
    view: View


class Witness:
    """Takes the place of a `pdlab.replay.log.EventLog`. `chains` are prompts whose prefixes are looked up at every event."""

    stopped, dropped = "", 0
    path = None

    def __init__(self, chains: Sequence[Request] = ()) -> None:
        self.router: Router
        self.seen: list[Seen] = []
        self._chains = chains
        self._last: dict[str, Values] = {}

    def watch(self, router: Router) -> Router:
        self.router = router
        return router

    def write(self, now: float, event: Event, actions: list[Action]) -> None:
        self.seen.append(Seen(now, event, list(actions), self._view(self.router.cluster)))

    def close(self) -> None: ...

    def _view(self, cluster: Cluster) -> View:
        hits = [{x.name: tokens for x, tokens in cluster.cached_tokens(chain).items()} for chain in self._chains]
        instances = {x.name: self._same(x.name, _instance(x, cluster, hits)) for x in cluster.instances}
        requests = {f"request {i}": self._same(f"request {i}", _request(live, cluster)) for i, live in cluster.live.items()}
        return View(self._same("", _cluster(cluster)), instances, requests)

    def _same(self, name: str, values: Values) -> Values:
        """The last one of that name where nothing has changed, which saves memory, and time when they are compared."""
        if self._last.get(name) == values:
            return self._last[name]
        self._last[name] = values
        return values


# ---------------------------------------------------------------- what is seen


def _cluster(cluster: Cluster) -> Values:
    seen = {name: plain(getattr(cluster, name)) for name in fields_of(cluster) if name not in SKIPPED and name != "now"}
    seen["instances"] = plain(cluster.instances)
    seen["live"] = tuple(cluster.live)
    seen["rng"] = hash(cluster.rng.getstate())
    seen |= {f"links.{name}": plain(getattr(cluster.links, name)) for name in fields_of(cluster.links)}
    return seen


def _instance(x: Instance, cluster: Cluster, hits: Sequence[Mapping[str, int]]) -> Values:
    seen = {name: plain(getattr(x, name)) for name in fields_of(x) if not name.endswith("_predictor")}
    for name in ("spec", "report"):
        struct = getattr(x, name)
        del seen[name]
        seen |= {f"{name}.{field}": plain(getattr(struct, field)) for field in struct.__struct_fields__}
    seen["ready"], seen["has_place"] = x.ready, x.has_place
    seen["used_tokens"], seen["free_tokens"], seen["queued_tokens"] = x.used_tokens, x.free_tokens, x.queued_tokens
    seen["ttft_s"] = tuple(x.ttft_s(tokens) for tokens in PROMPTS)
    seen["tpot_s"] = tuple(x.tpot_s(batch, context) for batch, context in BATCHES)
    seen["cached_tokens"] = tuple(hit.get(x.name, 0) for hit in hits)
    seen["transfer_s"] = {y.name: cluster.links.transfer_s(x, y, KV_BYTES) for y in cluster.instances if y is not x}
    return seen


def _request(live: LiveRequest, cluster: Cluster) -> Values:
    seen = {name: plain(getattr(live, name)) for name in fields_of(live) if name != "request"}
    seen |= {f"request.{name}": getattr(live.request, name) for name in live.request.__struct_fields__}
    seen["context_tokens"] = Counted(cluster.context_tokens(live))
    return seen


_fields: dict[type, tuple[str, ...]] = {}


def fields_of(thing: object) -> tuple[str, ...]:
    """The names of what it keeps, private ones left out."""
    cls = type(thing)
    if cls not in _fields:
        slots = getattr(cls, "__slots__", None)
        names = (
            slots if slots else {name for name in (*cls.__annotations__, *vars(thing), *vars(cls)) if not callable(getattr(thing, name))}
        )
        _fields[cls] = tuple(sorted(name for name in names if not name.startswith("__")))
    return _fields[cls]


def plain(value: object) -> Any:
    """Comparable in another world: instances and requests by their names."""
    if isinstance(value, (bool, int, float, str, Enum)) or value is None:
        return value
    if isinstance(value, Instance):
        return value.name
    if isinstance(value, LiveRequest):
        return value.request.id
    if isinstance(value, Mapping):
        return {plain(key): plain(each) for key, each in value.items()}
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(map(plain, value)))
    if isinstance(value, (list, tuple, deque)):
        return tuple(map(plain, value))
    if isinstance(value, msgspec.Struct):
        return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    return {name: plain(getattr(value, name)) for name in fields_of(value)}


# ---------------------------------------------------------------- where they depart


@dataclass(frozen=True, slots=True)
class Tolerated:
    """What differs by nature. `strip` takes it out of what was seen; None: the whole entry is left out."""

    name: str
    why: str
    strip: Callable[[Seen], Seen | None]


def without(seen: Sequence[Seen], exceptions: Sequence[Tolerated]) -> list[Seen]:
    kept = []
    for one in seen:
        for tolerated in exceptions:
            stripped = tolerated.strip(one)
            if stripped is None:
                break
            one = stripped
        else:
            kept.append(one)
    return kept


def to_the_end(seen: Sequence[Seen]) -> Sequence[Seen]:
    """Up to the event with which the last request ended."""
    last = max((i for i, one in enumerate(seen) if one.view.requests), default=-1)
    return seen[: last + 2]


def blanked(seen: Seen, fields: frozenset[str]) -> Seen:
    """Without these fields of each instance's view."""
    instances = {name: {key: value for key, value in x.items() if key not in fields} for name, x in seen.view.instances.items()}
    return replace(seen, view=replace(seen.view, instances=instances))


def difference(simulated: Sequence[Seen], live: Sequence[Seen], context: int = 4) -> str:
    """The first one, in words; none where equal."""
    for index, (sim, real) in enumerate(zip_longest(simulated, live)):
        if sim is None or real is None:
            longer, whose = (simulated, "simulated") if real is None else (live, "live")
            return f"event {index}: only the {whose} run goes on, with {_said(longer[index])}"
        if words := _departure(sim, real):
            before = "".join(f"\n    {_said(one)}" for one in simulated[max(0, index - context) : index])
            after = [
                f"\n    {whose}: {_said(one)}"
                for whose, run in (("simulated", simulated), ("live", live))
                for one in run[index : index + 3]
            ]
            return f"event {index}, {_said(sim)}: {words}\n  before it, in both:{before}\n  from it on:{''.join(after)}"
    return ""


def _departure(sim: Seen, real: Seen) -> str:
    if type(sim.event) is not type(real.event):
        return f"it is {_said(real)} live"
    if not alike(sim.now, real.now):
        return f"it happens at {sim.now:.9f} s simulated, at {real.now:.9f} s live: {_short(real.event)}"
    if words := _apart(plain(sim.event), plain(real.event)):
        return f"the event's {words}"
    for name, ours in sim.view.parts():
        theirs = dict(real.view.parts()).get(name)
        if theirs is None:
            return f"{name} is seen in the simulation only"
        if ours is not theirs and ours != theirs and (words := _apart(ours, theirs)):
            return f"of {name}, {words}"
    if extra := [name for name, _ in real.view.parts() if name not in dict(sim.view.parts())]:
        return f"{extra[0]} is seen live only"
    if words := _apart([plain(x) | {"": type(x).__name__} for x in sim.actions], [plain(x) | {"": type(x).__name__} for x in real.actions]):
        return f"the actions' {words}: simulated {_short(sim.actions)}, live {_short(real.actions)}"
    return ""


def _apart(ours: Any, theirs: Any, where: str = "") -> str:
    """The first place at which two plain values differ, and what is there."""
    if ours == theirs or (isinstance(ours, float) and isinstance(theirs, (int, float)) and alike(ours, theirs)):
        return ""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            if key not in ours or key not in theirs:
                return f"{_at(where, key)} is there {'simulated' if key in ours else 'live'} only"
            if words := _apart(ours[key], theirs[key], _at(where, key)):
                return words
        return ""
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)) and len(ours) == len(theirs):
        return next((words for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if (words := _apart(a, b, f"{where}[{i}]"))), "")
    if isinstance(ours, (list, tuple)) and isinstance(theirs, float):
        return f"{where} is {_short(ours)} simulated, {_short(theirs)} live"
    return f"{where or 'value'} is {_short(ours)} simulated, {_short(theirs)} live"


def alike(ours: float, theirs: float) -> bool:
    return ours == theirs or math.isclose(ours, theirs, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _at(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _said(seen: Seen) -> str:
    event = f"Arrived({seen.event.request.id})" if isinstance(seen.event, Arrived) else _short(seen.event)
    return f"{seen.now:.6f} s {event} -> {_short(seen.actions)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
