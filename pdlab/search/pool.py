"""Simulations, each on one core, wherever the cores are: the tasks, what comes of them, and the processes of this machine.

A pool is given tasks and gives results in the order in which they end. A task is done again once where whoever did it died; a second death
is the task's failure. Tasks are idempotent: equal experiments give equal figures.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Protocol, Self

from pdlab.core.types import UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.report.result import Result
from pdlab.results.metrics import Scalar as Scalar
from pdlab.results.metrics import flat_figures as flat_figures
from pdlab.sim import simulate
from pdlab.workload.base import Workload
from pdlab.workload.spec import build as build_workload

WorkloadKey = tuple[str, int, str]
MOST_ATTEMPTS = 2
MOST_JOBS = 1024
_PATIENCE_S = 5.0  # for a process that is to end


def summary_figures(result: Result) -> Mapping[str, Scalar]:
    """The single figures of a run's summary."""
    return flat_figures(result.summary)


@dataclass(frozen=True, slots=True)
class SimulationTask:
    """`key` is the caller's name for it, `experiment` what there is to do, with the `part` of its workload between two shares; `figures`, a
    module's function or what pickles like one, is what is wanted of it. With `trim` its warm-up is left out; without, every request counts,
    and tasks are compared over the same ones."""

    key: str
    experiment: Experiment
    part: tuple[float, float] = (0.0, 1.0)
    figures: Callable[[Result], Mapping[str, Scalar]] = summary_figures
    trim: bool = False

    @property
    def workload_key(self) -> WorkloadKey:
        """Tasks that have it in common have one workload."""
        return (self.experiment.workload.model_dump_json(), self.experiment.seed, str(self.experiment.base_dir))


@dataclass(frozen=True, slots=True)
class TaskResult:
    """The figures by their names, of a summary by their paths (`ttft_s.p99`), or why there are none. `cpu_s` is all that the task took,
    `attempts` how often it was begun."""

    key: str
    figures: Mapping[str, Scalar]
    failure: str = ""
    cpu_s: float = 0.0
    attempts: int = 1


def no_more() -> SimulationTask | None:
    return None


class TaskPool(Protocol):
    def run(self, tasks: Sequence[SimulationTask], more: Callable[[], SimulationTask | None] = no_more) -> Iterator[TaskResult]:
        """Each task's result, once, as they end. `more` is asked for another task wherever a core has none, also after None; its tasks
        name the files that `tasks` name, no others."""
        ...

    def close(self) -> None:
        """Whoever is still at work stops."""
        ...


class WarmSimulator:
    """Does tasks one after the other in one process; the last workload is at hand for the next that asks for it."""

    def __init__(self) -> None:
        self.workload_key: WorkloadKey | None = None
        self.workload: Workload
        self.loads = 0

    def perform(self, task: SimulationTask, attempts: int = 1) -> TaskResult:
        """Whatever happens in a simulation is its result, but the death of the process."""
        started_s = time.process_time()
        figures: Mapping[str, Scalar] = {}
        failure = ""
        try:
            figures = task.figures(self._result(task))
        except UsageError as error:
            failure = str(error)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        return TaskResult(task.key, figures, failure, time.process_time() - started_s, attempts)

    def _result(self, task: SimulationTask) -> Result:
        experiment, key = task.experiment, task.workload_key
        if key != self.workload_key:
            self.workload_key = None
            self.workload = build_workload(experiment.workload, experiment.seed, experiment.base_dir)
            self.workload_key = key
            self.loads += 1
        workload = self.workload if task.part == (0.0, 1.0) else self.workload.part(*task.part)
        return simulate(experiment, workload=workload, trim=task.trim)


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_jobs(jobs: int) -> None:
    """Raises UsageError."""
    if jobs < 1:
        raise UsageError(f"--jobs {jobs}: it takes a process at least; write --jobs 1 or more")
    if jobs > MOST_JOBS:
        raise UsageError(f"--jobs {jobs}: this machine has {usable_cores()} cores; write --jobs {MOST_JOBS} or less")


def how_it_ended(process: BaseProcess) -> str:
    """Of one that has ended, or is about to: in words."""
    process.join(_PATIENCE_S)
    status = process.exitcode
    if status is None or status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    return f"was killed by {name}" + (", as a system without free memory does" if name == "SIGKILL" else "")


