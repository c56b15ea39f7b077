"""`pdlab tune`: what is searched, what is judged, and what is kept."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from threading import Barrier
from typing import Any

import optuna
import pytest
import yaml

from pdlab.cli import shared
from pdlab.cli.main import main
from pdlab.core.types import UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.results.statistics import MeanInterval
from pdlab.search.pool import SimulationTask, TaskResult, WarmSimulator, no_more
from pdlab.search.tune import JudgedFigure, Judgement, TuneObjective, TunePlan, Tuning, candidates, judge
from pdlab.search.tune_cases import TuneCases
from pdlab.search.tune_folder import fragment
from pdlab.search.tune_space import TuneSpace
from pdlab.search.tune_study import FinishedTrial, TuneStudy
from pdlab.search.tune_table import best_line

ROOT = Path(__file__).resolve().parents[2]
POLICY = '''
"""The second prefill instance gets `share` of the requests."""
from dataclasses import dataclass
from typing import Annotated
from pdlab import Policy, Range

@dataclass
class Shares(Policy):
    share: Annotated[float, Range(ge=0.0, le=1.0)] = 0.0
    idle: Annotated[int, Range(ge=0, le=5)] = 0

    def dispatch(self, request, cluster):
        if self.idle == 5 and self.share > 0.1:
            1 / 0
        return cluster.prefill[int(request.id * 0.618 % 1 < self.share)]
'''
EXPERIMENT = """
name: shares
seed: 5
model: llama-3.1-8b
workload: {source: synthetic, requests: 60, rate: 60, prompt: 2048, output: 4}
cluster:
  instances: [{role: prefill, count: 2, hardware: h100-sxm}, {role: decode, hardware: h100-sxm}]
policy: shares.py
slo: {ttft_s: 0.16, tpot_s: 0.05}
"""


class HerePool:
    """Simulates in this process. Ends as Ctrl-C does after `most` tasks."""

    def __init__(self, most: int = 1_000_000) -> None:
        self.simulator, self.most, self.done = WarmSimulator(), most, list[SimulationTask]()

    def run(self, tasks: Sequence[SimulationTask], more: Callable[[], SimulationTask | None] = no_more) -> Iterator[TaskResult]:
        waiting = list(tasks)
        while waiting or (task := more()) is not None:
            if len(self.done) == self.most:
                raise KeyboardInterrupt
            self.done.append(waiting.pop(0) if waiting else task)
            yield self.simulator.perform(self.done[-1])

    def close(self) -> None:
        pass


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shared.out, "_width", 140)
    (tmp_path / "shares.py").write_text(POLICY)
    (tmp_path / "shares.yaml").write_text(EXPERIMENT)
    return tmp_path


def plan_of(folder: Path, *objectives: str, params: Sequence[str] = ("share",), **changes: Any) -> TunePlan:
    experiment = Experiment.load(folder / "shares.yaml").with_(**changes)
    space = TuneSpace.read("shares.py", params, folder)
    cases = TuneCases.of(experiment, 4, 4, 0.4, 3 if len(objectives) < 2 else 1)
    return TunePlan(experiment, space, TuneObjective.read(objectives or ["slo_attainment"]), cases, space.untuned(experiment))


def study_of(plan: TunePlan, url: str = "sqlite://", name: str = "s") -> TuneStudy:
    return TuneStudy.open(url, name, plan.space, [one.better for one in plan.objectives], plan.manifest, plan.untuned, plan.experiment.seed)


class Run:
    """One call of the command, in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        with pytest.raises(SystemExit) as ended:
            main(("tune", "shares.yaml", "--jobs", "1", *arguments))
        self.status = ended.value.code or 0
        self.out, self.err = capsys.readouterr()


def test_a_search_finds_what_is_better_and_the_judge_says_so(here: Path) -> None:
    plan = plan_of(here)
    study, pool = study_of(plan), HerePool()
    Tuning(plan, study, 16).run(pool)
    counts = study.counts
    assert (counts.over, counts.failed) == (16, 0)
    assert counts.pruned > 3
    assert len(pool.done) < 16 * 4, "what is pruned is not simulated to the end"
    assert {task.experiment.seed for task in pool.done} == {5, 6, 7, 8}
    (best,) = candidates(plan, study)
    assert 0.2 < best.parameters["share"] < 0.8
    (found,) = judge(plan, [best], judges := HerePool())
    assert {task.experiment.seed for task in judges.done} == {9, 10, 11, 12}
    assert found.verdict == "better"
    (figure,) = found.figures
    assert figure.difference.mean > (figure.difference.half or 0.0) > 0
    assert figure.tuned.mean - figure.untuned.mean == pytest.approx(figure.difference.mean)


