"""The most requests a second that a deployment could carry, from the cost model alone: no queue, no chance, no policy.

An instance steps again and again. In s seconds it has to compute what arrives meanwhile: s x rate x (prompt tokens of a request), and one
token for each of the s x rate x (output tokens of a request) sequences that decode, which is Little's law. A rate can be carried if a step
of just that much takes no longer than s, for some s within the TPOT objective (within TTFT, where nobody decodes). Steps of equal size are
the quickest, as a step's seconds are convex in its tokens. The chunk budget, max_seqs and the KV blocks bound what is in a step.

Instances of a role add up, roles do not: the least of prefill, decode and the bytes of the links binds. Prefixes are cached as if no cache
were ever full. Simulated capacities come to 0.5 to 1 of it; see `SLACK` for why it may be more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import numpy as np

from pdlab import cost
from pdlab.core.types import Role
from pdlab.cost.base import Cost
from pdlab.search.plan_space import InstanceGroup, InstanceKind, PlanCandidate, PlanSpace
from pdlab.workload.base import Floats, Workload

# A run ends: its first requests meet an empty cluster, and a tenth may miss. A step's seconds are not quite convex in a model with experts.
SLACK = 1.2
ATTAINED = 0.9
_STEPS = 10  # lengths of a step that are tried
_HALVINGS = 24


@dataclass(frozen=True, slots=True)
class RequestShape:
    """What one request of the workload asks for, on average. `prompt_tokens` are those that no prefix spares, `attended_tokens` those that
    each of them sees; `held_tokens` is a decoding sequence's KV, over the time that it decodes."""

    prompt_tokens: float
    attended_tokens: float
    output_tokens: float
    held_tokens: float
    kv_tokens: float  # that are handed off
    prompts: Floats  # [n] each request's, alone
    totals: Floats  # [n] prompt and output
    ttft_s: Floats  # [n] objectives
    tpot_s: Floats

    @classmethod
    def of(cls, workload: Workload, slo: tuple[float, float], *, cached: bool) -> RequestShape:
        prompts = workload.prompt_tokens.astype(np.float64)
        copies = np.ones(len(prompts)) if workload.best_of is None else workload.best_of.astype(np.float64)
        steps = np.maximum(workload.output_tokens - 1, 0) * copies
        hits = _prefix_hits(workload) if cached else np.zeros(len(prompts))
        new = np.maximum(prompts - hits, 1.0)
        held = prompts + workload.output_tokens / 2
        return cls(
            prompt_tokens=float(new.mean()),
            attended_tokens=float((new * (hits + new / 2)).sum() / new.sum()),
            output_tokens=float(steps.mean()),
            held_tokens=float((steps * held).sum() / steps.sum()) if steps.any() else 0.0,
            kv_tokens=float(prompts.mean()),
            prompts=new,
            totals=prompts + workload.output_tokens,
            ttft_s=_objectives(workload.ttft_slo_s, slo[0], len(prompts)),
            tpot_s=_objectives(workload.tpot_slo_s, slo[1], len(prompts)),
        )


def _objectives(own: Floats | None, otherwise: float, count: int) -> Floats:
    return np.full(count, otherwise) if own is None else np.where(np.isnan(own), otherwise, own)


def _prefix_hits(workload: Workload) -> Floats:
    """[n] prompt tokens that an earlier request has brought; at least one is always computed."""
    hits = np.zeros(len(workload))
    if workload.hashes is None:
        return hits
    seen: set[int] = set()
    for index in range(len(workload)):
        chain = workload.prompt_hashes(index)
        known = next((k for k, unit in enumerate(chain) if unit not in seen), len(chain))
        hits[index] = min(known * workload.hash_tokens, int(workload.prompt_tokens[index]) - 1)
        seen.update(workload.hashes[index])
    return hits


@dataclass(frozen=True, slots=True)
class Bound:
    """`rps` requests a second at most, and which resource says so. `alone`: the share of requests that meet their objectives on an instance
    that has nothing else to do, and what the others miss."""

    rps: float
    binds: str
    alone: float
    misses: str