class TaskQueue:
    """The tasks that nobody has begun, by their workloads: who has one at hand is given another of it, else one that nobody has."""

    def __init__(self, tasks: Sequence[SimulationTask]) -> None:
        self.waiting: dict[WorkloadKey, deque[tuple[SimulationTask, int]]] = {}
        for task in tasks:
            self.put(task, 1)

    def put(self, task: SimulationTask, attempts: int) -> None:
        self.waiting.setdefault(task.workload_key, deque()).append((task, attempts))

    def take(self, at_hand: WorkloadKey | None, elsewhere: set[WorkloadKey]) -> tuple[SimulationTask, int] | None:
        """A task and which attempt at it this is; `elsewhere` are the workloads that others have at hand."""
        if not self.waiting:
            return None
        key = at_hand
        if key is None or key not in self.waiting:
            untouched = (key for key in self.waiting if key not in elsewhere)
            key = next(untouched, None) or max(self.waiting, key=lambda key: len(self.waiting[key]))
        group = self.waiting[key]
        taken = group.popleft()
        if not group:
            del self.waiting[key]
        return taken


class PoolProcess:
    """One process, what it does, and the workload that it has at hand."""

    def __init__(self, context: multiprocessing.context.ForkServerContext) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.task: SimulationTask | None = None
        self.attempts = 0
        self.at_hand: WorkloadKey | None = None

    def begin(self, task: SimulationTask, attempts: int) -> None:
        self.task, self.attempts, self.at_hand = task, attempts, task.workload_key
        with suppress(OSError):  # it is dead, which is seen where its answer is awaited
            self.pipe.send((task, attempts))

    def stop(self) -> None:
        self.process.kill()  # it has nothing of its own to keep
        self.process.join(_PATIENCE_S)
        self.pipe.close()


class ProcessPool:
    """`jobs` processes of this machine that have all modules loaded before their first task."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([__name__])
        self.members: list[PoolProcess] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, tasks: Sequence[SimulationTask], more: Callable[[], SimulationTask | None] = no_more) -> Iterator[TaskResult]:
        queue = TaskQueue(tasks)
        while busy := self._busy(queue, more):
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                result = self._answer(busy[pipe], queue)
                if result is not None:
                    yield result

    def _busy(self, queue: TaskQueue, more: Callable[[], SimulationTask | None]) -> dict[Connection, PoolProcess]:
        """Who is at work, by pipes, with as many as there is something for."""
        for member in [one for one in self.members if one.task is None]:
            self._occupy(member, queue, more)
        while len(self.members) < self.jobs and (taken := self._taken(None, queue, more)) is not None:
            self.members.append(PoolProcess(self.context))
            self.members[-1].begin(*taken)
        return {member.pipe: member for member in self.members if member.task is not None}

    def _answer(self, member: PoolProcess, queue: TaskQueue) -> TaskResult | None:
        task, attempts = member.task, member.attempts
        assert task is not None, "only who is at work is heard"
        result: TaskResult | None
        try:
            result = member.pipe.recv()
        except (EOFError, OSError):
            reason = how_it_ended(member.process)
            member.stop()
            self.members[self.members.index(member)] = member = PoolProcess(self.context)
            if attempts < MOST_ATTEMPTS:
                queue.put(task, attempts + 1)
                result = None
            else:
                result = TaskResult(task.key, {}, f"its process {reason}, {attempts} times", attempts=attempts)
        member.task = None
        for idle in [one for one in self.members if one.task is None]:
            self._occupy(idle, queue)
        return result

    def _occupy(self, member: PoolProcess, queue: TaskQueue, more: Callable[[], SimulationTask | None] = no_more) -> None:
        taken = self._taken(member, queue, more)
        if taken is not None:
            member.begin(*taken)

    def _taken(
        self, member: PoolProcess | None, queue: TaskQueue, more: Callable[[], SimulationTask | None]
    ) -> tuple[SimulationTask, int] | None:
        """A task, and which attempt at it this is, for a member, or one that is still to begin."""
        elsewhere = {one.at_hand for one in self.members if one is not member and one.task is not None and one.at_hand is not None}
        taken = queue.take(None if member is None else member.at_hand, elsewhere)
        if taken is None and (task := more()) is not None:
            return task, 1
        return taken

    def close(self) -> None:
        for member in self.members:
            member.stop()
        self.members = []


def _work(pipe: Connection) -> None:
    """A process's life: tasks, until whoever gives them has gone. Ctrl-C is for that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    simulator = WarmSimulator()
    while True:
        try:
            task, attempts = pipe.recv()
            pipe.send(simulator.perform(task, attempts))
        except (EOFError, OSError):
            return