def test_in_one_process_a_seed_gives_the_same_trials(here: Path) -> None:
    def shares(seed: int) -> list[float]:
        plan = plan_of(here, seed=seed)
        study = study_of(plan)
        Tuning(plan, study, 6).run(HerePool())
        return [trial.params["share"] for trial in study.study.get_trials()]

    assert shares(5) == shares(5) != shares(6)


def test_the_fragment_is_a_policy_that_runs(here: Path) -> None:
    plan = plan_of(here)
    study = study_of(plan)
    one = Judgement(FinishedTrial(3, {"share": 0.5}, (0.9,)), (figure_of(0.2, 0.1),))
    text = fragment(plan, study, one)
    assert "# slo_attainment: +20 ±10 % against the untuned, better" in text
    assert yaml.safe_load(text) == {"policy": {"name": "shares.py", "share": 0.5}}
    assert plan.experiment.with_(yaml.safe_load(text)).policy == {"name": "shares.py", "share": 0.5}


def test_the_untuned_is_tried_first_and_where_nothing_is_better_it_is_kept(here: Path) -> None:
    plan = plan_of(here, slo={"ttft_s": 10.0, "tpot_s": 10.0})
    study = study_of(plan)
    Tuning(plan, study, 3).run(HerePool())
    assert study.best is not None
    assert (study.best.number, study.best.parameters) == (0, {"share": 0.0})
    assert candidates(plan, study) == []
    assert best_line(plan, []) == "nothing better than the untuned was found: keep it"


def test_a_trace_is_tuned_on_its_first_part_and_judged_on_its_last(here: Path) -> None:
    rows = "".join(f"{k / 60},2048,4\n" for k in range(100))
    (here / "t.csv").write_text(f"arrival_s,prompt_tokens,output_tokens\n{rows}")
    experiment = Experiment.load(here / "shares.yaml", ["workload={source: t.csv}"])
    space = TuneSpace.read("shares.py", ["share"], here)
    plan = TunePlan(experiment, space, TuneObjective.read(["ttft_s.mean"]), TuneCases.of(experiment, None, 5, 0.4, 2), {"share": 0.0})
    study, pool = study_of(plan), HerePool()
    Tuning(plan, study, 4).run(pool)
    assert {task.part for task in pool.done} == {(0.0, 0.3), (0.0, 0.6)}
    (found,) = judge(plan, [FinishedTrial(1, {"share": 0.5}, (0.1,))], judges := HerePool())
    assert [task.part for task in judges.done] == [(0.6, 1.0)] * 2
    assert found.verdict == "better"
    assert found.figures[0].difference.half is not None


def test_two_objectives_have_a_front_and_no_pruning(here: Path) -> None:
    plan = plan_of(here, "ttft_s.mean", "queue_s.max")
    study = study_of(plan)
    Tuning(plan, study, 8).run(HerePool())
    assert (study.counts.complete, study.counts.pruned) == (8, 0)
    front = study.front
    assert front
    assert all(a.values[0] < b.values[0] and a.values[1] > b.values[1] for a, b in pairwise(front))


def figure_of(mean: float, half: float, name: str = "slo_attainment") -> JudgedFigure:
    return JudgedFigure(TuneObjective(name), MeanInterval(0.5, 0.1), MeanInterval(0.5 + mean, 0.1), MeanInterval(mean, half))


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [
        ((figure_of(0.2, 0.1),), "better"),
        ((figure_of(0.1, 0.2),), "undecided"),
        ((figure_of(0.0, 0.0),), "undecided"),
        ((figure_of(-0.2, 0.1),), "worse"),
        ((figure_of(0.2, 0.1, "ttft_s.p99"),), "worse"),
        ((figure_of(-0.2, 0.1, "ttft_s.p99"), figure_of(0.1, 0.2)), "better"),
        ((figure_of(0.2, 0.1), figure_of(0.2, 0.1, "ttft_s.p99")), "better in one, worse in the other"),
        ((figure_of(-0.2, 0.1), figure_of(0.1, 0.2, "ttft_s.p99")), "worse"),
    ],
)
def test_a_verdict_needs_a_difference_outside_its_interval(here: Path, figures: tuple[JudgedFigure, ...], verdict: str) -> None:
    one = Judgement(FinishedTrial(1, {"share": 0.5}, (0.5,) * len(figures)), figures)
    assert one.verdict == verdict
    line = best_line(plan_of(here), [one])
    assert line.startswith("better than the untuned on 4 seeds") is (verdict == "better")
    assert ("worse than the untuned" in line) is (verdict == "worse")


