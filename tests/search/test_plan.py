"""`pdlab plan` as a user meets it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from pdlab.cli import pools, shared
from pdlab.cli.main import command, main
from pdlab.experiment.experiment import Experiment
from pdlab.search.plan_commands import pdlab_arguments, router_arguments, started, vllm_arguments
from pdlab.search.pool import SimulationTask, TaskResult, WarmSimulator

ROOT = Path(__file__).resolve().parents[2]
FILE = str(ROOT / "experiments" / "which_ratio.yaml")
SMALL = "plan={tp: [4, 8], max_batch_tokens: [2048], max_seqs: [256], transfer: [push], policy: [least_loaded]}"
QUICK = ("plan", FILE, "--set", SMALL, "--seeds", "2", "--requests", "100")
QUICKEST = ("plan", FILE, "--set", f"{SMALL[:-1]}, splits: [mixed]}}", "--seeds", "1", "--requests", "100")


class HerePool:
    """The pool in this process; `stops_after` so many tasks somebody presses Ctrl-C."""

    tasks = 0
    stops_after = 10**9

    def __init__(self, jobs: int) -> None:
        self.simulator = WarmSimulator()

    def run(self, tasks: Sequence[SimulationTask]) -> Iterator[TaskResult]:
        for task in tasks:
            if HerePool.tasks >= HerePool.stops_after:
                raise KeyboardInterrupt
            HerePool.tasks += 1
            yield self.simulator.perform(task)

    def close(self) -> None:
        pass


class Run:
    """One call of the command, in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        self.status = ended.value.code or 0
        self.out, self.err = capsys.readouterr()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shared.out, "_width", 140)
    monkeypatch.setattr(pools, "ProcessPool", HerePool)
    monkeypatch.setattr(HerePool, "tasks", 0)
    monkeypatch.setattr(HerePool, "stops_after", 10**9)
    return tmp_path


def test_a_plan_ends_with_a_table_a_page_a_file_and_commands(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, *QUICK, "--gpus", "8")
    assert run.status == 0
    for word in (
        "2M tp4",
        "1P tp4 + 1D tp4",
        "1M tp8",
        "requests/s",
        "$/Mtok",
        "TTFT p99",
        "what binds",
        "±",
        "decode +10 %",
        "vllm serve MODEL",
    ):
        assert word in run.out
    folder = here / "out" / "which_ratio-plan"
    assert {file.name for file in folder.iterdir()} == {"plan.json", "plan.html", "best.yaml", "run.sh", "runs.jsonl"}
    found = json.loads((folder / "plan.json").read_text())["finalists"]
    assert [one["rank"] for one in found] == [1, 2, 3]
    assert found[0]["capacity_rps"] >= found[1]["capacity_rps"] >= found[2]["capacity_rps"] > 0
    assert set(found[0]["capacity_rps_by_seed"]) == {"7", "8"}
    best = Experiment.load(folder / "best.yaml")
    assert best.workload.rate == pytest.approx(0.8 * found[0]["capacity_rps"], abs=1e-3)
    assert best.plan is None and sum(p.parallel.tp for p in best.placements()) == 8
    page = (folder / "plan.html").read_text()
    assert "2M tp4" in page and "http" not in re.sub(r"http://(host-0|registry|www\.w3\.org)|etcd://registry", "", page), (
        "nothing is fetched"
    )
    points = json.loads(re.search(r"POINTS = (\[.*?\]);", page)[1])  # type: ignore[index]
    assert {one["deployment"] for one in points} >= {one["deployment"] for one in found}
    simulated = HerePool.tasks
    again = Run(capsys, *QUICK, "--gpus", "8")
    assert again.status == 0 and HerePool.tasks == simulated, "a second start simulates nothing"
    assert again.out.splitlines()[:8] == run.out.splitlines()[:8]
    other = Run(capsys, *QUICK, "--gpus", "8", "--set", "slo.tpot_s=0.1")
    assert other.status == 2 and "has a plan of another experiment (slo.tpot_s is 0.04 there, 0.1 here)" in other.err


def test_ctrl_c_keeps_what_is_there_and_the_same_command_goes_on(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HerePool, "stops_after", 5)
    run = Run(capsys, *QUICKEST, "--gpus", "8")
    assert run.status == 130 and "5 simulations are kept" in run.err
    assert len((here / "out" / "which_ratio-plan" / "runs.jsonl").read_text().splitlines()) == 5
    monkeypatch.setattr(HerePool, "stops_after", 10**9)
    assert Run(capsys, *QUICKEST, "--gpus", "8").status == 0
    keys = [json.loads(line)["run"] for line in (here / "out" / "which_ratio-plan" / "runs.jsonl").read_text().splitlines()]
    assert len(keys) == len(set(keys)) == HerePool.tasks


def test_the_fewest_accelerators_that_carry_a_rate(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, *QUICKEST, "--rate", "3")
    assert run.status == 0
    assert "4 accelerators carry 3 requests/s" in " ".join(run.out.split())
    found = json.loads((here / "out" / "which_ratio-plan" / "plan.json").read_text())["finalists"]
    assert found[0]["accelerators"] == 4 and found[0]["capacity_rps"] >= 3


