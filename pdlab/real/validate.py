"""`pdlab validate`: the same experiments simulated and served on this machine, and whether the figures agree.

The file names a base experiment, and the layouts, policies and rates that are tried with it. The engine is calibrated first, alone, with
work that has nothing to do with the workload; then each cluster is started, measured `repeats` times at each rate, and stopped; then each
is simulated with the profile. Nothing is fitted to what was measured of the clusters.

Engines are pinned to one core each, in the order of the file; the router and the client share what is left, or all where nothing is.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from pdlab.compare import Comparison, Group, compare
from pdlab.mistakes import mistakes
from pdlab.read_yaml import read_yaml
from pdlab.real.bench.run import Target, measure
from pdlab.result import Result
from pdlab.spec import Experiment, Spec
from pdlab.types import UsageError

BAR = {f"{key}.{point}": bound for key in ("ttft_s", "tpot_s", "e2e_s") for point, bound in (("mean", 0.05), ("p99", 0.10))}
START_S, STOP_S = 180.0, 40.0
Say = Callable[[str], None]


class TwoWorlds(Spec):
    """`experiment` is as in any experiment file, but for `policy` and `workload.rate`; `layouts` replace its `cluster.instances`."""

    name: str = "two_worlds"
    experiment: dict[str, Any]
    layouts: dict[str, list[dict[str, Any]]]
    policies: dict[str, Any]
    rates: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
    repeats: Annotated[int, Field(ge=1)] = 2
    load_format: str = ""
    calibrate_s: Annotated[float, Field(ge=1)] = 60.0
    clock: str = "wall"

    @classmethod
    def load(cls, path: Path) -> TwoWorlds:
        try:
            return cls.model_validate({"name": path.stem, **read_yaml(path)})
        except ValidationError as error:
            raise UsageError("\n".join(f"{path}: {line}" for line in mistakes(error, cls))) from None


@dataclass(frozen=True, slots=True)
class Check:
    """One figure of one run against the bar."""

    run: str
    policy: str
    key: str
    simulated: float
    measured: float
    error: float
    spread: float
    bound: float

    @property
    def holds(self) -> bool:
        """nan, where a figure is missing, does not."""
        return abs(self.error) <= max(self.bound, 0.0 if self.spread != self.spread else self.spread)


@dataclass(frozen=True, slots=True)
class Outcome:
    comparisons: Mapping[str, Comparison]
    checks: list[Check]
    seconds: float

    @property
    def ranked_alike(self) -> bool:
        return all(r.agree == r.decided for c in self.comparisons.values() for r in c.rankings)


def validate(file: Path, directory: Path, say: Say) -> Outcome:
    """Everything the file asks for; results, profile and experiments are left in `directory`. Raises UsageError."""
    began_s = time.monotonic()
    asked = TwoWorlds.load(file)
    base = {**asked.experiment, "base_dir": str((file.parent / str(asked.experiment.get("base_dir", ""))).resolve())}
    directory.mkdir(parents=True, exist_ok=True)
    profile = (directory / "profile.json").resolve()
    plans = {
        (layout, name): _with(base, cluster={**base.get("cluster", {}), "instances": instances}, policy=policy)
        for layout, instances in asked.layouts.items()
        for name, policy in asked.policies.items()
    }
    for (layout, name), plan in plans.items():
        Experiment.parse({**plan, "name": f"{layout}-{name}"}, str(file))  # mistakes show before anything is started
    served = [*(("--load-format", asked.load_format) if asked.load_format else ()), "--threads"]
    say("calibrating")
    first = _write(directory / "calibrated.yaml", next(iter(plans.values())))
    seconds = str(asked.calibrate_s)
    _run("calibrate", str(first), *served, "1", "--seconds", seconds, "--clock", asked.clock, "--out", str(profile))
    found: dict[str, list[tuple[str, Result]]] = {}
    for (layout, name), plan in plans.items():
        path = _write(directory / f"{layout}-{name}.yaml", plan)
        say(f"{layout}, {name}: starting")
        engines = sum(int(row.get("count", 1)) for row in asked.layouts[layout])
        with _cluster(path, [*served, str(engines)]) as url:
            for rate in asked.rates:
                experiment = Experiment.load(path, [f"workload.rate={rate}"])
                for repeat in range(asked.repeats):
                    say(f"{layout}, {name}: {rate:g} req/s, run {repeat + 1} of {asked.repeats}")
                    result = measure(experiment, Target(url, salt=1 + repeat + round(rate * 1000) * 64))
                    result.save(where := directory / f"{layout}-{name}-{rate:g}-real-{repeat + 1}")
                    found.setdefault(f"{layout}, {rate:g} req/s", []).append((str(where), Result.load(where)))
    for (layout, name), plan in plans.items():
        say(f"{layout}, {name}: simulating")
        rows = [{**row, "hardware": str(profile)} for row in asked.layouts[layout]]
        path = _write(directory / f"{layout}-{name}-sim.yaml", _with(plan, cluster={**plan["cluster"], "instances": rows}))
        for rate in asked.rates:
            where = directory / f"{layout}-{name}-{rate:g}-sim"
            _run("sim", str(path), "--set", f"workload.rate={rate}", "--out", str(where), "--quiet")
            found[f"{layout}, {rate:g} req/s"].append((str(where), Result.load(where)))
    comparisons = {run: compare(results) for run, results in found.items()}
    checks = [check for run, comparison in comparisons.items() for group in comparison.groups for check in _checks(run, group)]
    return Outcome(comparisons, checks, time.monotonic() - began_s)


def _checks(run: str, group: Group) -> Iterator[Check]:
    for key, bound in BAR.items():
        line = group.line(key)
        yield Check(run, group.policy, key, line.simulated, line.mean, line.error, line.spread, bound)


def _with(plan: Mapping[str, Any], **changes: object) -> dict[str, Any]:
    return {**plan, **changes}


def _write(path: Path, plan: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(plan), sort_keys=False), encoding="utf-8")
    return path


def _run(*arguments: str) -> None:
    ended = subprocess.run([sys.executable, "-m", "pdlab", *arguments], capture_output=True, text=True, check=False)
    if ended.returncode:
        raise UsageError(f"pdlab {' '.join(arguments)} failed: {(ended.stderr or ended.stdout).strip()[-2000:]}")


# ---------------------------------------------------------------- a cluster on this machine


@contextmanager
def _cluster(file: Path, options: list[str]) -> Iterator[str]:
    """`pdlab serve FILE --role all`, until it is left; yields its URL."""
    command = [sys.executable, "-m", "pdlab", "serve", str(file), "--role", "all", "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    reader = threading.Thread(target=_listen, args=(process, said), daemon=True)
    reader.start()
    try:
        yield _ready(process, said)
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        process.kill()
        process.wait()
        reader.join()


def _listen(process: subprocess.Popen[str], said: queue.SimpleQueue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        said.put(line)
    process.stdout.close()
    said.put("")


def _ready(process: subprocess.Popen[str], said: queue.SimpleQueue[str]) -> str:
    lines: list[str] = []
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        try:
            line = said.get(timeout=1.0)
        except queue.Empty:
            continue
        lines.append(line)
        if found := re.search(r"ready after .*: (http://\S+)/v1$", line.strip()):
            _pin(process.pid)
            return found[1]
        if not line:
            break
    raise UsageError(f"the cluster did not start: {''.join(lines).strip()[-2000:] or f'not ready within {START_S:g} s'}")


def _pin(parent: int) -> None:
    """One core for each engine process below `parent`, by age; the others take what is left."""
    cores = sorted(os.sched_getaffinity(0))
    below = _descendants(parent)
    engines = [pid for pid in below if b"pdlab.real.engine.process" in _command(pid)]
    if len(engines) > len(cores):
        return  # more engines than cores: whoever pinned them would decide who waits
    for pid, core in zip(engines, cores, strict=False):
        _affinity(pid, {core})
    rest = set(cores[len(engines) :]) or set(cores)
    for pid in [parent, *(pid for pid in below if pid not in engines)]:
        _affinity(pid, rest)


def _affinity(pid: int, cores: set[int]) -> None:
    with contextlib.suppress(OSError):  # it has ended
        for thread in os.listdir(f"/proc/{pid}/task"):
            os.sched_setaffinity(int(thread), cores)


def _descendants(parent: int) -> list[int]:
    """By process number, which is by age."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError):
                parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[1])
    found = {parent}
    while more := {pid for pid, of in parents.items() if of in found} - found:
        found |= more
    return sorted(found - {parent})


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
