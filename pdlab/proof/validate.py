"""`pdlab validate`: the same experiments simulated and served on this machine, and whether the figures agree.

The file names a base experiment, and the layouts, policies and rates that are tried with it. An engine is calibrated alone, with work that
has nothing to do with the workload; then each cluster is started, warmed up, measured at each rate, and stopped. That is done `repeats`
times, in another order, with one more calibration at the end, since a shared machine is not equally fast at all times. Then each cluster is
simulated with the pooled profile. Nothing is fitted to what was measured of the clusters.

A virtual machine's host may slow one of its cores or the other for seconds. A probe beside the engines sees that, and each run has a
simulation of its own in which the same instances are as slow at the same times; and one more, in `undisturbed`, that knows nothing of it.

Engines are pinned to one core each, in the order of the file; the router and the client share what is left, or where nothing is the core of
the last. The cores of a virtual machine are kept awake.
"""

from __future__ import annotations

import asyncio
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import yaml
from pydantic import Field, ValidationError

from pdlab.core.file_kinds import TWO_WORLDS
from pdlab.core.strict import Strict
from pdlab.core.types import UsageError
from pdlab.cost.profile import load_instance_profile, save_instance_profile
from pdlab.experiment.experiment import Experiment
from pdlab.experiment.mistakes import mistakes
from pdlab.experiment.yaml import read_yaml
from pdlab.proof.bench.run import Target, measure
from pdlab.proof.calibrate.machine import this_machine
from pdlab.proof.calibrate.pool import pooled
from pdlab.proof.calibrate.stream import servers
from pdlab.proof.local_cluster import local_cluster
from pdlab.proof.validate_host import faults, of_engines, seen
from pdlab.real.host import processes
from pdlab.real.host.core_probe import Pace, watched
from pdlab.real.host.processes import MODULE
from pdlab.results.comparison import Comparison
from pdlab.results.comparison_stored import Check, all_checks, compared, plain
from pdlab.results.run import Run
from pdlab.results.run_store import RunStore, StoredRun, name_of
from pdlab.sim import simulate

Say = Callable[[str], None]
Turned = TypeVar("Turned")
PROFILES = "profile-[0-9]*.json"  # of the calibrations, one each
WARM_TOKENS = 32  # of a prompt, and of its answer
SPENT = 1  # requests of one token that `pdlab bench` makes of its own
WARM_VOCAB = 100  # every model has so many


class TwoWorlds(Strict):
    """`experiment` is as in any experiment file, but for `policy` and `workload.rate`; `layouts` replace its `cluster.instances`.
    `max_model_len` bounds a request's tokens, which spares calibrating contexts that do not come; 0: the model's own."""

    name: str = "two_worlds"
    experiment: dict[str, Any]
    layouts: dict[str, list[dict[str, Any]]]
    policies: dict[str, Any]
    rates: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
    repeats: Annotated[int, Field(ge=1)] = 2
    load_format: str = ""
    max_model_len: Annotated[int, Field(ge=0)] = 0
    calibrate_s: Annotated[float, Field(ge=1)] = 60.0
    warm_up_s: Annotated[float, Field(ge=0)] = 5.0
    clock: str = "wall"

    @classmethod
    def load(cls, path: Path, rates: Sequence[float] = ()) -> TwoWorlds:
        """`rates` in place of those of the file, where there are any."""
        try:
            return cls.model_validate({"name": path.stem, **read_yaml(path, TWO_WORLDS), **({"rates": rates} if rates else {})})
        except ValidationError as error:
            raise UsageError("\n".join(f"{path}: {line}" for line in mistakes(error, cls))) from None


@dataclass(frozen=True, slots=True)
class Outcome:
    """`undisturbed`: the same checks where the simulation does not know what the host did to the cores. `front_end`: the share of all
    cores' time that HTTP, router and client took during the runs, from engines that had them to themselves while they were calibrated."""

    comparisons: Mapping[str, Comparison]
    checks: list[Check]
    undisturbed: list[Check]
    front_end: float
    seconds: float

    @property
    def ranked(self) -> tuple[int, int]:
        """Pairs of policies, figure by figure: how many stand in the same order, of how many that the measured runs decide."""
        rankings = [r for comparison in self.comparisons.values() for r in comparison.rankings]
        return sum(r.agree for r in rankings), sum(r.decided for r in rankings)


