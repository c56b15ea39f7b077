"""Plans, sweeps, tunings, boards, comparisons and uploads against a running lab."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pdlab import Experiment, UsageError, simulate
from pdlab.lab import Client
from tests.support.lab_world import LabProcess, lab, small

ROWS = (
    "id,backend,model_path,system,precision,mode,isl,osl,tp_size,attention_dp_size,moe_tp_size,moe_ep_size,silicon_ttft_ms,silicon_tpot_ms,"
    "concurrency\na,vllm,meta-llama/Llama-3.1-8B-Instruct,h100_sxm,fp8,agg,200,10,2,1,2,1,50,8,4\n"
)
FIRST = """
from pdlab import Policy

class First(Policy):
    def dispatch(self, request, cluster):
        return cluster.prefill[0]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabProcess]:
    with lab(tmp_path_factory.mktemp("lab"), "--jobs", "2", "--allow-code") as running:
        yield running


@pytest.fixture(scope="module")
def client(world: LabProcess) -> Iterator[Client]:
    with Client(world.url) as made:
        yield made


def test_a_sweep_has_a_row_for_each_point_and_a_page(client: Client) -> None:
    job = client.submit(small(), kind="sweeps", seeds=2, grid=["workload.rate=20,40"], tags=["s"]).wait(120)
    points = job.told["summary"]
    assert points["axes"] == ["workload.rate"]
    assert [point["values"] for point in points["points"]] == [[20], [40]]
    assert points["points"][0]["figures"]["ttft_s.p99"]["half"] > 0
    assert "By workload.rate" in job.report()
    assert client.submit(small(), kind="sweeps", seeds=2, grid=["workload.rate=20,40"]).id == job.id
    with pytest.raises(UsageError, match=r"--grid workload.rat=1"):
        client.submit(small(), kind="sweeps", grid=["workload.rat=1"])
    with pytest.raises(UsageError, match=r"gird: unknown key; nearest is grid"):
        client.submit(small(), kind="sweeps", gird=["workload.rate=1"])


@pytest.mark.slow
def test_a_plan_ranks_deployments_and_each_runs_as_an_experiment(client: Client) -> None:
    asked = small(workload={"source": "synthetic", "requests": 100, "rate": 1.0, "prompt": 512, "output": 16}, plan={"tp": [1]})
    job = client.submit(asked, kind="plans", gpus="2", requests=100, seeds=1).wait(240)
    finalists = job.told["summary"]["finalists"]
    assert finalists[0]["rank"] == 1
    choices = client.call("GET", f"/plans/{job.id}/experiments")
    assert len(choices) == len(finalists)
    best = {key: value for key, value in yaml.safe_load(choices[0]).items() if key != "base_dir"}
    assert client.submit({**best, "workload": {**best["workload"], "requests": 50}}).wait(60).state == "done"
    assert "<html" in job.report()
    with pytest.raises(UsageError, match=r"say what there is: --gpus 8"):
        client.submit(asked, kind="plans")


@pytest.mark.slow
def test_a_tuning_judges_what_it_found(client: Client) -> None:
    job = client.submit(small(workload__requests=40, policy="dynamo_kv"), kind="tunings", trials=3, rungs=1, judge=2)
    found = job.wait(240).told["summary"]
    assert found["trials"]["complete"] + found["trials"]["failed"] >= 3
    assert found["verdict"]
    with pytest.raises(UsageError, match=r"policy"):
        client.submit(small(), kind="tunings", policy="nobody")