class PlanBounds:
    """Of the candidates of one experiment and workload. What is the same for many is computed once."""

    def __init__(self, space: PlanSpace, workload: Workload) -> None:
        self.space, self.base = space, space.base
        base = space.base
        self.model = cost.model(base.model, base.base_dir)
        slo = (base.slo.ttft_s, base.slo.tpot_s)
        self.shapes = {cached: RequestShape.of(workload, slo, cached=cached) for cached in (False, True)}
        self.shares_prefixes = bool(_prefix_hits(workload).any())
        self._costs: dict[InstanceKind, Cost] = {}
        self._alone: dict[tuple[InstanceKind, Role, int, int, bool], tuple[float, str]] = {}
        self._rates: dict[tuple[InstanceKind, Role, int, int, str, bool], float] = {}

    def of(self, candidate: PlanCandidate) -> Bound:
        """With all of its instances."""
        return self.less(candidate, None)

    def less(self, candidate: PlanCandidate, lost: int | None) -> Bound:
        """With one instance less of the group of that index."""
        counts = [group.count - (index == lost) for index, group in enumerate(candidate.layout)]
        by_resource: dict[str, float] = {}
        for group, count in zip(candidate.layout, counts, strict=True):
            name = "prefill compute" if group.role is Role.PREFILL else "decode" if group.role is Role.DECODE else "mixed compute"
            by_resource[name] = by_resource.get(name, 0.0) + count * self._rate(group, candidate)
        if candidate.transfer:
            by_resource["link"] = self._link_rps(candidate)
        binds = min(by_resource, key=lambda name: by_resource[name])
        alone, misses = min(self._alone_share(group, candidate) for group in candidate.layout)
        return Bound(by_resource[binds] if alone >= ATTAINED else 0.0, binds, alone, misses)

    def _cost(self, kind: InstanceKind) -> Cost:
        if kind not in self._costs:
            self._costs[kind] = self.space.cost_of(kind)
        return self._costs[kind]

    def _kv_tokens(self, kind: InstanceKind, candidate: PlanCandidate) -> int:
        engine = self.base.engine
        if engine.kv_blocks is not None:
            return engine.kv_blocks * engine.block_tokens
        return self.space.kv_tokens(kind, candidate.max_batch_tokens, candidate.max_seqs)

    def _rate(self, group: InstanceGroup, candidate: PlanCandidate) -> float:
        """Requests a second of one instance."""
        key = (group.kind, group.role, candidate.max_batch_tokens, candidate.max_seqs, candidate.batching, candidate.prefix_cache)
        if key not in self._rates:
            shape = self.shapes[candidate.prefix_cache]
            held = self._kv_tokens(group.kind, candidate)
            self._rates[key] = most_rps(
                self._cost(group.kind), shape, group.role, candidate.max_batch_tokens, candidate.max_seqs, candidate.batching, held
            )
        return self._rates[key]

    def _alone_share(self, group: InstanceGroup, candidate: PlanCandidate) -> tuple[float, str]:
        key = (group.kind, group.role, candidate.max_batch_tokens, candidate.max_seqs, candidate.prefix_cache)
        if key not in self._alone:
            shape, held = self.shapes[candidate.prefix_cache], self._kv_tokens(group.kind, candidate)
            self._alone[key] = alone_share(self._cost(group.kind), shape, group.role, candidate.max_batch_tokens, held)
        return self._alone[key]

    def _link_rps(self, candidate: PlanCandidate) -> float:
        """By the wider of an instance's ports, as if all hand-offs took that way, to those to whom they bring the least."""
        network = self.base.cluster.network
        out = {Role.PREFILL: 0.0, Role.DECODE: 0.0}
        least_bytes = inf
        for group in candidate.layout:
            chip, tp = self.space.chip(group.kind.hardware), group.kind.tp
            nic = (network.gbytes_per_s * 1e9 if network.gbytes_per_s is not None else chip.nic_bytes_per_s) * tp
            inside = network.intra_host.gbytes_per_s
            near = inside * 1e9 if inside is not None else max(chip.scaleup_bytes_per_s, chip.pcie_bytes_per_s) * tp
            out[group.role] += group.count * max(nic, near)
            if group.role is Role.DECODE:
                least_bytes = min(least_bytes, float(cost.kv_bytes_per_token(self.model, chip, self.base.formats.kv, tp)))
        kept = least_bytes * self.shapes[candidate.prefix_cache].kv_tokens if least_bytes < inf else 0.0
        return min(out.values()) / kept if kept else inf


