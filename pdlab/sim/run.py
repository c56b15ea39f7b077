"""From an experiment to its Result."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pdlab import __version__
from pdlab.core import garbage_collection
from pdlab.core.endless_hooks import watched
from pdlab.core.policy import Policy
from pdlab.core.types import UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.policies import load as load_policy
from pdlab.replay.log import EventLog, head_of
from pdlab.report.result import Result
from pdlab.results.records import Records
from pdlab.sim import build, outcome
from pdlab.workload.base import Workload
from pdlab.workload.spec import build as build_workload

LONGEST_S = 1e9  # 31 years
Progress = Callable[[float, int, int], None]


def simulate(
    experiment: Experiment | str | Path,
    *,
    policy: Policy | type[Policy] | str | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    trace_events: Path | None = None,
    workload: Workload | None = None,
    trim: bool = True,
    watch: Callable[[Records], None] | None = None,
) -> Result:
    """Run an experiment, or the one in a file. `policy` decides in place of the experiment's: an object, a class, or what a file may say.
    `progress(simulated seconds, requests ended, requests)` is called at every report; `trace_events` is where the event log goes;
    without `trim` the warm-up counts in the figures. `watch` is given the records before anything runs: they grow as requests end. A
    KeyboardInterrupt ends the run early: what there is by then comes back marked partial. Raises UsageError, also where a
    policy's hook does not return."""
    if isinstance(experiment, str | Path):
        experiment = Experiment.load(experiment)
    elif not isinstance(experiment, Experiment):
        raise UsageError(f"simulate takes an experiment, or the path of its file, not {experiment!r}")
    decider = load_policy.instantiate(experiment.policy if policy is None else policy, experiment.base_dir)
    if policy is None or isinstance(policy, str | Mapping):
        experiment = experiment if policy is None else experiment.with_(policy=policy)
        said: str | Mapping[str, Any] = experiment.policy
    else:
        said = load_policy.describe(decider)
    if workload is None:
        workload = build_workload(experiment.workload, experiment.seed, experiment.base_dir)
    _check_length(workload)
    policy_hash = load_policy.source_hash(decider)
    log = None if trace_events is None else _log(trace_events, experiment, said, decider, workload)
    with watched(decider):
        world = build.world(experiment, workload, log=log, spans=trace_events is not None, policy=decider)
    world.periodic.on_progress = progress
    if watch is not None:
        watch(world.records)
    started = time.process_time()
    partial = False
    try:
        with garbage_collection.seldom(), watched(decider):
            world.run()
    except KeyboardInterrupt:
        partial = True
        world.interrupt()
    finally:
        cpu_s = time.process_time() - started
        if log is not None:
            log.close()
    run = {
        "world": "sim",
        "version": __version__,
        "seed": experiment.seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "policy": said,
        "policy_hash": policy_hash,
        "workload": workload.reading,
        "rests_on": outcome.rests_on(experiment),
        "cpu_s": cpu_s,
        "requests_per_cpu_s": world.source.ended / cpu_s if cpu_s else 0.0,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    summary = outcome.summary(world, experiment, run, log=log, partial=partial, trim=trim)
    plain = {**experiment.resolved(), "policy": said}
    return Result(summary, world.records, world.gaps, world.samples, plain, log=trace_events, spans=world.spans or ())


def _check_length(workload: Workload) -> None:
    last_s = float(workload.arrival_s.max()) if len(workload) else 0.0
    if not last_s <= LONGEST_S:
        raise UsageError(
            f"workload: its last request arrives after {last_s:.3g} s, and a clock tells microseconds apart for {LONGEST_S:.0e} s only: "
            "raise workload.rate, or take fewer requests"
        )


def _log(path: Path, experiment: Experiment, policy: str | Mapping[str, Any], decider: Policy, workload: Workload) -> EventLog:
    """It names the policy that a replay is to build. Raises UsageError where none can be built of what is said of it."""
    try:
        recorded = experiment if policy == experiment.policy else experiment.with_(policy=policy)
    except UsageError:
        raise UsageError(
            f"policy {policy}: the event log of a class that is in no file cannot be replayed; put it into one, "
            "and give path/to/file.py:Class"
        ) from None
    try:
        return EventLog(path, head_of(recorded, decider, workload.hash_tokens))
    except OSError as error:
        raise UsageError(f"event log {path}: {error.strerror}") from None
