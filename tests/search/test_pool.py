"""Simulations in processes: each task ends once, whatever becomes of the processes."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType

from pdlab.experiment.experiment import Experiment
from pdlab.search.pool import ProcessPool, SimulationTask, TaskQueue, WarmSimulator, flat_figures
from pdlab.sim import simulate
from pdlab.sim.world import World

ROOT = Path(__file__).resolve().parents[2]
SAME_RUN = ("run.date", "run.cpu_s", "run.requests_per_cpu_s", "run.peak_rss_bytes")
DIES = """
import os
from pathlib import Path

from pdlab import Policy

class Dies(Policy):
    \"\"\"Its process is killed where `times` deaths are not yet written down.\"\"\"

    def dispatch(self, request, cluster):
        deaths = Path({deaths!r})
        if len(deaths.read_text()) < {times}:
            deaths.write_text(deaths.read_text() + "x")
            os.kill(os.getpid(), 9)
        return cluster.prefill[0]
"""


def small(requests: int = 40, **changes: object) -> Experiment:
    return Experiment.load(ROOT / "experiments" / "quickstart.yaml").with_({"workload.requests": requests, **changes})


def tasks(*experiments: Experiment) -> list[SimulationTask]:
    return [SimulationTask(f"task-{k}", experiment) for k, experiment in enumerate(experiments)]


def dying(folder: Path, times: int) -> Experiment:
    (folder / "deaths").write_text("")
    (folder / "dies.py").write_text(DIES.format(deaths=str(folder / "deaths"), times=times))
    return small(policy=str(folder / "dies.py"))


def test_a_pools_figures_are_those_of_a_simulation_alone() -> None:
    experiments = [small(seed=seed, policy=policy) for policy in ("random", "prefix_aware") for seed in (1, 2, 3)]
    with ProcessPool(2) as pool:
        results = {result.key: result for result in pool.run(tasks(*experiments))}
    assert len(results) == len(experiments)
    for task in tasks(*experiments):
        alone = flat_figures(simulate(task.experiment).summary)
        pooled = results[task.key].figures
        assert {k: v for k, v in pooled.items() if k not in SAME_RUN} == {k: v for k, v in alone.items() if k not in SAME_RUN}


def test_who_has_nothing_asks_for_more_until_all_is_done() -> None:
    """A task comes of a result, as in a search: None says that there is none yet, not that there will be none."""
    made = tasks(small(), small(seed=8), small(seed=9))
    ready, done = [made[1]], []
    with ProcessPool(2) as pool:
        for result in pool.run(made[:1], lambda: ready.pop() if ready else None):
            done.append(result.key)
            if len(done) == 2:
                ready.append(made[2])
    assert sorted(done[:2]) == ["task-0", "task-1"]
    assert done[2:] == ["task-2"]


def test_a_process_that_dies_has_its_task_done_again(tmp_path: Path) -> None:
    with ProcessPool(2) as pool:
        results = list(pool.run(tasks(dying(tmp_path, 1), small(), small(seed=9))))
    assert Counter(result.key for result in results) == {"task-0": 1, "task-1": 1, "task-2": 1}
    assert {result.key: (result.attempts, result.failure) for result in results}["task-0"] == (2, "")
    assert (tmp_path / "deaths").read_text() == "x"


def test_a_task_that_kills_twice_has_failed_and_the_others_go_on(tmp_path: Path) -> None:
    with ProcessPool(1) as pool:
        results = {result.key: result for result in pool.run(tasks(small(), dying(tmp_path, 99), small(seed=9)))}
    assert results["task-1"].failure == "its process was killed by SIGKILL, as a system without free memory does, 2 times"
    assert [results[key].failure for key in ("task-0", "task-2")] == ["", ""]
    assert (tmp_path / "deaths").read_text() == "xx"


def test_who_is_killed_while_idle_costs_nothing(tmp_path: Path) -> None:
    with ProcessPool(1) as pool:
        assert [result.failure for result in pool.run(tasks(small()))] == [""]
        process = pool.members[0].process
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert [result.failure for result in pool.run(tasks(small(), small(seed=9)))] == ["", ""]


def test_a_policys_mistake_is_its_runs_failure(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(
        "from pdlab import Policy\n\nclass Bad(Policy):\n    def dispatch(self, request, cluster):\n        1 / 0\n"
    )
    result = WarmSimulator().perform(tasks(small(policy=str(tmp_path / "bad.py")))[0])
    assert "ZeroDivisionError" in result.failure
    assert result.figures == {}
    assert result.attempts == 1


def test_processes_end_with_their_pool() -> None:
    with ProcessPool(2) as pool:
        running = pool.run(tasks(small(2000), small(2000, seed=1), small(2000, seed=2)))
        next(running)
        processes = [member.process for member in pool.members]
    assert len(processes) == 2
    assert not any(process.is_alive() for process in processes)


def test_a_workload_is_loaded_once_for_all_that_share_it() -> None:
    simulator = WarmSimulator()
    for task in tasks(small(policy="random"), small(policy="round_robin"), small(seed=8), small(seed=8, policy="random")):
        assert simulator.perform(task).failure == ""
    assert simulator.loads == 2


def test_who_has_a_workload_at_hand_gets_its_tasks() -> None:
    one, two, three = (small(seed=seed) for seed in (1, 2, 3))
    made = tasks(one, two, three, one, two, three)
    keys = [task.workload_key for task in made]
    queue = TaskQueue(made)
    assert queue.take(None, set()) == (made[0], 1)
    assert queue.take(None, {keys[0]}) == (made[1], 1)
    assert queue.take(keys[0], {keys[1]}) == (made[3], 1)
    assert queue.take(keys[0], {keys[1]}) == (made[2], 1), "nobody has the third"
    assert queue.take(keys[0], {keys[1], keys[2]}) == (made[4], 1), "all that is left is shared"
    assert queue.take(keys[2], set()) == (made[5], 1)
    assert queue.take(keys[2], set()) is None


def test_a_simulation_is_nine_tenths_of_its_task() -> None:
    """2,000 requests: of all calls of functions, those around `World.run` are a tenth at most."""
    simulator = WarmSimulator()
    task = tasks(small(2000))[0]
    simulator.perform(task)
    calls = Calls(World.run.__code__)
    sys.setprofile(calls)
    try:
        simulator.perform(task)
    finally:
        sys.setprofile(None)
    assert calls.within >= 0.9 * calls.all > 0


class Calls:
    """Counts calls, and those made while one function runs."""

    def __init__(self, function: CodeType) -> None:
        self.function, self.all, self.within, self.runs = function, 0, 0, False

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if event in ("call", "c_call"):
            self.all += 1
            self.within += self.runs
        if frame.f_code is self.function and event in ("call", "return"):
            self.runs = event == "call"
