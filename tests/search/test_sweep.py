"""`pdlab sweep` as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from pdlab.cli import shared
from pdlab.cli.main import main
from pdlab.experiment.experiment import Experiment
from pdlab.search.grid import Grid
from pdlab.search.sweep import PlannedRun, PointOutcome, Sweep, plan_sweep
from pdlab.search.sweep_page import axis_picture
from pdlab.search.sweep_store import SweepStore
from pdlab.search.sweep_table import SHOWN, best_cells, point_cells

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = str(ROOT / "experiments" / "quickstart.yaml")
SMALL = ("--set", "workload.requests=40", "--jobs", "2")
FOUR = ("sweep", QUICKSTART, *SMALL, "--grid", "workload.rate=4,8", "--seeds", "2")


class Run:
    """One call of the command, in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        self.status = ended.value.code or 0
        self.out, self.err = capsys.readouterr()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(shared.out, "_width", 140)  # whatever it took for its own where it was made
    return tmp_path


def journal(folder: Path) -> list[str]:
    return [json.loads(line)["run"] for line in (folder / "runs.jsonl").read_text().splitlines()]


def test_a_sweep_ends_with_a_table_a_page_and_a_tidy_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, *FOUR, "--grid", "policy=random,{dispatch: prefix_aware, handoff: least_kv}")
    assert run.status == 0
    for word in ("rate", "policy", "attained", "goodput", "TTFT p99", "TPOT p50", "±", "95 % interval over 2 seeds"):
        assert word in run.out
    folder = here / "out" / "quickstart-sweep"
    assert {file.name for file in folder.iterdir()} == {"sweep.json", "runs.jsonl", "sweep.parquet", "sweep.html"}
    table = pd.read_parquet(folder / "sweep.parquet")
    assert len(table) == 8
    assert list(table.columns[:5]) == ["workload.rate", "policy", "seed", "experiment_hash", "failure"]
    assert sorted(set(table["workload.rate"])) == [4, 8]
    assert set(table["policy"]) == {"random", "{dispatch: prefix_aware, handoff: least_kv}"}
    assert set(table["seed"]) == {7, 8}
    assert table["experiment_hash"].is_unique
    assert (table["requests"] == 40).all()
    assert (table["ttft_s.p99"] > 0).all()
    assert table["failure"].isna().all()
    page = (folder / "sweep.html").read_text()
    assert page.count("<figure") == 2
    for words in ("By workload.rate", "By policy", "prefix_aware"):
        assert words in page


def test_a_second_start_computes_what_is_missing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Run(capsys, *FOUR).status == 0
    folder = here / "out" / "quickstart-sweep"
    first = journal(folder)
    assert len(first) == 4
    assert Run(capsys, *FOUR).status == 0
    assert journal(folder) == first
    wider = Run(capsys, "sweep", QUICKSTART, *SMALL, "--grid", "workload.rate=4,8,16", "--seeds", "3", "--grid", "policy=random")
    assert wider.status == 0
    assert journal(folder)[:4] == first
    assert len(journal(folder)) == 4 + 9
    more = Run(capsys, *FOUR[:-2], "--seeds", "3")
    assert more.status == 0
    assert len(journal(folder)) == len(set(journal(folder))) == 4 + 9 + 2
    assert len(pd.read_parquet(folder / "sweep.parquet")) == 6


def test_a_line_that_was_cut_off_is_a_run_that_is_missing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(capsys, *FOUR)
    file = here / "out" / "quickstart-sweep" / "runs.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    assert Run(capsys, *FOUR).status == 0
    assert sorted(journal(file.parent)) == sorted(json.loads(line)["run"] for line in whole.splitlines())


def test_a_changed_policy_is_another_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = here / "mine.py"
    text = "from pdlab import Policy\n\nclass Mine(Policy):\n    def dispatch(self, request, cluster):\n        return cluster.prefill[0]\n"
    policy.write_text(text)
    arguments = (*FOUR, "--set", f"policy={policy}", "--out", "there")
    assert Run(capsys, *arguments).status == 0
    policy.write_text(text.replace("[0]", "[1]"))
    assert Run(capsys, *arguments).status == 0
    assert len(set(journal(here / "there"))) == 8


def test_a_run_that_fails_is_said_and_tried_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "from pdlab import Policy\n\nclass Bad(Policy):\n    def dispatch(self, request, cluster):\n        1 / 0\n"
    (here / "bad.py").write_text(text)
    arguments = (*FOUR, "--grid", f"policy=random,{here / 'bad.py'}")
    run = Run(capsys, *arguments)
    assert run.status == 1
    assert "4 runs failed: " in run.err
    assert "ZeroDivisionError" in run.err
    assert "failed 2/2" in run.out
    folder = here / "out" / "quickstart-sweep"
    table = pd.read_parquet(folder / "sweep.parquet")
    assert len(table) == 8
    assert table["failure"].notna().sum() == 4
    assert len(journal(folder)) == 4
    assert Run(capsys, *arguments).status == 1
    assert len(journal(folder)) == 4


