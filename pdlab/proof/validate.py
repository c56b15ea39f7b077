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
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import yaml
from pydantic import Field, ValidationError

from pdlab.core.strict import Strict
from pdlab.core.types import UsageError
from pdlab.cost.profile import load_instance_profile, save_instance_profile
from pdlab.experiment.experiment import Experiment
from pdlab.experiment.mistakes import mistakes
from pdlab.experiment.yaml import read_yaml
from pdlab.proof.bench.run import Target, measure
from pdlab.proof.calibrate.pool import pooled
from pdlab.proof.calibrate.stream import MeasuredServer, connect, model_of
from pdlab.proof.local_cluster import local_cluster
from pdlab.proof.validate_host import BIN_S, faults, of_engines, seen
from pdlab.real.host import processes
from pdlab.real.host.core_probe import Pace, watched
from pdlab.report.result import Result
from pdlab.results import comparison_stored as compare_stored
from pdlab.results.comparison import Comparison, compare
from pdlab.results.comparison_stored import Check

Say = Callable[[str], None]
Turned = TypeVar("Turned")
PROFILES = "profile-[0-9]*.json"  # of the calibrations, one each
CORES = "cores.json"  # of a run: what the probe saw
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
            return cls.model_validate({"name": path.stem, **read_yaml(path), **({"rates": rates} if rates else {})})
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
    """All the file asks for, at `rates` where there are any, with pdlab's own engines where `start` gives no others; results, profile
    and experiments are left in `directory`. `again`: with the profiles and the measured runs that are there already, nothing is started.
    Ctrl-C stops all. Raises UsageError."""
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
    """Calibrations and runs, left in `directory`."""
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
                        where = _real(directory, layout, name, rate, repeat)
                        _measure_run(Experiment.load(path, [f"workload.rate={rate}"]), target, pace, where)
        calibrate(asked.repeats)


def _judged(asked: TwoWorlds, plans: Mapping[tuple[str, str], Mapping[str, Any]], directory: Path, say: Say, began_s: float) -> Outcome:
    """What is simulated with the pooled profile, against what was measured."""
    calibrations = sorted(directory.glob(PROFILES))
    if not calibrations:
        raise UsageError(f"{directory}: no profile-1.json and no measured run is there: leave out --again")
    made = pooled([load_instance_profile(path) for path in calibrations])
    profile = (directory / "profile.json").resolve()
    save_instance_profile(made, profile)
    runs: dict[tuple[str, str, float], tuple[list[_Live], list[Path], Path]] = {}
    asked_for: dict[Path, Mapping[str, Any]] = {}
    for (layout, name), plan in plans.items():
        rows = [{**row, "hardware": str(profile), "host": "this machine"} for row in asked.layouts[layout]]
        instances = [placement.name for placement in Experiment.load(_plan(directory, layout, name)).placements()]
        for rate in asked.rates:
            stem = f"{layout}-{name}-{rate:g}-sim"
            told = _with(plan, workload={**plan["workload"], "rate": rate}, cluster={**plan["cluster"], "instances": rows})
            real = [_Live.load(_real(directory, layout, name, rate, repeat)) for repeat in range(asked.repeats)]
            for stale in directory.glob(f"{escape(stem)}*/"):  # of another judgement, which may have had more of them, or fewer
                shutil.rmtree(stale)
            disturbed = [faults(own.loops, instances, made.unsteady) for own in real]
            each = {directory / f"{stem}-{k}": _with(told, faults=slow) for k, slow in enumerate(disturbed, 1)}
            simulated = each if any(disturbed) else {directory / stem: told}
            alone = directory / "undisturbed" / stem
            runs[layout, name, rate] = real, list(simulated), alone
            asked_for |= {**simulated, alone: told}
    say(f"simulating, {len(asked_for)} times")
    _simulate(asked_for)
    found: dict[str, list[tuple[str, Result]]] = {f"{layout}, {rate:g} req/s": [] for layout in asked.layouts for rate in asked.rates}
    plain: dict[str, list[tuple[str, Result]]] = {run: [] for run in found}
    measured = []
    for (layout, _, rate), (real, simulated_in, alone) in runs.items():
        run, named = f"{layout}, {rate:g} req/s", [own.named for own in real]
        found[run] += [*named, *map(_loaded, simulated_in)]
        plain[run] += [*named, _loaded(alone)]
        measured += [own.result.summary for own in real]
    comparisons = {run: compare(results) for run, results in found.items()}
    checks = _checked(comparisons, directory / "checks.json")
    undisturbed = _checked({run: compare(results) for run, results in plain.items()}, directory / "undisturbed" / "checks.json")
    available_s = sum(summary["duration_s"] * summary["run"]["cores"] for summary in measured)
    front_end = sum(summary["run"]["front_end_cpu_s"] for summary in measured) / available_s
    return Outcome(comparisons, checks, undisturbed, front_end, time.monotonic() - began_s)