def test_one_instance_may_be_away(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, *QUICKEST, "--gpus", "8", "--failures", "1")
    assert run.status == 0 and "one instance of the worst role away" in " ".join(run.out.split())
    assert "2M tp4" in run.out and "1M tp8" not in run.out, "of one instance nothing is left"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "say what there is: --gpus 8"),
        (("--gpus", "0"), "a deployment takes an accelerator at least"),
        (("--gpus", "8", "--failures", "2"), "--failures 2: 0, or 1"),
        (("--gpus", "8", "--seeds", "0"), "--seeds 0"),
        (("--gpus", "8", "--requests", "5"), "--requests 5: fewer than 100"),
        (("--rate", "3", "--objective", "gpu"), "--objective gpu: with --rate"),
        (("--budget", "-1"), "--budget -1: give a number above 0"),
        (("--gpus", "1"), "nothing fits 1 accelerators: "),
        (("--gpus", "2", "--set", "plan.tp=[1]"), "nothing fits 2 accelerators: llama-3.1-70b in bf16 does not fit 1 x h100-sxm"),
        (("--gpus", "8", "--set", "slo.tpot_s=0.001"), "nobody meets the objectives (TTFT 1.00 s, TPOT 1.00 ms): the nearest is"),
        (("--rate", "500", "--gpus", "8"), "no deployment of up to 8 accelerators carries 500 requests/s: the most is"),
        (("--gpus", "8", "--set", "workload.arrival={process: closed, concurrency: 4}", "--set", "workload.rate=null"), "closed loop"),
        (("--gpus", "8", "--set", "plan.tp=[2, 2]"), "a value is there twice"),
        (("--gpus", "8", "--set", "plan.chunks=[2]"), "plan.chunks"),
    ],
)
def test_a_mistake_is_one_line(here: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str) -> None:
    run = Run(capsys, "plan", FILE, *arguments)
    assert run.status == 2 and words in run.err, run.err
    assert len(run.err.splitlines()) == 1 and HerePool.tasks == 0


def test_an_objective_that_nobody_meets_under_load_is_told_with_what_binds(capsys: pytest.CaptureFixture[str]) -> None:
    """Alone nine tenths of the requests meet it; with others beside them, at whatever rate, they do not."""
    run = Run(capsys, *QUICK, "--gpus", "8", "--set", "slo={ttft_s: 0.5, tpot_s: 0.01183}", "--set", "plan.splits=[pd]")
    assert run.status == 2 and "nobody meets the objectives" in run.err and "the nearest is" in run.err
    assert len(run.err.splitlines()) == 1


def parsed(name: str, words: Sequence[str]) -> dict[str, object]:
    return dict(command(name).make_context(name, list(words)).params)


def winner(layout: str) -> Experiment:
    return Experiment.load(FILE, [f"cluster.instances={layout}", "transfer={mode: push, granularity: layer}"])


def test_the_commands_are_pdlabs_own() -> None:
    both = "[{role: prefill, count: 2, hardware: h100-sxm, tp: 2, host: host-0}, {role: decode, hardware: h100-sxm, tp: 4, host: host-0}]"
    best = winner(both)
    instances = started(best)
    assert [(one.placement.name, one.devices, one.vllm_port) for one in instances] == [
        ("prefill-0", "0,1", 8200),
        ("prefill-1", "2,3", 8202),
        ("decode-0", "4,5,6,7", 8204),
    ]
    found = parsed("serve", pdlab_arguments(best, instances[2], FILE, native=False)[1:])
    assert (found["role"], found["engine"], found["upstream"], found["instance_name"]) == (
        "decode",
        "vllm",
        "http://host-0:8204",
        "decode-0",
    )
    assert parsed("serve", pdlab_arguments(best, instances[0], FILE, native=True)[1:])["device"] == "cuda:0"
    assert parsed("serve", router_arguments(FILE)[1:])["role"] == "router"


def test_vllm_is_told_the_winners_settings_by_role() -> None:
    best = winner("[{role: prefill, hardware: h100-sxm, tp: 4}, {role: decode, hardware: h100-sxm, tp: 4}]").with_(
        {"engine": {"max_batch_tokens": 2048, "max_seqs": 64, "prefix_cache": False, "batching": "prefill_first"}}
    )
    words = vllm_arguments(best, started(best)[0])
    pairs = dict(pairwise(words))
    assert (pairs["--tensor-parallel-size"], pairs["--max-num-batched-tokens"], pairs["--max-num-seqs"]) == ("4", "2048", "64")
    assert json.loads(pairs["--kv-transfer-config"])["kv_connector"] == "NixlConnector"
    assert "--no-enable-prefix-caching" in words and "--no-enable-chunked-prefill" in words
    mixed = winner("[{role: mixed, hardware: h100-sxm, tp: 4}]")
    assert "--kv-transfer-config" not in vllm_arguments(mixed, started(mixed)[0])
