"""The same tasks on a real Ray: nothing is lost or done twice, whatever becomes of its machines."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdlab.cli.main import main
from pdlab.core.types import UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.lab.job import write_run
from pdlab.search.grid import Grid
from pdlab.search.pool import ProcessPool, SimulationTask, TaskPool
from pdlab.search.sweep import plan_sweep, run_sweep
from pdlab.search.sweep_store import SweepStore

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
from ray.cluster_utils import Cluster  # noqa: E402

from pdlab.search.ray_pool import RayPool, staged  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "experiments" / "quickstart.yaml"
OWN_CLOCK = ("run.date", "run.cpu_s", "run.requests_per_cpu_s", "run.peak_rss_bytes")
POLICY = "from pdlab import Policy\n\nclass Mine(Policy):\n    def dispatch(self, request, cluster):\n        {}\n"
SAYS_WHERE = """
from pathlib import Path

import ray

from pdlab import Policy

class Says(Policy):
    \"\"\"Touches a file named by its machine when a run begins.\"\"\"

    def __init__(self):
        self.said = False

    def dispatch(self, request, cluster):
        if not self.said:
            self.said = True
            Path({!r}, ray.get_runtime_context().get_node_id()).touch()
        return cluster.prefill[request.prompt_tokens % 2]
"""

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def machines() -> Iterator[tuple[Any, Any]]:
    """A cluster of two, and the second of them."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster, second
    ray.shutdown()
    cluster.shutdown()


def tasks(base: Experiment, seeds: int) -> list[SimulationTask]:
    return [SimulationTask(str(seed), base.with_(seed=seed)) for seed in range(seeds)]


def folder_of_a_user(tmp_path: Path, statement: str = "return cluster.prefill[0]") -> Experiment:
    """An experiment with a policy beside it, and a trace in a folder above."""
    inner = tmp_path / "study"
    inner.mkdir()
    shutil.copy(QUICKSTART, inner / "one.yaml")
    (inner / "mine.py").write_text(POLICY.format(statement))
    rows = "".join(f"{k / 10},{50 + k},{5 + k % 7}\n" for k in range(60))
    (tmp_path / "t.csv").write_text(f"arrival_s,prompt_tokens,output_tokens\n{rows}")
    return Experiment.load(inner / "one.yaml", ["policy=mine.py:Mine", "workload={source: ../t.csv}"])


def begins(file: Path, within_s: float = 3.0) -> bool:
    """Is it touched from now on?"""
    asked_s = time.time()
    while time.time() < asked_s + within_s:
        if file.exists() and file.stat().st_mtime >= asked_s:
            return True
        time.sleep(0.01)
    return False


def kept(pool: TaskPool, folder: Path, base: Experiment) -> dict[str, dict[str, object]]:
    sweep = plan_sweep(base, Grid.read(["slo.ttft_s=0.5,1"]), 2)
    store = SweepStore.open(folder, base.resolved(), {}, sweep.seeds)
    run_sweep(sweep, store, pool)
    store.close()
    assert not sweep.failures
    return {key: {k: v for k, v in figures.items() if k not in OWN_CLOCK} for key, figures in store.figures.items()}


@pytest.mark.slow
def test_a_machine_that_is_lost_loses_no_run_and_doubles_none(machines: tuple[Any, Any], tmp_path: Path) -> None:
    """It is killed when it has begun a run a moment ago."""
    cluster, second = machines
    (tmp_path / "says.py").write_text(SAYS_WHERE.format(str(tmp_path)))
    asked = tasks(Experiment.load(QUICKSTART, ["workload.requests=8000", f"policy={tmp_path / 'says.py'}"]), 24)
    begun, killed, results = tmp_path / second.node_id, False, []
    with RayPool(cluster.address) as pool:
        for result in pool.run(asked):
            results.append(result)
            if not killed and begins(begun):
                cluster.remove_node(second, allow_graceful=False)
                killed = True
    assert killed
    assert Counter(result.key for result in results) == dict.fromkeys((task.key for task in asked), 1)
    assert [result.failure for result in results if result.failure] == []
    assert max(result.attempts for result in results) == 2, "what the lost machine had was begun again"


@pytest.mark.slow
def test_ray_brings_pdlab_and_the_experiments_files_along(machines: tuple[Any, Any], tmp_path: Path) -> None:
    cluster, _ = machines
    base = folder_of_a_user(tmp_path)
    with ProcessPool(1) as processes:
        alone = kept(processes, tmp_path / "alone", base)
    with RayPool(cluster.address) as pool:
        assert kept(pool, tmp_path / "ray", base) == alone
        assert len(alone) == 4

        @ray.remote
        def where() -> str:
            import pdlab

            return str(pdlab.__file__)

        assert "py_modules" in ray.get(where.remote())


@pytest.mark.slow
def test_a_task_that_kills_its_worker_twice_has_failed(machines: tuple[Any, Any], tmp_path: Path) -> None:
    cluster, _ = machines
    fatal = folder_of_a_user(tmp_path, "import os; os._exit(3)")
    asked = [SimulationTask("fatal", fatal), *tasks(Experiment.load(QUICKSTART, ["workload.requests=40"]), 3)]
    with RayPool(cluster.address) as pool:
        results = {result.key: result for result in pool.run(asked)}
    assert len(results) == 4
    assert results["fatal"].failure.startswith("WorkerCrashedError")
    assert results["fatal"].attempts == 2
    assert not any(results[key].failure for key in "012")


@pytest.mark.slow
def test_the_command_sweeps_over_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--set", "workload.requests=40", "--grid", "workload.rate=4,8", "--seeds", "2", "--out", str(tmp_path / "there")]
    with pytest.raises(SystemExit) as ended:
        main(["sweep", str(QUICKSTART), *options, "--ray", "local"])
    assert not ended.value.code
    assert len((tmp_path / "there" / "runs.jsonl").read_text().splitlines()) == 4
    assert "TTFT p99" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_tunes_over_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--set", "workload.requests=40", "--policy", "conditional", "--trials", "6", "--judge", "2", "--objective", "ttft_s.mean"]
    with pytest.raises(SystemExit) as ended:
        main(["tune", str(QUICKSTART), *options, "--out", str(tmp_path / "there"), "--ray", "local"])
    assert not ended.value.code
    found = json.loads((tmp_path / "there" / "tune.json").read_text())["trials"]
    assert (found["complete"] + found["pruned"], found["failed"]) == (6, 0)


@pytest.mark.slow
def test_a_labs_run_is_made_on_ray_and_its_files_come_back(tmp_path: Path) -> None:
    experiment = Experiment.load(QUICKSTART).with_(**{"workload.requests": 300})
    write_run(experiment, tmp_path, lambda _: None)
    here = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    heard: list[Any] = []
    with RayPool("local") as pool:
        there = pool.files(experiment, write_run, heard.append)
    assert there.keys() == here.keys()
    assert there["figures.json"] == here["figures.json"]
    assert all(news["total"] == 300 for news in heard)


def test_a_ray_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(
        UsageError, match=r"--ray auto: no Ray answers there .*; start one with ray start --head, or give --ray local"
    ) as raised:
        list(RayPool("auto").run(tasks(Experiment.load(QUICKSTART), 1)))
    assert "\n" not in str(raised.value)


def test_files_above_the_experiments_folder_keep_their_place(tmp_path: Path) -> None:
    base = folder_of_a_user(tmp_path)
    with staged([base, Experiment.load(QUICKSTART)]) as (folder, depth):
        there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert (there, depth) == ({"t.csv", "level-0/mine.py"}, 1)
    assert not folder.exists()
