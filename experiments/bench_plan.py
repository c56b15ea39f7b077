"""Is `pdlab plan` quick, right and steady? By `make bench-plan`.

- *Speed*: 1,000 deployments for quickstart's workload. Bar: 60 s on two cores.
- *Regret*: the capacity that is lost by taking what a plan says instead of the best of all, each simulated, of 200 deployments and more.
  Bar: 5 %. A model of 8B, one of 70B, and one with experts.
- *Winners*: with five seeds the same deployment is first, or each ties with the others. Bar: so.

Exhaustively: every deployment's capacity with the first seed, by bisection; those within a tenth of the best again with all seeds. The best
mean is the best of all, and what the plan says is measured by the same seeds, rates and requests.

    python experiments/bench_plan.py --speed --winners --regret 8b,70b,moe [--jobs 2]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from pdlab import Experiment
from pdlab.results.statistics import mean_interval
from pdlab.search.plan import Plan, PlanQuestion
from pdlab.search.plan_judge import RateAsk
from pdlab.search.plan_search import RESOLUTION, CapacityBracket, Contender
from pdlab.search.plan_space import PlanCandidate
from pdlab.search.plan_store import PlanStore
from pdlab.search.pool import ProcessPool, usable_cores

HERE = Path(__file__).parent
THOUSAND = (
    "plan={max_batch_tokens: [512, 1024, 2048, 8192], policy: [least_loaded, round_robin, {dispatch: prefix_aware, handoff: least_kv}]}"
)
ANY = "cluster.instances=[{role: mixed, hardware: h100-sxm, tp: 8}]"  # which accelerators there are
CHAT = "workload={source: azure-conv-2023, requests: 1000, rate: 8}"
CODE = CHAT.replace("conv", "code")
SETTINGS = "plan={transfer: [push], policy: [least_loaded, round_robin], max_batch_tokens: [512, 2048, 8192], max_seqs: [64, 256]}"
SCENARIOS = {  # accelerators, and the experiment: at least 200 deployments each
    "8b": ("8", ANY, "slo={ttft_s: 0.5, tpot_s: 0.02}", CHAT, SETTINGS),
    "70b": ("16", ANY, "model=llama-3.1-70b", "slo={ttft_s: 0.5, tpot_s: 0.03}", CHAT, SETTINGS),
    "moe": ("8", ANY, "model=qwen3-30b-a3b", "slo={ttft_s: 0.5, tpot_s: 0.02}", CODE, SETTINGS),
}
REQUESTS = 1000  # of a simulation, where all are simulated
AGAIN = 0.9  # of the best with the first seed: measured with all seeds


@contextmanager
def answered(experiment: Experiment, question: PlanQuestion, jobs: int) -> Iterator[Plan]:
    with (
        TemporaryDirectory() as folder,
        closing(ProcessPool(jobs)) as pool,
        closing(PlanStore.open(Path(folder) / "plan", experiment.resolved())) as store,
    ):
        plan = Plan(experiment, question)
        plan.run(pool, store)
        yield plan


def speed(jobs: int) -> None:
    experiment = Experiment.load(HERE / "quickstart.yaml", [THOUSAND])
    wall, own = time.perf_counter(), time.process_time()
    with answered(experiment, PlanQuestion(gpus="8"), jobs) as plan:
        wall = time.perf_counter() - wall
        own, inside = time.process_time() - own, plan.judge.cpu_s
    first = plan.search.ranked[0]
    print(f"speed: {plan.considered:,} deployments, {plan.judge.simulated} simulations of up to {plan.judge.requests:,} requests")
    print(f"  {wall:.1f} s on {jobs} cores, of the CPU {own:.1f} s in the search and {inside:.1f} s in simulations; bar 60 s on 2 cores")
    print(f"  first: {first.candidate.words}, {first.worth:.1f} requests/s")


def winners(jobs: int) -> None:
    """Two plans agree if one's first is among the other's first ones."""
    gpus, *overrides = SCENARIOS["8b"]
    firsts: list[PlanCandidate] = []
    ties: list[set[str]] = []
    for seed in range(1, 6):
        with answered(
            Experiment.load(HERE / "quickstart.yaml", [*overrides, f"seed={seed}"]), PlanQuestion(gpus=gpus, requests=REQUESTS), jobs
        ) as plan:
            firsts.append(plan.search.ranked[0].candidate)
            ties.append({one.candidate.layout_words for one in plan.search.winners})
            first = plan.search.ranked[0]
            print(f"winner with seed {seed}: {first.candidate.words}, {first.worth:.1f} requests/s; ties {', '.join(sorted(ties[-1]))}")
    same = all(one.layout_words == firsts[0].layout_words for one in firsts)
    said = all(one.layout_words in tie for one in firsts for tie in ties)
    print(
        f"winners: {'the same' if same else 'not the same, and a tie is said' if said else 'NOT the same, and no tie is said'} for 5 seeds"
    )


def regret(name: str, jobs: int) -> None:
    gpus, *overrides = SCENARIOS[name]
    experiment = Experiment.load(HERE / "quickstart.yaml", overrides)
    with answered(experiment, PlanQuestion(gpus=gpus, requests=REQUESTS), jobs) as plan:
        simulated, spent = plan.judge.simulated, plan.judge.cpu_s
        chosen = plan.search.ranked[0].contender
        contenders = plan._possible(plan._contenders(plan.fleet))  # all, those that the plan has not simulated, too
        known = {one: one.bound.rps for one in contenders}
        first = capacities(plan, {(one, plan.seeds[0]): min(known[one], plan.search.ranked[0].worth) for one in contenders})
        best = max(first.values())
        again = [one for (one, _), rps in first.items() if rps >= AGAIN * best or one == chosen]
        rest = capacities(plan, {(one, seed): first[one, plan.seeds[0]] for one in again for seed in plan.seeds[1:]})
        means = {one: mean_of([({**first, **rest})[one, seed] for seed in plan.seeds]) for one in again}
    top = max(again, key=lambda one: means[one])
    lost = 1 - means[chosen] / means[top]
    more = plan.judge.simulated - simulated
    print(f"regret {name}: {len(contenders)} deployments, {simulated} simulations ({spent:.0f} CPU s) against {more} more")
    print(f"  said {chosen.candidate.words}: {means[chosen]:.2f} requests/s")
    print(f"  best {top.candidate.words}: {means[top]:.2f} requests/s; regret {lost:.1%}, bar 5 %", flush=True)


def capacities(plan: Plan, starts: dict[tuple[Contender, int], float]) -> dict[tuple[Contender, int], float]:
    """By contender and seed, from where to begin."""
    brackets = {key: CapacityBracket(start, step=1.2, resolution=RESOLUTION) for key, start in starts.items()}
    while rates := {key: rate for key, bracket in brackets.items() if (rate := bracket.next) is not None}:
        asks = [RateAsk(one.candidate, rate, plan.judge.requests, seed) for (one, seed), rate in rates.items()]
        for (key, rate), score in zip(rates.items(), plan.judge.scores(asks), strict=True):
            brackets[key].tell(rate, score)
    return {key: bracket.capacity for key, bracket in brackets.items()}


def mean_of(values: Sequence[float]) -> float:
    found = mean_interval(values)
    return 0.0 if found is None else found.mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--winners", action="store_true")
    parser.add_argument("--regret", default="", metavar=",".join(SCENARIOS))
    parser.add_argument("--jobs", type=int, default=usable_cores())
    asked = parser.parse_args()
    if asked.speed:
        speed(asked.jobs)
    if asked.winners:
        winners(asked.jobs)
    for name in filter(None, asked.regret.split(",")):
        regret(name, asked.jobs)


if __name__ == "__main__":
    main()