class EnginesUnderTest(Protocol):
    """What runs the engines of this machine: it measures one alone, and starts the cluster of a plan, whose URL it yields."""

    def calibrate(self, plan: Path, profile: Path, seconds: float) -> None: ...

    def cluster(self, plan: Path) -> AbstractContextManager[str]: ...


Start = Callable[[TwoWorlds, Sequence[Path], Say], AbstractContextManager[EnginesUnderTest]]


def validate(
    file: Path, directory: Path, say: Say, start: Start | None = None, *, again: bool = False, rates: Sequence[float] = ()
) -> Outcome:
    """All the file asks for, at `rates` where there are any, with pdlab's own engines where `start` gives no others; all runs
    (a `RunStore`), profiles and experiments are left in `directory`. `again`: with the profiles and the measured runs that are there
    already, nothing is started. Ctrl-C stops all. Raises UsageError."""
    began_s = time.monotonic()
    asked = TwoWorlds.load(file, rates)
    base = {**asked.experiment, "base_dir": str((file.parent / str(asked.experiment.get("base_dir", ""))).resolve())}
    base["workload"] = {**base.get("workload", {}), "rate": asked.rates[0]}  # of a file on its own; each run gives another
    if not again:
        directory.mkdir(parents=True, exist_ok=True)
    plans = {
        (layout, name): _with(base, cluster={**base.get("cluster", {}), "instances": instances}, policy=policy)
        for layout, instances in asked.layouts.items()
        for name, policy in asked.policies.items()
    }
    for (layout, name), plan in plans.items():
        Experiment.parse({**plan, "name": f"{layout}-{name}"}, str(file))  # mistakes show before anything is started
    if not again:
        _measure(asked, {key: _write(_plan(directory, *key), plan) for key, plan in plans.items()}, directory, say, start)
    return _judged(asked, plans, directory, say, began_s)


def _measure(asked: TwoWorlds, paths: Mapping[tuple[str, str], Path], directory: Path, say: Say, start: Start | None) -> None:
    """Calibrations and runs, left in `directory`; what is there of another validation goes with the first that is measured."""
    versions = {name: version(name) for name in ("pdlab", "torch") if find_spec(name)}
    store = RunStore(this_machine().model_dump(), {**versions, "python": platform.python_version()})
    for stale in directory.glob(PROFILES):
        stale.unlink()
    cores = sorted(os.sched_getaffinity(0))  # all; later, this process has those that engines leave
    with (
        processes.awake(),
        watched(cores) as pace,
        (start or own_engines)(asked, list(paths.values()), say) as serving,
    ):

        def calibrate(number: int) -> None:
            say(f"calibrating, {number + 1} of {asked.repeats + 1}")
            profile = (directory / f"profile-{number + 1}.json").resolve()
            serving.calibrate(next(iter(paths.values())), profile, asked.calibrate_s / (asked.repeats + 1))

        for repeat in range(asked.repeats):
            calibrate(repeat)
            for number, ((layout, name), path) in turned(list(enumerate(paths.items())), repeat, asked.repeats):
                say(f"run {repeat + 1} of {asked.repeats}: {layout}, {name}: starting")
                with serving.cluster(path) as url:
                    asyncio.run(warm_up(url, asked.warm_up_s))
                    for rate in turned(asked.rates, repeat, asked.repeats):
                        say(f"run {repeat + 1} of {asked.repeats}: {layout}, {name}: {rate:g} req/s")
                        target = Target(url, salt=1 + repeat + (round(rate * 1000) * 64 + number) * 64)
                        result, loop_s = _measure_run(Experiment.load(path, [f"workload.rate={rate}"]), target, pace)
                        store.put(StoredRun(layout, name, rate, "real", repeat + 1, result, loop_s))
                        store.save(directory)
        calibrate(asked.repeats)


