"""The deployments that a plan chooses among: every one that the experiment's `plan` block allows, and that fits.

A layout says how many instances of which size there are, of each role. Nothing is left over for one more: no deployment is better for want
of an instance. A candidate is a layout with one value for everything else.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, product
from typing import Any

from pdlab import cost
from pdlab.core.types import Role, UsageError
from pdlab.cost.accelerator import AcceleratorSpec
from pdlab.experiment.experiment import Experiment
from pdlab.experiment.plan import PlanSpec
from pdlab.search.grid import worded
from pdlab.sim.topology import packed_hosts

PLAIN_POLICY = "least_loaded"
MOST_CANDIDATES = 200_000


@dataclass(frozen=True, slots=True)
class InstanceKind:
    """What an instance is made of."""

    hardware: str
    tp: int


@dataclass(frozen=True, slots=True)
class InstanceGroup:
    """`count` like instances."""

    role: Role
    kind: InstanceKind
    count: int

    @property
    def accelerators(self) -> int:
        return self.kind.tp * self.count


Layout = tuple[InstanceGroup, ...]


@dataclass(frozen=True, slots=True)
class Fleet:
    """What may be used: so many accelerators in all, or of each type; or what costs no more an hour."""

    accelerators: int | None = None
    of_type: Mapping[str, int] = field(default_factory=dict)
    usd_per_h: float | None = None

    def holds(self, used: Mapping[str, int], prices: Mapping[str, float]) -> bool:
        """So many of each type?"""
        if self.accelerators is not None and sum(used.values()) > self.accelerators:
            return False
        if self.of_type and any(count > self.of_type.get(name, 0) for name, count in used.items()):
            return False
        return self.usd_per_h is None or sum(prices[name] * count for name, count in used.items()) <= self.usd_per_h * (1 + 1e-9)

    def most(self, kind: InstanceKind, used: Mapping[str, int], prices: Mapping[str, float]) -> int:
        """How many more instances of that kind."""
        count = 0
        while self.holds({**used, kind.hardware: used.get(kind.hardware, 0) + (count + 1) * kind.tp}, prices):
            count += 1
        return count


@dataclass(frozen=True)
class PlanCandidate:
    """`policy` is in JSON; `transfer` is empty where nothing is handed off."""

    layout: Layout
    max_batch_tokens: int
    max_seqs: int
    batching: str
    policy: str
    transfer: str
    prefix_cache: bool

    @property
    def split(self) -> str:
        return "pd" if len({group.role for group in self.layout}) > 1 else "mixed"

    @property
    def accelerators(self) -> int:
        return sum(group.accelerators for group in self.layout)

    @property
    def used(self) -> dict[str, int]:
        """Accelerators of each type."""
        return used_by(self.layout)

    @cached_property
    def layout_words(self) -> str:
        """3P tp4 + 1D tp4; with the accelerators' names where there are several."""
        several = len(self.used) > 1
        return " + ".join(
            f"{group.count}{str(group.role)[0].upper()} tp{group.kind.tp}{f' {group.kind.hardware}' if several else ''}"
            for group in self.layout
        )

    @cached_property
    def words(self) -> str:
        """Everything that tells it from the others."""
        parts = [self.layout_words, *self.setting_words]
        return ", ".join(parts)

    @property
    def setting_words(self) -> list[str]:
        return [
            f"chunk {self.max_batch_tokens:,}",
            f"{self.max_seqs:,} seqs",
            self.batching,
            worded(json.loads(self.policy)),
            *([self.transfer] if self.transfer else []),
            "prefix cache" if self.prefix_cache else "no prefix cache",
        ]

    def changes(self, per_host: int, transfer: Mapping[str, Any]) -> dict[str, Any]:
        """What makes an experiment this deployment; `transfer` is the experiment's own."""
        found: dict[str, Any] = {
            "cluster.instances": list(placed(self.layout, per_host)),
            "engine.max_batch_tokens": self.max_batch_tokens,
            "engine.max_seqs": self.max_seqs,
            "engine.batching": self.batching,
            "engine.prefix_cache": self.prefix_cache,
            "policy": json.loads(self.policy),
        }
        if self.transfer:
            kept = {key: value for key, value in transfer.items() if key not in ("mode", "granularity", "reserve")}
            own = {"granularity": "layer", "reserve": "before_prefill"} if self.transfer == "push" else {"granularity": "request"}
            found["transfer"] = {**kept, "mode": self.transfer, **own}
        return found


def used_by(layout: Layout) -> dict[str, int]:
    used: dict[str, int] = {}
    for group in layout:
        used[group.kind.hardware] = used.get(group.kind.hardware, 0) + group.accelerators
    return used


