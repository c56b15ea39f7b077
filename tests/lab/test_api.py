"""The API of experiments against a running lab, through httpx."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import pyarrow as pa
import pytest
import yaml

from pdlab import Experiment, UsageError, simulate
from pdlab.lab import Client
from pdlab.results.run import Run
from tests.support.lab_world import LabProcess, lab, long, small

BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "\n".join(
    f"{chr(98 + k)}: &{chr(98 + k)} [{', '.join([f'*{chr(97 + k)}'] * 9)}]" for k in range(9)
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabProcess]:
    with lab(tmp_path_factory.mktemp("lab"), "--jobs", "2", "--max-queued", "6") as running:
        yield running


@pytest.fixture(scope="module")
def client(world: LabProcess) -> Iterator[Client]:
    with Client(world.url) as made:
        yield made


@pytest.fixture(scope="module")
def done(client: Client) -> str:
    """The id of a small experiment that has run."""
    return client.submit(small(), tags=["first", "both"]).wait(60).id


def lines(answer: httpx.Response) -> str:
    return "\n".join(answer.json()["errors"])


def test_an_experiment_is_submitted_watched_and_its_summary_is_that_of_a_simulation(client: Client, tmp_path: Path) -> None:
    asked = small(seed=5)
    job = client.submit(asked)
    states = [event["state"] for event in job.events()]
    assert states[-1] == "done"
    plain = simulate(Experiment.parse(asked)).summary
    found = job.refresh().summary
    for name in ("slo_attainment", "goodput_rps", "ttft_s", "tpot_s"):
        assert found[name] == plain[name]


def test_what_has_run_is_not_computed_again(client: Client, world: LabProcess, done: str) -> None:
    with world.http as http:
        again = http.post("/experiments", json={"experiment": small(name="another name"), "tags": ["third"]})
        assert (again.status_code, again.json()["id"], again.json()["new"]) == (200, done, False)
        assert again.json()["tags"] == ["both", "first", "third"]
        other = http.post("/experiments", json={"experiment": small(seed=77)})
        assert other.status_code == 201
        assert other.headers["location"].endswith(other.json()["id"])
        assert other.json()["id"] != done
        client.get(other.json()["id"]).wait(60)


def test_a_file_is_sent_as_yaml_with_its_seeds_and_tags(client: Client, world: LabProcess) -> None:
    with world.http as http:
        answer = http.post(
            "/experiments?seeds=2&tag=two&set=seed=3", content=yaml.safe_dump(small()), headers={"content-type": "application/yaml"}
        )
    assert answer.status_code == 201, answer.text
    job = client.get(answer.json()["id"]).wait(60)
    assert set(job.told["seed_figures"]["by_seed"]) == {"3", "4"}
    assert job.told["tags"] == ["two"]
    assert job.told["seed_figures"]["figures"]["ttft_s.p99"]["half"] > 0


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("model: llama-3.1-8b\nworkloads: {source: synthetic}\n", 2, "workloads: unknown key; nearest is workload"),
        ("model: llama-3.1-8b\ncluster:\n  instances:\n    - {rol: prefill}\n", 4, "cluster.instances.0.rol: unknown key; nearest is role"),
        ("model: [\n", 2, "line 2, column 1"),
        (BOMB, None, "aliases written out"),
        ("a: &a [*a]\n", None, "within"),
        ("[" * 5000, None, "nested too deeply"),
    ],
)
def test_mistakes_are_told_as_the_command_tells_them_beside_their_lines(world: LabProcess, text: str, line: int | None, said: str) -> None:
    with world.http as http:
        checked = http.post("/experiments/validate", content=text, headers={"content-type": "application/yaml"})
        refused = http.post("/experiments", content=text, headers={"content-type": "application/yaml"})
    assert (checked.status_code, refused.status_code) == (200, 422)
    found = [one for one in checked.json()["mistakes"] if said in one["text"]]
    assert found, checked.text
    assert found[0]["line"] == line
    assert said in lines(refused)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"workload": {"source": "/etc/passwd"}}, "outside of the lab's uploads"),
        ({"workload": {"source": "../../x.csv"}}, "outside of the lab's uploads"),
        ({"model": "..\\x"}, "outside of the lab's uploads"),
        ({"policy": "mine.py:Mine"}, "--allow-code"),
        ({"policy": {"dispatch": "mine.py"}}, "--allow-code"),
        ({"base_dir": "x"}, "base_dir"),
        ({"policy": "nobody"}, "unknown policy 'nobody'"),
    ],
)
def test_an_experiment_names_nothing_outside_of_the_uploads(world: LabProcess, changes: dict[str, Any], said: str) -> None:
    with world.http as http:
        answer = http.post("/experiments", json={"experiment": {**small(), **changes}})
    assert answer.status_code == 422
    assert said in lines(answer)


@pytest.mark.parametrize(
    ("content", "kind", "status", "said"),
    [
        (b"{", "application/json", 400, "no JSON"),
        (b"\xff", "application/json", 400, "not UTF-8"),
        (b"{}", "text/html", 415, "application/json"),
        (b'{"experiments": {}}', "application/json", 422, "experiments: unknown key; nearest is experiment"),
        (b'{"experiment": {}, "seeds": 0}', "application/json", 422, "model: is missing"),
        (b"x" * ((1 << 20) + 1), "application/yaml", 413, "longer than 1,048,576 bytes"),
    ],
)
def test_a_body_that_is_none_is_refused_in_a_line(world: LabProcess, content: bytes, kind: str, status: int, said: str) -> None:
    with world.http as http:
        answer = http.post("/experiments", content=content, headers={"content-type": kind})
        assert (answer.status_code, said in lines(answer)) == (status, True), answer.text


def test_a_body_without_a_length_is_bounded_too(world: LabProcess) -> None:
    with world.http as http:
        parts = (b"y" * 65536 for _ in range(40))
        answer = http.post("/experiments", content=parts, headers={"content-type": "application/yaml"})
    assert answer.status_code == 413


def test_runs_are_listed_by_tag_policy_model_and_state_in_pages(client: Client, world: LabProcess, done: str) -> None:
    other = client.submit(small(policy="round_robin", seed=9), tags=["both"]).wait(60).id
    assert {row["id"] for row in client.experiments(tag="both")} == {done, other}
    assert [row["id"] for row in client.experiments(tag="both", policy="round_robin")] == [other]
    assert client.experiments(model="nobody") == []
    assert client.experiments(state="failed") == []
    assert [row["id"] for row in client.experiments(text=done[:9])] == [done]
    page = [client.experiments(limit=1, offset=k, sort="submitted_s", descending=False, tag="both")[0]["id"] for k in range(2)]
    assert page == [done, other]
    with pytest.raises(UsageError, match=r"sort 'nam' is not one of .*; nearest is name"):
        client.experiments(sort="nam")
    assert client.call("GET", "/tags")[:2] == ["both", "first"]
    assert client.call("GET", "/jobs")["total"] >= 2
    assert client.call("GET", f"/jobs/{done}")["kind"] == "experiment"


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/plans", '{"experiment": {}, "options": {"gpu": 3}}', "options.gpu: unknown key; nearest is gpus"),
        ("/compare", "x", "the body is no JSON: Expecting value"),
        ("/compare", "[]", "the body is no JSON object; send one, as application/json"),
        ("/compare", '{"ids": ["a"]}', "ids: must have 2 or more, not 1"),
        ("/compare", '{"id": ["a", "b"], "ids": ["a", "b"]}', "id: unknown key; nearest is ids"),
        ("/uploads?name=a/b.csv&kind=trace", "x", "name 'a/b.csv': a name has no folders; take letters"),
        ("/uploads?name=b.csv&kind=trac", "x", "kind: 'trac' is not one of trace, config, profile, rows, policy; nearest is trace"),
    ],
)
def test_a_mistake_is_told_in_the_words_of_the_command(world: LabProcess, path: str, body: str, said: str) -> None:
    with world.http as http:
        told = http.post(path, content=body, headers={"content-type": "application/json"})
    assert told.status_code == 422
    assert told.json()["errors"][0].startswith(said)


def test_requests_come_as_json_arrow_and_parquet(client: Client, world: LabProcess, done: str) -> None:
    whole = client.get(done).requests()
    with world.http as http:
        arrow = http.get(f"/experiments/{done}/requests", headers={"accept": "application/vnd.apache.arrow.stream"})
        page = http.get(f"/experiments/{done}/requests?offset=50&limit=20").json()
        other = http.get(f"/experiments/{done}/requests", headers={"accept": "text/csv"})
        wild = http.get(f"/experiments/{done}/requests", headers={"accept": "text/html, */*;q=0.8"})
    assert (other.status_code, other.json()["errors"][0].partition(":")[0]) == (406, "accept 'text/csv'")
    assert wild.json()["total"] == 60
    assert len(whole) == 60
    with pa.ipc.open_stream(io.BytesIO(arrow.content)) as stream:
        pd.testing.assert_frame_equal(stream.read_pandas(), whole)
    assert (page["total"], len(page["requests"])) == (60, 10)
    assert page["requests"][0]["request_id"] == whole.request_id[50]


def test_a_run_has_a_report_a_trace_figures_and_a_timeline(client: Client, world: LabProcess, done: str) -> None:
    with world.http as http:
        report = http.get(f"/experiments/{done}/report")
        trace = http.get(f"/experiments/{done}/trace")
        figures = http.get(f"/experiments/{done}/figures").json()
        stages = http.get(f"/experiments/{done}/timeline?from_s=0&to_s=1&limit=5").json()
    assert "<h1>small</h1>" in report.text
    assert "sandbox" in report.headers["content-security-policy"]
    assert trace.content[:2] == b"\x1f\x8b"
    ttft = figures["cdf"]["ttft_s"]
    assert len(ttft) == len(figures["shares"])
    assert ttft == sorted(ttft)
    worst = figures["worst"]
    assert worst[0]["times_objective"] == max(one["times_objective"] for one in worst)
    assert set(figures["load"]["instances"]) == {"prefill-0", "decode-0"}
    assert len(stages["request_id"]) == 5
    assert [stage["name"] for stage in stages["stages"]][:2] == ["queued", "prefill"]


def test_what_runs_is_cancelled_and_what_waits_too_and_too_many_are_refused(client: Client, world: LabProcess) -> None:
    running = [client.submit(long(seed=k)) for k in range(2)]
    for job in running:
        event = next(event for event in job.events() if event["progress"].get("figures"))
        assert event["progress"]["total"] == 3_000_000
        assert event["progress"]["figures"]["ttft_p50_s"] > 0
    waiting = [client.submit(long(seed=k)) for k in range(2, 8)]
    with pytest.raises(UsageError, match=r"6 jobs wait already"):
        client.submit(long(seed=99))
    for job in [*waiting, *running]:
        job.cancel()
    assert {list(job.events())[-1]["state"] for job in [*waiting, *running]} == {"cancelled"}
    with pytest.raises(UsageError, match=r"there is nothing to cancel"):
        running[0].cancel()
    with pytest.raises(UsageError, match=r"it was cancelled"):
        running[0].wait(10)
    assert client.submit(small(seed=41)).wait(60).state == "done"


def test_what_fails_says_why(client: Client) -> None:
    failing = client.submit(small(workload={"source": "synthetic", "requests": 100, "rate": 1e-9, "prompt": 8, "output": 8}))
    with pytest.raises(UsageError, match=r"raise workload.rate"):
        failing.wait(60)
    with pytest.raises(UsageError, match=r"is failed, and has no results: workload"):
        client.raw("GET", f"/experiments/{failing.id}/report")


@pytest.mark.parametrize("id", ["0" * 16, "x", "..%2f..%2fetc", "%00", "a" * 5000])
def test_an_id_that_is_none_is_not_found(world: LabProcess, id: str) -> None:
    with world.http as http:
        for path in ("", "/events", "/report", "/requests", "/figures", "/timeline", "/trace"):
            answer = http.get(f"/experiments/{id}{path}")
            assert answer.status_code in (404, 422), (path, answer.text)


def test_the_catalogue_has_what_forms_need(client: Client) -> None:
    policies = {one["name"]: one for one in client.call("GET", "/policies")}
    assert policies["least_loaded"]["decides"]
    assert any(parameter["bounds"] for one in policies.values() for parameter in one["parameters"])
    assert "llama-3.1-8b" in {one["name"] for one in client.call("GET", "/models")}
    assert {"h100-sxm"} <= {one["name"] for one in client.call("GET", "/hardware")}
    assert {"synthetic", "azure-conv-2023"} <= {one["name"] for one in client.call("GET", "/workloads")}


def test_the_documentation_needs_no_network(world: LabProcess) -> None:
    page = httpx.get(f"{world.url}/docs")
    assert "https://" not in page.text
    assert httpx.get(f"{world.url}/static/swagger/swagger-ui-bundle.js").status_code == 200
    paths = httpx.get(f"{world.url}/openapi.json").json()["paths"]
    assert "/api/v1/experiments/{id}/events" in paths
    assert httpx.get(f"{world.url}/healthz").json()["status"] == "ok"


def test_pages_of_other_sites_change_nothing_and_no_other_name_is_answered(world: LabProcess) -> None:
    asked = {"experiment": small(seed=13)}
    with world.http as http:
        for headers in ({"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "http://["}, {"sec-fetch-site": "cross-site"}):
            assert http.post("/experiments", json=asked, headers=headers).status_code == 403
        assert http.get("/experiments", headers={"host": "evil.example"}).status_code == 421
        assert http.post("/experiments/validate", json=asked, headers={"origin": world.url}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "kind", "said"),
    [
        ("POST", "/experiments?seed=5", "application/yaml", "seed: unknown parameter; nearest is seeds"),
        ("POST", "/experiments/validate?tags=x", "application/yaml", "tags: unknown parameter; nearest is tag"),
        ("POST", "/experiments?seeds=5", "application/json", "seeds: goes into the body where that is JSON"),
        ("GET", "/experiments?tags=none", "", "tags: unknown parameter; nearest is tag"),
        ("GET", "/jobs?zzz=2", "", "zzz: unknown parameter; there are state, tag"),
        ("GET", "/models?x=1", "", "x: unknown parameter; there are none"),
    ],
)
def test_a_parameter_that_is_none_is_refused(world: LabProcess, method: str, path: str, kind: str, said: str) -> None:
    asked = small(seed=31)
    body = {"application/json": json.dumps({"experiment": asked}), "application/yaml": yaml.safe_dump(asked)}.get(kind)
    with world.http as http:
        answer = http.request(method, path, content=body, headers={"content-type": kind} if kind else {})
        assert answer.status_code == 422, answer.text
        assert said in lines(answer)


def test_results_lie_where_the_commands_read_them(world: LabProcess, done: str) -> None:
    folder = world.folder / "runs" / done
    assert Run.load(folder).summary["requests"] == 60
    assert json.loads((folder / "summary.json").read_text())["requests"] == 60