def test_ctrl_c_keeps_what_is_there(here: Path) -> None:
    argv = [sys.executable, "-m", "pdlab", "sweep", QUICKSTART, "--grid", "workload.rate=4,8,16,32", "--seeds", "50", "--jobs", "2"]
    process = subprocess.Popen(argv, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    file = here / "out" / "quickstart-sweep" / "runs.jsonl"
    until = time.monotonic() + 60
    while not (file.exists() and file.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "runs are missing: the same command goes on" in err
    assert "Traceback" not in err
    assert "missing 50/50" in out
    done = journal(file.parent)
    assert 3 <= len(done) < 200
    assert len(pd.read_parquet(file.parent / "sweep.parquet")) == len(done)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--set", "slo.ttft_s=2"), "there: has a sweep of another experiment (slo.ttft_s is 1.0 there, 2.0 here); give another"),
        (("--set", "faults=[{at_s: 1, drain: decode-0}]"), "there: has a sweep of another experiment (faults"),
    ],
)
def test_a_folder_of_another_experiment_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], line: str
) -> None:
    assert Run(capsys, *FOUR, "--out", "there").status == 0
    before = {file.name: file.read_bytes() for file in (here / "there").iterdir()}
    run = Run(capsys, *FOUR, "--out", "there", *arguments)
    assert run.status == 2
    assert run.err.startswith(f"error: {line}")
    assert run.err.count("\n") == 1
    assert {file.name: file.read_bytes() for file in (here / "there").iterdir()} == before


def test_a_folder_of_something_else_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "there").mkdir()
    (here / "there" / "summary.json").write_text("{}")
    run = Run(capsys, *FOUR, "--out", "there")
    assert (run.status, run.err) == (2, "error: there: has something else than a sweep; give another directory with --out\n")
    (here / "file").write_text("")
    run = Run(capsys, *FOUR, "--out", "file")
    assert run.status == 2
    assert run.err.startswith("error: file: cannot write there")


def test_two_sweeps_do_not_write_to_one_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = Experiment.load(QUICKSTART, ["workload.requests=40"])
    store = SweepStore.open(here / "there", base.resolved(), {}, (7,))
    run = Run(capsys, *FOUR, "--out", "there")
    store.close()
    assert run.status == 2
    assert run.err.startswith("error: there: another pdlab sweep writes there")


def test_no_process_is_too_few(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, "sweep", QUICKSTART, "--grid", "workload.rate=4", "--jobs", "0")
    assert (run.status, run.err) == (2, "error: --jobs 0: it takes a process at least; write --jobs 1 or more\n")


def of_figures(*by_point: list[float]) -> tuple[Sweep, list[PointOutcome]]:
    """A sweep of rates, each point with these TTFT p99 by seed."""
    values = ",".join(str(8 + k) for k in range(len(by_point)))
    sweep = plan_sweep(Experiment.load(QUICKSTART), Grid.read([f"workload.rate={values}"]), len(by_point[0]))
    found = [
        PointOutcome(point, {seed: {"ttft_s.p99": value} for seed, value in zip(sweep.seeds, own, strict=True)}, 0, len(own))
        for point, own in zip(sweep.points, by_point, strict=True)
    ]
    return sweep, found


def test_the_best_is_marked_where_its_seeds_agree() -> None:
    """Seeds that differ much among themselves say nothing against a difference that each of them has."""
    column = next(k for k, shown in enumerate(SHOWN, 2) if shown.name == "ttft_s.p99")
    _, paired = of_figures([1.0, 2.0, 3.0, 4.0], [1.1, 2.12, 3.09, 4.1])
    assert [row[column] for row in best_cells(paired)] == [True, False]
    _, undecided = of_figures([1.0, 2.0, 3.0, 4.0], [1.2, 1.9, 3.3, 3.9])
    assert not any(map(any, best_cells(undecided)))
    _, alone = of_figures([1.0], [2.0])
    assert not any(map(any, best_cells(alone))), "one seed decides nothing"


def test_figures_are_worded_with_their_intervals_and_doubts() -> None:
    _, (outcome,) = of_figures([0.100, 0.110, 0.120])
    assert "110 ±25 ms" in point_cells(outcome)
    seeds = {7: {"overloaded": True}, 8: {"overloaded": False, "partial": True}, 9: {"overloaded": True}}
    assert PointOutcome(outcome.point, seeds, 1, 5).marks == ["overloaded 2/5", "partial 1/5", "failed 1/5", "missing 1/5"]


def test_a_picture_has_a_line_for_each_combination_of_the_other_axes() -> None:
    base = Experiment.load(QUICKSTART)
    for others, lines in ((2, 2), (9, 10)):
        values = ",".join(str(k + 1) for k in range(others))
        sweep = plan_sweep(base, Grid.read(["workload.rate=4,8", f"engine.max_seqs={values}"]), 2)
        outcomes = [PointOutcome(point, {7: {"ttft_s.p99": 0.1}, 8: {"ttft_s.p99": 0.2}}, 0, 2) for point in sweep.points]
        panel = axis_picture(sweep, outcomes, 0).axes[2]
        assert panel.get_title(loc="left") == "TTFT p99"
        drawn = [line for line in panel.get_lines() if len(line.get_xdata()) == 2 and line.get_linestyle() != "None"]
        assert len(drawn) == lines, "of more than there are colours, the mean besides"


def test_a_planned_run_is_its_point_with_its_seed() -> None:
    sweep = plan_sweep(Experiment.load(QUICKSTART), Grid.read(["workload.rate=4,8"]), 2)
    assert all(isinstance(run, PlannedRun) and run.experiment.seed == run.seed for run in sweep.runs)
    assert [run.experiment.workload.rate for run in sweep.runs] == [4, 4, 8, 8]