def placed(layout: Layout, per_host: int) -> Iterator[dict[str, Any]]:
    """Rows of `cluster.instances`, each with its host. Large instances are packed first, and the roles in turn, so that many hand-offs stay
    within a host; a host has accelerators of one type."""
    types = list(used_by(layout))
    for hardware in types:
        before = f"{hardware.rpartition('/')[2].removesuffix('.json')}-" if len(types) > 1 else ""
        own = [group for group in layout if group.kind.hardware == hardware]
        turns = sorted(((-g.kind.tp, (k + 0.5) / g.count, index) for index, g in enumerate(own) for k in range(g.count)))
        hosts = packed_hosts((-tp for tp, _, _ in turns), per_host)
        counted = Counter((host, index) for host, (_, _, index) in zip(hosts, turns, strict=True))
        for (host, index), count in counted.items():
            group = own[index]
            yield {
                "role": str(group.role),
                "count": count,
                "hardware": hardware,
                "tp": group.kind.tp,
                "host": f"{before}{host}",
            }


@dataclass(slots=True)
class PlanSpace:
    """`pruned` counts the combinations that are not possible, by the reason."""

    base: Experiment
    spec: PlanSpec
    kinds: list[InstanceKind]
    prices: dict[str, float]
    sources: dict[str, str | AcceleratorSpec]  # of each type's name, what the file says of it
    pruned: Counter[str] = field(default_factory=Counter)
    _fits: dict[tuple[InstanceKind, int, int], str] = field(default_factory=dict)

    @classmethod
    def of(cls, base: Experiment) -> PlanSpace:
        """Raises UsageError."""
        spec = base.plan or PlanSpec()
        said = spec.hardware or [row.hardware for row in base.cluster.instances if row.hardware is not None]
        sources = {str(one): one for one in said}
        prices = {name: cost.hardware(one, base.base_dir).usd_per_h for name, one in sources.items()}
        for name, price in (spec.usd_per_h or {}).items():
            if name not in prices:
                raise UsageError(f"plan.usd_per_h: {name} is none of the accelerators of the file: {', '.join(prices)}")
            prices[name] = price
        # A table was measured with one tp.
        tps = spec.tp if base.cost.table is None else tuple(dict.fromkeys(row.tp for row in base.cluster.instances))
        return cls(base, spec, [InstanceKind(name, tp) for name in sources for tp in tps], prices, sources)

    def chip(self, name: str) -> cost.Hardware:
        return cost.hardware(self.sources[name], self.base.base_dir)

    def changes(self, candidate: PlanCandidate) -> dict[str, Any]:
        """What makes the experiment that deployment."""
        found = candidate.changes(self.spec.accelerators_per_host, self.base.transfer.model_dump(mode="json", exclude_unset=True))
        for row in found["cluster.instances"]:
            source = self.sources[row["hardware"]]
            row["hardware"] = source if isinstance(source, str) else source.model_dump(mode="json", exclude_unset=True)
        return found

    def usd_per_h(self, candidate: PlanCandidate) -> float:
        return sum(self.prices[name] * count for name, count in candidate.used.items())

    def fleet(self, accelerators: str | None, usd_per_h: float | None) -> Fleet:
        """Of `--gpus` and `--budget`. Raises UsageError."""
        if usd_per_h is not None and (free := [name for name, price in self.prices.items() if not price]):
            raise UsageError(f"--budget: nobody knows what {free[0]} costs; write plan.usd_per_h: {{{free[0]}: ...}}")
        if accelerators is None:
            return Fleet(usd_per_h=usd_per_h)
        if accelerators.isdecimal():
            return Fleet(_positive(accelerators, accelerators), usd_per_h=usd_per_h)
        of_type: dict[str, int] = {}
        for part in accelerators.split(","):
            name, equals, count = part.partition("=")
            if not equals or not count.isdecimal():
                raise UsageError(f"--gpus {accelerators}: write a number, or TYPE=NUMBER,... such as h100-sxm=8")
            if name not in self.prices:
                raise UsageError(f"--gpus {accelerators}: {name} is none of the accelerators of the file: {', '.join(self.prices)}")
            of_type[name] = _positive(count, accelerators)
        return Fleet(of_type=of_type, usd_per_h=usd_per_h)

    def candidates(
        self, fleet: Fleet, shares_prefixes: bool, *, every: bool = False, keep: Callable[[Layout], bool] = lambda _: True
    ) -> list[PlanCandidate]:
        """All of the layouts that `keep` wants, in a fixed order; with `every` also of those that leave room for another instance. Raises
        UsageError where there are too many."""
        found: list[PlanCandidate] = []
        per_host = self.spec.accelerators_per_host
        for layout in self._layouts(fleet, every):
            if not keep(layout):
                continue
            large = max(group.kind.tp for group in layout) > per_host
            unplaced = "" if large or packs(layout, fleet, per_host) else f"its instances do not fit hosts of {per_host} accelerators"
            for candidate in self._settings(layout, shares_prefixes):
                if reason := self._wrong(candidate) or unplaced:
                    self.pruned[reason] += 1
                else:
                    found.append(candidate)
            if len(found) > MOST_CANDIDATES:
                raise UsageError(f"more than {MOST_CANDIDATES:,} deployments are possible: list fewer values in the file's plan block")
        return found

    def _layouts(self, fleet: Fleet, every: bool) -> Iterator[Layout]:
        if "mixed" in self.spec.splits:
            for kind in self.kinds:
                most = fleet.most(kind, {}, self.prices)
                for count in range(1 if every else max(1, most), most + 1):
                    yield (InstanceGroup(Role.MIXED, kind, count),)
            for one, other in combinations(self.kinds, 2):
                if one.hardware != other.hardware:
                    yield from self._pairs(fleet, (Role.MIXED, one), (Role.MIXED, other), every)
        if "pd" in self.spec.splits:
            for one, other in product(self.kinds, self.kinds):
                yield from self._pairs(fleet, (Role.PREFILL, one), (Role.DECODE, other), every)

    def _pairs(self, fleet: Fleet, one: tuple[Role, InstanceKind], other: tuple[Role, InstanceKind], every: bool) -> Iterator[Layout]:
        """Every number of the first, and as many of the second as there is room for; but not where there is room for more of the first."""
        counts: dict[int, int] = {}  # the most of the first by how many of the second
        for count in range(1, fleet.most(one[1], {}, self.prices) + 1):
            rest = fleet.most(other[1], {one[1].hardware: count * one[1].tp}, self.prices)
            if every:
                yield from ((InstanceGroup(*one, count), InstanceGroup(*other, fewer)) for fewer in range(1, rest + 1))
            elif rest:
                counts[rest] = count
        for rest, count in sorted(counts.items(), key=lambda pair: pair[1]):
            yield InstanceGroup(*one, count), InstanceGroup(*other, rest)

    def _settings(self, layout: Layout, shares_prefixes: bool) -> Iterator[PlanCandidate]:
        spec, base = self.spec, self.base
        policies = dict.fromkeys(map(_json, spec.policy or (base.policy, PLAIN_POLICY)))
        caches = spec.prefix_cache or ((True, False) if shares_prefixes else (base.engine.prefix_cache,))
        handed = spec.transfer if len({group.role for group in layout}) > 1 else ("",)
        for tokens, seqs, batching, policy, transfer, cached in product(
            spec.max_batch_tokens, spec.max_seqs, spec.batching or (base.engine.batching,), policies, handed, caches
        ):
            yield PlanCandidate(layout, tokens, seqs, batching, policy, transfer, cached)

    def _wrong(self, candidate: PlanCandidate) -> str:
        """Why it cannot be; empty where it can."""
        per_host = self.spec.accelerators_per_host
        for group in candidate.layout:
            if group.kind.tp > per_host:
                return f"tp {group.kind.tp} is more than the {per_host} accelerators of a host"
            key = (group.kind, candidate.max_batch_tokens, candidate.max_seqs)
            if key not in self._fits:
                self._fits[key] = self._unfit(*key)
            if self._fits[key]:
                return self._fits[key]
        return ""

    def cost_of(self, kind: InstanceKind) -> cost.Cost:
        """Of an instance's steps. Raises UsageError where there is none."""
        base, served = self.base, cost.model(self.base.model, self.base.base_dir)
        chip, drafts = self.chip(kind.hardware), self.drafts(served)
        return cost.build(base.formats, served, chip, kind.tp, base.base_dir, like=base.engine.like, drafts=drafts)

    def drafts(self, served: cost.Model) -> cost.Drafts | None:
        """Raises UsageError as `SpeculationSpec.drafts` does."""
        speculation = self.base.engine.speculation
        return None if speculation is None else speculation.drafts(served, self.base.base_dir)

    def kv_tokens(self, kind: InstanceKind, max_batch_tokens: int, max_seqs: int) -> int:
        """What an instance has room for. Raises UsageError where that is nothing."""
        base, served = self.base, cost.model(self.base.model, self.base.base_dir)
        chip, drafts = self.chip(kind.hardware), self.drafts(served)
        weights, drafter = base.formats.weights(served), None if drafts is None else drafts.model
        return cost.kv_capacity_tokens(
            served, chip, kind.tp, base.engine.hbm_utilization, weights, base.formats.kv, max_batch_tokens, max_seqs, drafter
        )

    def _unfit(self, kind: InstanceKind, max_batch_tokens: int, max_seqs: int) -> str:
        """Whether an instance has a cost and room for KV."""
        try:
            self.cost_of(kind)
            if self.base.engine.kv_blocks is None:
                self.kv_tokens(kind, max_batch_tokens, max_seqs)
        except UsageError as error:
            return str(error).partition(": ")[0] if "does not fit" in str(error) else str(error)
        return ""


def packs(layout: Layout, fleet: Fleet, per_host: int) -> bool:
    """Do its instances fit the hosts that so many accelerators come in? True where their number is not given."""
    hosts = Counter(row["hardware"] for row in {row["host"]: row for row in placed(layout, per_host)}.values())
    for name, needed in hosts.items():
        given = fleet.of_type.get(name, fleet.accelerators)
        if given is not None and needed > -(-given // per_host):
            return False
    return True


def _json(policy: object) -> str:
    return json.dumps(policy, sort_keys=True)


def _positive(count: str, said: str) -> int:
    if int(count) < 1:
        raise UsageError(f"--gpus {said}: a deployment takes an accelerator at least")
    return int(count)
