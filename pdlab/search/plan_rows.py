"""What is shown of a plan's finalists, in words and numbers; the table, the page and the file of results are made of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pdlab.results.statistics import MeanInterval
from pdlab.results.units import MISSING, number, percent, seconds
from pdlab.search.plan import Plan
from pdlab.search.plan_search import COMFORT, SENSITIVE, TENTH, TOLD_APART, Finalist

COLUMNS = ("deployment", "chunk", "req/s", "per GPU", "GPUs", "$/h", "$/Mtok", "TTFT p99", "TPOT p99", "what binds")


@dataclass(frozen=True, slots=True)
class PlanRow:
    """`tied` with the first. Latencies are at 80 % of capacity; tokens are those of prompts and answers."""

    rank: int
    finalist: Finalist
    tied: bool
    capacity: MeanInterval
    usd_per_h: float
    usd_per_mtok: float
    ttft_s: float | None
    tpot_s: float | None
    binds: str
    evidence: str

    @property
    def per_accelerator(self) -> float:
        return self.capacity.mean / self.finalist.candidate.accelerators

    @property
    def name(self) -> str:
        """The layout, and the chunk budget, which goes with it."""
        candidate = self.finalist.candidate
        return f"{candidate.layout_words}, chunk {candidate.max_batch_tokens:,}"

    @property
    def cells(self) -> list[str]:
        half = self.capacity.half
        return [
            self.finalist.candidate.layout_words,
            f"{self.finalist.candidate.max_batch_tokens:,}",
            f"{number(self.capacity.mean)}{'' if half is None else f' ±{number(half)}'}",
            number(self.per_accelerator),
            str(self.finalist.candidate.accelerators),
            f"{self.usd_per_h:.2f}" if self.usd_per_h else MISSING,
            f"{self.usd_per_mtok:.3f}" if self.usd_per_mtok else MISSING,
            seconds(self.ttft_s),
            seconds(self.tpot_s),
            self.binds,
        ]

    @property
    def plain(self) -> dict[str, Any]:
        candidate, varied = self.finalist.candidate, self.finalist.varied
        first = next(iter(self.finalist.capacities.values()), 0.0)
        return {
            "rank": self.rank,
            "tied_with_first": self.tied,
            "deployment": candidate.words,
            "split": candidate.split,
            "layout": [{"role": str(g.role), "count": g.count, "hardware": g.kind.hardware, "tp": g.kind.tp} for g in candidate.layout],
            "settings": candidate.setting_words,
            "alike": [", ".join(one.candidate.setting_words) for one in self.finalist.alike],
            "capacity_rps": self.capacity.mean,
            "capacity_half_rps": self.capacity.half,
            "capacity_rps_by_seed": {str(seed): value for seed, value in self.finalist.capacities.items()},
            "bound_rps": self.finalist.contender.bound.rps,
            "accelerators": candidate.accelerators,
            "capacity_rps_per_accelerator": self.per_accelerator,
            "usd_per_h": self.usd_per_h,
            "usd_per_mtok": self.usd_per_mtok,
            "ttft_s_p99": self.ttft_s,
            "tpot_s_p99": self.tpot_s,
            "binds": self.binds,
            "evidence": self.evidence,
            "sensitivity": {name: value / first - 1 for name, value in varied.items() if first},
        }


def rows(plan: Plan) -> list[PlanRow]:
    """The best first."""
    search = plan.search
    winners = search.winners if search.ranked else []
    found = []
    tokens = float(plan.workload.prompt_tokens.mean() + plan.workload.output_tokens.mean())
    for rank, one in enumerate(search.ranked, 1):
        capacity = one.capacity
        if capacity is None or not capacity.mean:
            continue
        usd = plan.space.usd_per_h(one.candidate)
        missed = search.missed.get(one.contender)
        figures = missed[1].figures if missed is not None else {}
        binds = str(figures.get("bottleneck.resource") or one.contender.bound.binds)
        evidence = str(figures.get("bottleneck.evidence") or "")
        mtok_per_h = capacity.mean * tokens * 3600 / 1e6
        found.append(
            PlanRow(
                rank, one, one in winners, capacity, usd, usd / mtok_per_h, one.mean("ttft_s.p99"), one.mean("tpot_s.p99"), binds, evidence
            )
        )
    return found


def verdict(plan: Plan, found: list[PlanRow]) -> str:
    """The answer in a sentence or two."""
    first, *others = found
    tied = [row for row in others if row.tied]
    unit = {"rate": "", "gpu": " for each accelerator", "dollar": " for each $ an hour"}[plan.question.objective]
    said = f"{first.finalist.candidate.words}: {number(first.capacity.mean)} requests/s"
    if plan.question.rate is not None:
        said = f"{first.finalist.candidate.accelerators} accelerators carry {plan.question.rate:g} requests/s. The best of them is {said}"
    if tied:
        names = "; ".join(row.name for row in tied)
        return f"{said}. That ties{unit} with {names}: the difference is within its interval."
    other = next((row for row in others if row.finalist.candidate.split != first.finalist.candidate.split), None)
    if other is None:
        return f"{said}."
    kinds = {"mixed": "mixed instances", "pd": "prefill and decode apart"}
    more = first.finalist.worth / other.finalist.worth - 1
    apart = f"the best with {kinds[other.finalist.candidate.split]}, {other.name} ({number(other.capacity.mean)} requests/s)"
    return f"{said}, {percent(more)} more{unit} than {apart}."


def sensitivity(found: list[PlanRow]) -> Iterator[tuple[str, str]]:
    """What a tenth more or less of each cost does to the first few, and to their order."""
    looked = [row for row in found[:SENSITIVE] if row.finalist.varied]
    if not looked:
        return
    still = []
    for name in TENTH:
        if all(name not in row.finalist.varied for row in looked):
            continue
        moved = []
        for row in looked:
            first = next(iter(row.finalist.capacities.values()))
            varied = row.finalist.varied.get(name, first)  # what hands nothing off has no link
            moved.append((varied / row.finalist.contender.size, row, varied / first - 1))
        if all(abs(change) < TOLD_APART for _, _, change in moved):
            still.append(name)
            continue
        words = ", ".join(f"{row.rank}: {change:+.0%}" for _, row, change in moved)
        best, leader, _ = max(moved, key=lambda entry: (entry[0], -entry[1].rank))
        ahead = leader is not looked[0] and best > moved[0][0] * (1 + TOLD_APART)
        yield name, f"{words}; {f'{leader.name} comes first then' if ahead else 'the first stays first'}"
    if still:
        yield ", ".join(still), "no capacity changes"


def notes(plan: Plan) -> list[str]:
    """What was left out and why, and how far the figures carry."""
    search, judge = plan.search, plan.judge
    said = []
    if pruned := sum(plan.space.pruned.values()):
        reasons = "; ".join(f"{reason} ({count:,})" for reason, count in plan.space.pruned.most_common(4))
        said.append(f"{pruned:,} deployments are not possible: {reasons}")
    left = [f"{count:,} {reason}" for reason, count in (*plan.ruled_out.items(), *search.left.items()) if count]
    said.append(f"{plan.considered:,} were considered: {', '.join(left)}; {judge.asked:,} simulations of up to {judge.requests:,} requests")
    alike = [f"{row.name}: {'; '.join(words)}" for row in rows(plan)[:1] if (words := indifferent(row.finalist))]
    said += [f"made no difference to {line}" for line in alike]
    said += [f"{count:,} simulations failed: {reason}" for reason, count in judge.failures.most_common(3)]
    if short := _too_short(plan):
        said.append(short)
    if plan.base.faults or plan.base.cluster.autoscale.enabled:
        said.append("faults and autoscaling of the file are left out of a plan")
    return said


def indifferent(finalist: Finalist) -> list[str]:
    """Settings whose other values did as well, such as "256 seqs"."""
    own = finalist.candidate.setting_words
    others: dict[str, None] = {}
    for one in finalist.alike:
        changed = [word for word in one.candidate.setting_words if word not in own]
        if len(changed) == 1:
            others[changed[0]] = None
    return list(others)


def _too_short(plan: Plan) -> str:
    """Where a request takes so much of the run that the load never settles."""
    first = next(iter(plan.search.ranked), None)
    if first is None or first.capacity is None or not first.capacity.mean:
        return ""
    window_s, each_s = plan.judge.requests / first.capacity.mean, first.mean("e2e_s.mean")
    if each_s is None or window_s >= 5 * each_s:
        return ""
    wanted = -(-int(10 * each_s * first.capacity.mean) // 1000) * 1000
    lasts = f"at capacity a run lasts {seconds(window_s)} and a request {seconds(each_s)}"
    return f"{lasts}: --requests {wanted} makes capacities surer, and lower"


def comfort_words() -> str:
    return f"latencies at {COMFORT:.0%} of capacity; $/Mtok: of prompts and answers, at capacity"