def _judged(asked: TwoWorlds, plans: Mapping[tuple[str, str], Mapping[str, Any]], directory: Path, say: Say, began_s: float) -> Outcome:
    """What is simulated with the pooled profile, against what was measured."""
    calibrations = sorted(directory.glob(PROFILES))
    if not calibrations:
        raise UsageError(f"{directory}: no profile-1.json and no measured run is there: leave out --again")
    made = pooled([load_instance_profile(path) for path in calibrations])
    profile = (directory / "profile.json").resolve()
    save_instance_profile(made, profile)
    store = RunStore.load(directory)
    judged: dict[str, StoredRun] = {}
    say("simulating")
    for (layout, name), plan in plans.items():
        rows = [{**row, "hardware": str(profile), "host": "this machine"} for row in asked.layouts[layout]]
        instances = [placement.name for placement in Experiment.parse(plan).placements()]
        for rate in asked.rates:
            told = _with(plan, workload={**plan["workload"], "rate": rate}, cluster={**plan["cluster"], "instances": rows})
            real = [_measured(store, directory, (layout, name, rate), repeat + 1) for repeat in range(asked.repeats)]
            disturbed = [faults(run.loop_s, instances, made.unsteady) for run in real]
            troubles = [[], *disturbed] if any(disturbed) else [[]]
            simulated = [_simulated((layout, name, rate), repeat, _with(told, faults=slow)) for repeat, slow in enumerate(troubles)]
            judged |= {run.name: run for run in (*real, *simulated)}
    stale = {(run.layout, run.policy, run.rate) for run in judged.values()}  # of another judgement, which may have had more of them
    others = {name: run for name, run in store.runs.items() if (run.layout, run.policy, run.rate) not in stale or run.world == "real"}
    store.runs = {**judged, **{name: run for name, run in others.items() if name not in judged}}
    store.save(directory)
    store = RunStore.load(directory)  # judged is what is kept
    runs = [store.runs[name] for name in judged]
    comparisons = compared(runs)
    checks, undisturbed = all_checks(comparisons), all_checks(compared(runs, undisturbed=True))
    store.checks = [plain(check) for check in checks]
    store.save(directory)
    measured = [run.result.summary for run in runs if run.world == "real"]
    available_s = sum(summary["duration_s"] * summary["run"]["cores"] for summary in measured)
    front_end = sum(summary["run"]["front_end_cpu_s"] for summary in measured) / available_s
    return Outcome(comparisons, checks, undisturbed, front_end, time.monotonic() - began_s)


def _plan(directory: Path, layout: str, policy: str) -> Path:
    return directory / f"{layout}-{policy}.yaml"


def _measured(store: RunStore, directory: Path, of: tuple[str, str, float], repeat: int) -> StoredRun:
    """Raises UsageError where there is none."""
    layout, policy, rate = of
    found = store.runs.get(name_of(*of, "real", repeat))
    if found is None:
        raise UsageError(f"{directory}: no measured run {repeat} of {layout}, {policy}, {rate:g} req/s is there: leave out --again")
    return found


def _measure_run(experiment: Experiment, target: Target, pace: Pace) -> tuple[Run, list[list[float]]]:
    """A run, and what the probe saw of each engine's core meanwhile. Raises KeyboardInterrupt where it was stopped."""
    placed = list(experiment.placements())
    prefill = sorted(p.name for p in placed if p.role.prefills)
    asyncio.run(take_turns(target.url, prefill, sorted(p.name for p in placed if p.role.decodes)))
    before = processes.cpu_s(os.getpid())
    result = measure(experiment, target)
    if result.summary["partial"]:
        raise KeyboardInterrupt
    result.summary["run"] |= _host(before, processes.cpu_s(os.getpid()), len(pace.files))
    cores = of_engines(len(placed), list(pace.files))
    return result, seen(pace, cores, result.summary["run"]["zero_s"], result.summary["duration_s"])