def most_rps(cost: Cost, shape: RequestShape, role: Role, budget: int, max_seqs: int, batching: str, kv_tokens: int) -> float:
    """The most requests a second that an instance of this role could carry for ever."""
    new = shape.prompt_tokens if role.prefills else 0.0
    out = shape.output_tokens if role.decodes else 0.0
    if not new and not out:
        return inf
    longest_s = float(np.quantile(shape.tpot_s, ATTAINED)) if out else max(float(np.quantile(shape.ttft_s, ATTAINED)), 1.0)
    budget = budget if batching == "chunked" or not out else max(budget, int(shape.prompts.max()))
    most_sequences = min(max_seqs, kv_tokens / shape.held_tokens) if out else inf
    step_s = _step_of(cost, shape, whole=batching != "chunked")
    best = 0.0
    for k in range(_STEPS):
        s = longest_s * 0.75**k
        ceiling = min(budget / (s * (new + out)) if new else inf, most_sequences / (s * out) if out else inf)
        best = max(best, _fitting(lambda rate, s=s: step_s(rate * s * new, rate * s * out) <= s, ceiling))  # type: ignore[misc]
    return best


def _fitting(fits: Callable[[float], bool], ceiling: float) -> float:
    """The highest rate up to `ceiling` that fits, as fitting is monotonic."""
    low, high = 0.0, min(ceiling, 1e6)
    if fits(high):
        return high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return high


def _step_of(cost: Cost, shape: RequestShape, *, whole: bool) -> Callable[[float, float], float]:
    """Seconds of a step by its prompt tokens and its decoding sequences. `whole`: prompts have steps of their own."""

    def seconds(tokens: float, sequences: float) -> float:
        count, batch = round(tokens), round(sequences)
        chunks = []
        if count:
            pieces = max(1, round(count / max(shape.prompt_tokens, 1.0)))
            each = max(1, count // pieces)
            chunks = [(each, max(0, round(shape.attended_tokens - each / 2)))] * pieces
        context = round(sequences * shape.held_tokens)
        if chunks and batch and not whole:
            return cost.mixed_s(chunks, batch, context)
        return (cost.prefill_s(chunks) if chunks else 0.0) + (cost.decode_s(batch, context) if batch else 0.0)

    return seconds


def alone_share(cost: Cost, shape: RequestShape, role: Role, budget: int, kv_tokens: int) -> tuple[float, str]:
    """The share of requests that an idle instance of this role serves within their objectives, and what most of the others miss."""
    met = {"room for their KV": shape.totals <= kv_tokens}
    if role.prefills:
        known = np.unique(shape.prompts[:: max(1, len(shape.prompts) // 500)].astype(np.int64))
        seconds = [_alone_s(cost, int(tokens), budget) for tokens in known]
        met["TTFT"] = np.interp(shape.prompts, known, seconds) <= shape.ttft_s
    if role.decodes:
        first, last = cost.decode_s(1, 1), cost.decode_s(1, int(shape.totals.max()))
        met["TPOT"] = first + (last - first) * shape.totals / shape.totals.max() <= shape.tpot_s
    share = float(np.logical_and.reduce(list(met.values())).mean())
    return share, min(met, key=lambda name: float(met[name].mean()))


def _alone_s(cost: Cost, tokens: int, budget: int) -> float:
    return sum(cost.prefill_s([(min(budget, tokens - start), start)]) for start in range(0, tokens, budget))
