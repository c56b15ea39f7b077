"""Simulations on the machines of a Ray cluster, each a task of its own.

Ray carries this pdlab to its workers, and the files that the experiments name; what both import has to be installed there. A file that is
named by its absolute path is not carried: it lies where all machines see it.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, Self

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, RayError, TaskCancelledError, WorkerCrashedError
from ray.util.queue import Empty, Queue

import pdlab
from pdlab.core.types import UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.search.identity import named_file, texts
from pdlab.search.pool import MOST_ATTEMPTS, SimulationTask, TaskResult, WarmSimulator, no_more

LOCAL = "local"
MOST_MACHINES_LOST = 5  # by one task, until it counts as failed
HEARD_S = 0.5  # between looks at what a run tells
WriteRun = Callable[[Experiment, Path, Callable[[Any], None]], None]
_TASKS_PER_CORE = 2  # under way, so that none waits for the next


@dataclass(slots=True)
class RayTask:
    """`deaths` of the workers that had it, and machines that were `lost` with it."""

    task: SimulationTask
    deaths: int = 0
    lost: int = 0

    @property
    def attempts(self) -> int:
        return 1 + self.deaths + self.lost


class RayPool:
    """`address` is a cluster's, "auto" for the one that this machine belongs to, or "local" for one that ends with the pool. `jobs` bounds
    the tasks under way."""

    def __init__(self, address: str, jobs: int | None = None) -> None:
        self.address, self.jobs = address, jobs

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, tasks: Sequence[SimulationTask], more: Callable[[], SimulationTask | None] = no_more) -> Iterator[TaskResult]:
        """Raises UsageError where no Ray answers."""
        waiting = [RayTask(task) for task in sorted(tasks, key=lambda one: one.workload_key, reverse=True)]
        if not waiting:
            return
        under_way: dict[Any, RayTask] = {}
        with staged(task.experiment for task in tasks) as (folder, depth):
            self._connect(folder)
            simulate_there = ray.remote(max_retries=0, num_cpus=1)(perform)
            while True:
                while len(under_way) < self._most():
                    if not waiting and (task := more()) is not None:
                        waiting.append(RayTask(task))
                    if not waiting:
                        break
                    begun = waiting.pop()
                    under_way[simulate_there.remote(begun.task, begun.attempts, depth)] = begun
                if not under_way:
                    return
                for done in _ended(list(under_way)):
                    one = under_way.pop(done)
                    result: TaskResult | None = _result(done, one)
                    if result is None:
                        waiting.append(one)
                    else:
                        yield result

    def files(self, experiment: Experiment, write: WriteRun, heard: Callable[[Any], None]) -> dict[str, bytes]:
        """What `write`, a module's function, leaves in its folder there, by name; `heard` is given what it tells meanwhile. Raises
        UsageError."""
        one = RayTask(SimulationTask("run", experiment))
        with staged([experiment]) as (folder, depth):
            self._connect(folder)
            told = Queue(actor_options={"num_cpus": 0})
            write_there = ray.remote(max_retries=0, num_cpus=1)(written)
            found: Any = None
            while found is None:
                done = write_there.remote(experiment, write, told, depth)
                while not ray.wait([done], timeout=HEARD_S)[0]:
                    _hear(told, heard)
                found = _result(done, one)
        if isinstance(found, dict):
            return found
        raise UsageError(found.failure if isinstance(found, TaskResult) else str(found))

    def _connect(self, folder: Path) -> None:
        self.close()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        shipped = {"working_dir": str(folder), "py_modules": [str(Path(pdlab.__file__).parent)]}
        own: dict[str, Any] = {"include_dashboard": False} if self.address == LOCAL else {}
        if own:  # Ray gives its workers niceness 15: beside anything else that computes they would stand still
            os.environ.setdefault("RAY_worker_niceness", "0")
        try:
            ray.init(address=self.address, runtime_env=shipped, log_to_driver=False, logging_level=logging.ERROR, **own)
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UsageError(
                f"--ray {self.address}: no Ray answers there ({reason}); start one with ray start --head, or give --ray {LOCAL}"
            ) from None

    def _most(self) -> int:
        resources: dict[str, float] = ray.cluster_resources()
        most = max(1, int(resources.get("CPU", 1)) * _TASKS_PER_CORE)
        return min(self.jobs or most, most)

    def close(self) -> None:
        if ray.is_initialized():
            ray.shutdown()


def perform(task: SimulationTask, attempts: int, depth: int) -> TaskResult:
    """In a worker of Ray, whose folder has the experiment's files."""
    here = Path.cwd().joinpath(*_levels(depth))
    return _simulator().perform(replace(task, experiment=task.experiment.model_copy(update={"base_dir": here})), attempts)


def written(experiment: Experiment, write: WriteRun, told: Queue, depth: int) -> dict[str, bytes] | str:
    """In a worker of Ray: the files, or why there are none."""
    there = experiment.model_copy(update={"base_dir": Path.cwd().joinpath(*_levels(depth))})
    with tempfile.TemporaryDirectory(prefix="pdlab-run-") as folder:
        try:
            write(there, Path(folder), told.put)
        except UsageError as error:
            return str(error)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _hear(told: Queue, heard: Callable[[Any], None]) -> None:
    """What has come; nothing where whoever holds it has died with its machine."""
    with suppress(Empty, RayError):
        while True:
            heard(told.get_nowait())


@cache
def _simulator() -> WarmSimulator:
    """The process' own: Ray gives it one task after the other."""
    return WarmSimulator()


def _ended(under_way: list[Any]) -> list[Any]:
    """One at least."""
    ray.wait(under_way, num_returns=1)
    ended, _ = ray.wait(under_way, num_returns=len(under_way), timeout=0)
    return list(ended)


def _result(done: Any, one: RayTask) -> Any:
    """What came of it, or a failure; None where it is to be done again."""
    try:
        result = ray.get(done)
    except (NodeDiedError, ObjectLostError, TaskCancelledError) as error:
        one.lost += 1
        return _failed(one, error) if one.lost >= MOST_MACHINES_LOST else None
    except WorkerCrashedError as error:
        one.deaths += 1
        return _failed(one, error) if one.deaths >= MOST_ATTEMPTS else None
    except RayError as error:
        return _failed(one, error)
    return result


def _failed(one: RayTask, error: RayError) -> TaskResult:
    reason = str(error).strip().partition("\n")[0]
    return TaskResult(one.task.key, {}, f"{type(error).__name__}: {reason}", attempts=one.deaths + one.lost or 1)


@contextmanager
def staged(experiments: Iterable[Experiment]) -> Iterator[tuple[Path, int]]:
    """A folder with the files that experiments name by relative paths, and how deep in it `base_dir` lies, above which some may be."""
    files: dict[str, Path] = {}
    seen: set[tuple[str, Path]] = set()
    for experiment in experiments:
        base = experiment.base_dir
        for text in texts(experiment.model_dump(mode="json", exclude={"base_dir"}, exclude_none=True)):
            if (text, base) not in seen and (name := named_file(text, base)) is not None and not Path(name).is_absolute():
                files[os.path.normpath(name)] = base / name
            seen.add((text, base))
    depth = max((sum(1 for _ in takewhile("..".__eq__, Path(name).parts)) for name in files), default=0)
    with tempfile.TemporaryDirectory(prefix="pdlab-sweep-") as folder:
        for name, source in files.items():
            there = Path(os.path.normpath(Path(folder).joinpath(*_levels(depth), name)))
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, there)
        yield Path(folder), depth


def _levels(depth: int) -> list[str]:
    return [f"level-{number}" for number in range(depth)]