def test_a_trial_that_fails_is_counted_and_says_why(here: Path) -> None:
    plan = plan_of(here, params=["idle", "share=0.2..0.9"])
    study = study_of(plan)
    study.study.enqueue_trial({"idle": 5, "share": 0.5})
    Tuning(plan, study, 3).run(HerePool())
    assert (study.counts.over, study.counts.failed) == (3, 1)
    assert "ZeroDivisionError" in study.failure


def test_what_is_interrupted_goes_on_and_counts_what_is_there(here: Path) -> None:
    plan, url = plan_of(here), f"sqlite:///{here / 'study.db'}"
    study = study_of(plan, url)
    with pytest.raises(KeyboardInterrupt):
        Tuning(plan, study, 6).run(HerePool(most=9))
    over = study.counts.over
    assert 0 < over < 6
    again = study_of(plan, url)
    assert again.counts == study.counts
    assert again.begun == over, "nobody is at work any more"
    ended: list[None] = []
    Tuning(plan, again, 6, lambda: ended.append(None)).run(HerePool())
    assert (again.counts.over, len(ended)) == (6, 6 - over)
    Tuning(plan, again, 6).run(nothing := HerePool())
    assert nothing.done == []
    shares = [trial.params["share"] for trial in again.study.get_trials() if trial.state.is_finished()]
    assert len(set(shares)) == len(shares), "a second start draws other numbers"


def test_trials_of_a_process_that_was_killed_are_begun_anew(here: Path) -> None:
    plan, url = plan_of(here), f"sqlite:///{here / 'study.db'}"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    trial, _ = study_of(plan, url).ask()
    alive, _ = study_of(plan, url).ask()
    host = str(alive.user_attrs["worker"]).rpartition(":")[0]
    trial.set_user_attr("worker", f"{host}:{gone.pid}")
    assert study_of(plan, url).begun == 1, "this process' own is under way"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"slo.ttft_s": 0.2}, "its study s is of another experiment (slo.ttft_s is 0.16 there, 0.2 here); give another --study, or"),
        ({"seed": 6}, "its study s is of another experiment (seed is 5 there, 6 here)"),
    ],
)
def test_a_study_of_another_experiment_is_refused(here: Path, changes: dict[str, Any], line: str) -> None:
    url = f"sqlite:///{here / 'study.db'}"
    study_of(plan_of(here), url)
    with pytest.raises(UsageError) as raised:
        study_of(plan_of(here, **changes), url)
    assert str(raised.value).startswith(f"{url}: {line}")
    with pytest.raises(UsageError, match=r"of another experiment \(objective\.0 is"):
        study_of(plan_of(here, "ttft_s.p50"), url)
    with pytest.raises(UsageError, match=r"of another experiment \(params\.share\.0 is 0\.0 there, 0\.1 here\)"):
        study_of(plan_of(here, params=["share=0.1..1"]), url)
    study_of(plan_of(here, **changes), url, "another")
    (here / "shares.py").write_text(POLICY.replace("0.618", "0.7"))
    with pytest.raises(UsageError, match=r"of another experiment \(the policy, a file that is read, or pdlab was changed"):
        study_of(plan_of(here), url)


def test_those_who_start_at_once_share_one_study(here: Path) -> None:
    plan, url, together = plan_of(here), f"sqlite:///{here / 'study.db'}", Barrier(6)

    def start(_: int) -> TuneStudy:
        together.wait()
        return study_of(plan, url)

    with ThreadPoolExecutor(6) as starters:
        assert {study.name for study in starters.map(start, range(6))} == {"s"}