def _simulated(of: tuple[str, str, float], repeat: int, plan: Mapping[str, Any]) -> StoredRun:
    """A plan's simulation. Raises KeyboardInterrupt where it was stopped."""
    result = simulate(Experiment.parse(_with(plan, name=name_of(*of, "sim", repeat))), trim=False)
    if result.summary["partial"]:
        raise KeyboardInterrupt
    return StoredRun(*of, "sim", repeat, result)


def turned(one_after_another: Sequence[Turned], repeat: int, repeats: int) -> Sequence[Turned]:
    """Each repeat begins elsewhere, so that what comes first, or after what, is not always the same policy's lot."""
    begin = repeat * len(one_after_another) // repeats
    return [*one_after_another[begin:], *one_after_another[:begin]]


async def warm_up(url: str, seconds: float) -> None:
    """Short requests for so long, two at a time. A cluster's first ones are slow: paths are walked for the first time, and memory that was
    somebody else's is not yet where a virtual machine's host will put it."""
    until_s = time.monotonic() + seconds

    async def go_on() -> None:
        while time.monotonic() < until_s:
            await server.ask(server.prompt(WARM_TOKENS), WARM_TOKENS)

    async with servers([url], WARM_VOCAB, seed=1) as [server]:
        await asyncio.gather(go_on(), go_on())


async def take_turns(url: str, prefill: Sequence[str], decode: Sequence[str]) -> None:
    """Ask until it is the first instance's turn, as it is when a simulation begins: a policy that takes turns goes on where the requests
    before have left it, and the instance that serves beside an engine is not the same as the other. `pdlab bench` asks for one token before
    its clock runs (`SPENT`). Policies that do not take turns are asked twice round in vain."""
    async with servers([url], WARM_VOCAB, seed=2) as [server]:
        for stage, names, last, tokens in (("decode_instance", decode, 0, 2), ("prefill_instance", prefill, SPENT, 1)):
            if len(names) < 2:
                continue
            for _ in range(2 * len(names)):
                told = await server.timeline(server.prompt(WARM_TOKENS), tokens)
                if told.get(stage) == names[-1 - last % len(names)]:
                    break


def _host(before: tuple[float, float], after: tuple[float, float], cores: int) -> dict[str, float]:
    """What the machine spent on a run, for a result's summary["run"]. This process has not all of its cores."""
    return {
        "engines_cpu_s": after[0] - before[0],
        "front_end_cpu_s": after[1] - before[1],  # HTTP, router and client
        "cores": cores,
    }


def _with(plan: Mapping[str, Any], **changes: object) -> dict[str, Any]:
    return {**plan, **changes}


def _write(path: Path, plan: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(plan), sort_keys=False), encoding="utf-8")
    return path


def _run(*arguments: str) -> None:
    ended = subprocess.run([*MODULE, "pdlab", *arguments], capture_output=True, text=True, check=False)
    if ended.returncode:
        raise UsageError(f"pdlab {' '.join(arguments)} failed: {(ended.stderr or ended.stdout).strip()[-2000:]}")


# ---------------------------------------------------------------- pdlab's own engines


@contextmanager
def own_engines(asked: TwoWorlds, plans: Sequence[Path], say: Say) -> Iterator[EnginesUnderTest]:
    """Each cluster's are started, and ended, with it."""
    yield _Own(asked)


@dataclass(frozen=True, slots=True)
class _Own:
    asked: TwoWorlds

    def calibrate(self, plan: Path, profile: Path, seconds: float) -> None:
        timed = ("--seconds", str(seconds), "--clock", self.asked.clock)
        _run("calibrate", str(plan), *self._options(1), *timed, "--out", str(profile))

    def cluster(self, plan: Path) -> AbstractContextManager[str]:
        return local_cluster(plan, self._options(len(list(Experiment.load(plan).placements()))))

    def _options(self, threads: int) -> list[str]:
        named = ["--load-format", self.asked.load_format] if self.asked.load_format else []
        if self.asked.max_model_len:
            named += ["--max-model-len", str(self.asked.max_model_len)]
        return [*named, "--threads", str(threads)]