def test_a_board_scores_rows_that_were_uploaded(client: Client, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text(ROWS)
    client.upload(tmp_path / "mine.csv", "rows")
    job = client.board("mine.csv").wait(120)
    assert job.told["requests"] == 1
    assert "mine" in job.report()
    with pytest.raises(UsageError, match=r"No such file"):
        client.board("other.csv")
    with pytest.raises(UsageError, match=r"outside of the lab's uploads"):
        client.board("../lab.db")


def test_runs_are_compared_with_the_first_by_the_commands_verdict(client: Client) -> None:
    jobs = [client.submit(small(workload__requests=400, seed=3, policy=policy)).wait(60) for policy in ("round_robin", "random")]
    chips = {"instances": [{"role": role, "hardware": "l40s"} for role in ("prefill", "decode")]}
    slow = client.submit(small(workload__requests=400, seed=3, policy="round_robin", cluster=chips)).wait(60)
    found = client.compare([job.id for job in (*jobs, slow)])
    assert len(set(found["names"])) == 3
    assert [pair["id"] for pair in found["pairs"]] == [jobs[1].id, slow.id]
    assert "policy" in found["pairs"][0]["differs"]
    assert any(line["decided"] and "TTFT" in line["words"] for line in found["pairs"][1]["verdict"])
    attained = next(figure for figure in found["figures"] if figure["key"] == "ttft_s.mean")
    assert attained["values"][0] == jobs[0].summary["ttft_s"]["mean"]
    assert len(found["cdf"][slow.id]["ttft_s"]) == len(found["shares"])
    for ids, said in (([slow.id] * 2, "one is there twice"), ([slow.id, "0" * 16], "no experiment has the id")):
        with pytest.raises(UsageError, match=said):
            client.compare(ids)


def test_an_uploaded_trace_is_what_a_simulation_of_it_gives(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{k / 10},{100 + k},8\n" for k in range(50)))
    assert client.upload(path, "trace")["bytes"] == path.stat().st_size
    asked = small(workload={"source": "t.csv"})
    plain = simulate(Experiment.parse({**asked, "base_dir": tmp_path})).summary
    assert client.submit(asked).wait(60).summary["ttft_s"] == plain["ttft_s"]


def test_a_name_is_given_once_and_stays_in_the_folder(client: Client, world: LabProcess) -> None:
    with world.http as http:

        def upload(name: str, content: bytes = b"{}", kind: str = "config") -> int:
            return http.post("/uploads", params={"name": name, "kind": kind}, content=content).status_code

        assert [upload("c.json"), upload("c.json"), upload("c.json", b"[]")] == [201, 200, 409]
        for name in ("../x.json", "/etc/x.json", ".x.json", "a/b.json", "x" * 200 + ".json", "", "x.py", "x\0.json"):
            assert upload(name) == 422, name
        assert upload("x.json", kind="nothing") == 422
        assert {one["name"] for one in http.get("/uploads").json()} >= {"c.json"}
    assert not list(world.folder.rglob(".upload-*"))
    assert not (world.folder / "x.json").exists()


def test_a_policy_is_taken_where_code_is_allowed_and_what_it_does_is_bounded(client: Client, tmp_path: Path) -> None:
    (tmp_path / "first.py").write_text(FIRST)
    (tmp_path / "dies.py").write_text(FIRST.replace("return cluster", "import os; os.kill(os.getpid(), 9); return cluster"))
    (tmp_path / "ends.py").write_text("import os; os._exit(3)")
    for name in ("first", "dies", "ends"):
        client.upload(tmp_path / f"{name}.py", "policy")
    assert client.submit(small(policy="first.py")).wait(60).state == "done"
    with pytest.raises(UsageError, match=r"was killed by SIGKILL, as a system without free memory does, 2 times"):
        client.submit(small(policy="dies.py")).wait(60)
    with pytest.raises(UsageError, match=r"its reader ended with status 3"):
        client.submit(small(policy="ends.py"))


def test_a_policy_is_refused_where_code_is_not_allowed(tmp_path: Path) -> None:
    with lab(tmp_path) as world, world.http as http:
        answer = http.post("/uploads", params={"name": "x.py", "kind": "policy"}, content=b"x")
        assert answer.status_code == 403
        assert "--allow-code" in answer.json()["errors"][0]
        assert http.get("/uploads").json() == []