def test_a_study_that_is_none_of_ours_is_refused(here: Path) -> None:
    url = f"sqlite:///{here / 'study.db'}"
    optuna.create_study(storage=url, study_name="s")
    with pytest.raises(UsageError, match="its study s is none of pdlab tune's; give another --study"):
        study_of(plan_of(here), url)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("nonsense", "Could not parse SQLAlchemy URL"),
        ("nosuch://host/x", "Can't load plugin"),
        ("sqlite:////nowhere/at/all.db", "unable to open database file"),
        ("sqlite:///shares.yaml", "file is not a database"),
        ("oracle://host/x", "its driver is not installed; pip install "),
    ],
)
def test_a_database_that_cannot_be_had_is_one_line(here: Path, url: str, reason: str) -> None:
    with pytest.raises(UsageError) as raised:
        study_of(plan_of(here), url)
    assert str(raised.value).startswith(f"--storage {url}: ")
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--trials", "0"), "--trials 0: write 1 or more"),
        (("--jobs", "0"), "--jobs 0: it takes a process at least"),
        (("--objective", "ttft_s.p98"), "--objective ttft_s.p98: unknown (did you mean ttft_s.p9"),
        (
            ("--objective", "slo_attainment", "--objective", "slo_attainment"),
            "--objective slo_attainment, slo_attainment: give one, or two",
        ),
        (("--policy", "sharess.py"), "policy 'sharess.py': there is no file"),
        (("--params", "shar"), "--params shar: policy shares.py has no parameter 'shar' (did you mean share?); it has share, idle"),
        (("--out", "full"), "full: has something else than a tuning; give another directory with --out"),
        (("--out", "shares.py"), "shares.py: cannot write there"),
    ],
)
def test_bad_input_is_one_line(here: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], line: str) -> None:
    (here / "full").mkdir()
    (here / "full" / "thing").write_text("")
    run = Run(capsys, *arguments)
    assert run.status == 2
    assert run.err.startswith(f"error: {line}")
    assert run.err.count("\n") == 1
    assert not (here / "out").exists()


def test_without_optuna_there_is_a_line(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("pdlab.search.tune", "pdlab.cli.tune"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optuna", None)
    run = Run(capsys)
    assert (run.status, run.err) == (2, "error: pdlab tune needs optuna: in a checkout of pdlab, pip install -e '.[tune]'\n")


def test_the_command_from_end_to_end(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--params", "share", "--trials", "8", "--seeds", "2", "--judge", "3", "--objective", "ttft_s.mean")
    run = Run(capsys, *arguments)
    assert run.status == 0, run.err
    for words in ("untuned", "tuned", "ttft_s.mean", "difference", "better", "better than the untuned on 3 seeds that tuning never saw"):
        assert words in run.out
    folder = here / "out" / "shares-shares-tune"
    assert {file.name for file in folder.iterdir()} == {"study.db", "tune.json", "policy.yaml"}
    found = json.loads((folder / "tune.json").read_text())
    assert found["trials"]["complete"] + found["trials"]["pruned"] == 8
    assert found["judged"][0]["figures"]["ttft_s.mean"]["verdict"] == "better"
    assert yaml.safe_load((folder / "policy.yaml").read_text())["policy"]["share"] == found["judged"][0]["parameters"]["share"]
    before = (folder / "policy.yaml").read_bytes()
    assert Run(capsys, *arguments, "--quiet").status == 0
    assert (folder / "policy.yaml").read_bytes() == before


def test_ctrl_c_keeps_the_trials(here: Path) -> None:
    argv = [sys.executable, "-m", "pdlab", "tune", "shares.yaml", "--trials", "5000", "--jobs", "1", "--params", "share"]
    process = subprocess.Popen(argv, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    database = here / "out" / "shares-shares-tune" / "study.db"
    until = time.monotonic() + 60
    while over(database) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "of 5,000 trials: the same command goes on" in err
    assert "Traceback" not in err
    states = [trial.state for trial in optuna.load_study(storage=f"sqlite:///{database}", study_name="shares-shares").get_trials()]
    assert optuna.trial.TrialState.RUNNING not in states


def over(database: Path) -> int:
    """Trials that are over, read beside the process that writes, which alone makes the tables."""
    if not database.exists():
        return 0
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        try:
            return int(connection.execute("select count(*) from trials where state in ('COMPLETE', 'PRUNED', 'FAIL')").fetchone()[0])
        except sqlite3.OperationalError:  # they are being made
            return 0