def _plan(directory: Path, layout: str, policy: str) -> Path:
    return directory / f"{layout}-{policy}.yaml"


def _real(directory: Path, layout: str, policy: str, rate: float, repeat: int) -> Path:
    return directory / f"{layout}-{policy}-{rate:g}-real-{repeat + 1}"


@dataclass(frozen=True, slots=True)
class _Live:
    """One measured run. `loops`: of each engine's core, `pdlab.proof.validate_host.seen`."""

    where: Path
    result: Result
    loops: list[list[float]]

    @classmethod
    def load(cls, where: Path) -> _Live:
        """Raises UsageError where there is none."""
        result = Result.load(where)
        try:
            return cls(where, result, json.loads((where / CORES).read_text(encoding="utf-8"))["loop_s"])
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"{where / CORES}: {error}; pdlab validate writes it, measure again") from None

    @property
    def named(self) -> tuple[str, Result]:
        return str(self.where), self.result


def _measure_run(experiment: Experiment, target: Target, pace: Pace, where: Path) -> None:
    """Measures a run, and keeps it in `where`. Raises KeyboardInterrupt where it was stopped."""
    placed = list(experiment.placements())
    prefill = sorted(p.name for p in placed if p.role.prefills)
    asyncio.run(take_turns(target.url, prefill, sorted(p.name for p in placed if p.role.decodes)))
    before = processes.cpu_s(os.getpid())
    result = measure(experiment, target)
    if result.summary["partial"]:
        raise KeyboardInterrupt
    result.summary["run"] |= _host(before, processes.cpu_s(os.getpid()), len(pace.files))
    result.save(where)
    cores = of_engines(len(experiment.placements()), list(pace.files))
    loops = seen(pace, cores, result.summary["run"]["zero_s"], result.summary["duration_s"])
    (where / CORES).write_text(json.dumps({"bin_s": BIN_S, "loop_s": loops}) + "\n", encoding="utf-8")


def _simulate(plans: Mapping[Path, Mapping[str, Any]]) -> None:
    """Each plan, into its folder."""
    for parent in dict.fromkeys(where.parent for where in plans):
        parent.mkdir(exist_ok=True)
        own = {where: _with(plan, name=where.name) for where, plan in plans.items() if where.parent == parent}
        files = [str(_write(where.with_name(where.name + ".yaml"), plan)) for where, plan in own.items()]
        _run("sim", *files, "--out", str(parent if len(own) > 1 else next(iter(own))), "--quiet")


def _loaded(where: Path) -> tuple[str, Result]:
    return str(where), Result.load(where)


def _checked(comparisons: Mapping[str, Comparison], file: Path) -> list[Check]:
    """Every figure against its bar, kept in `file`, too."""
    checks = [check for run, comparison in comparisons.items() for check in compare_stored.checks(run, comparison)]
    told = [{name: None if value != value else value for name, value in asdict(check).items()} for check in checks]
    file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return checks


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

    async with await connect() as session:
        server = MeasuredServer(session, url, await model_of(session, url), WARM_VOCAB, seed=1)
        await asyncio.gather(go_on(), go_on())


async def take_turns(url: str, prefill: Sequence[str], decode: Sequence[str]) -> None:
    """Ask until it is the first instance's turn, as it is when a simulation begins: a policy that takes turns goes on where the requests
    before have left it, and the instance that serves beside an engine is not the same as the other. `pdlab bench` asks for one token before
    its clock runs (`SPENT`). Policies that do not take turns are asked twice round in vain."""
    async with await connect() as session:
        server = MeasuredServer(session, url, await model_of(session, url), WARM_VOCAB, seed=2)
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
    ended = subprocess.run([sys.executable, "-m", "pdlab", *arguments], capture_output=True, text=True, check=False)
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
