"""docs/operate before a real Prometheus that scrapes a real cluster: every query of the dashboard, of the alerts and of vLLM's own finds
what the page says it finds. What the alerts need to fire, promtool plays."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from tests.real.launch.test_all import Cluster, complete
from tests.support import prometheus
from tests.support.prometheus import WINDOW, Prometheus
from tests.support.waiting import until

OPERATE = Path(__file__).parents[3] / "docs" / "operate"
BOARD = json.loads((OPERATE / "dashboard.json").read_text())
ALERTS = yaml.safe_load((OPERATE / "alerts.yml").read_text())["groups"][0]["rules"]
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]


def filled(expr: str) -> str:
    """As Grafana fills it in, for all models."""
    return expr.replace("$__rate_interval", WINDOW).replace('=~"$model"', '=~".*"').replace('="$model_name"', '=~".+"')


@pytest.fixture(scope="module")
def watched(observed: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """The cluster, asked all the time, in the eyes of a Prometheus."""
    prometheus.need("prometheus")
    folder = tmp_path_factory.mktemp("watched")
    with (
        prometheus.scraping(folder, observed.url, OPERATE / "alerts.yml") as server,
        ThreadPoolExecutor(1) as pool,
    ):
        until(lambda: len(server.query("up == 1")) == 3)
        asking = True

        def ask() -> None:
            while asking:
                assert complete(observed, "x" * 40).status_code == 200
                time.sleep(0.3)

        asked = pool.submit(ask)
        try:
            until(lambda: server.numbers(f"rate(pdlab:router_handoffs_total[{WINDOW}]) > 0"))
            yield server
        finally:
            asking = False
        asked.result(60)


def test_every_panel_has_data_and_so_has_each_of_its_queries(watched: Prometheus) -> None:
    assert len(PANELS) >= 20
    queries = {(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]}
    left: set[tuple[str, str]] = set()

    def all_found() -> bool:
        left.clear()
        left.update((title, expr) for title, expr in queries if not watched.numbers(filled(expr)))
        return not left

    try:
        until(all_found)
    except AssertionError:
        raise AssertionError(f"without data: {left}") from None


def test_an_instance_counts_once_though_its_router_tells_of_it_too(watched: Prometheus) -> None:
    (running_,) = [panel for panel in PANELS if panel["title"] == "Sequences that are computed"]
    found = watched.query(filled(running_["targets"][0]["expr"]))
    assert sorted((series["metric"]["instance"], series["metric"]["role"]) for series in found) == [
        ("decode-0", "decode"),
        ("prefill-0", "prefill"),
    ]


def test_the_variables_of_the_dashboard_find_the_model(watched: Prometheus) -> None:
    (model,) = [one for one in BOARD["templating"]["list"] if one["name"] == "model"]
    series, label = re.fullmatch(r"label_values\((\S+), (\w+)\)", model["query"]["query"]).groups()  # type: ignore[union-attr]
    assert all(found["metric"][label] for found in watched.query(series))


def test_the_rules_run_and_none_fires_before_a_healthy_cluster(watched: Prometheus) -> None:
    until(lambda: set(watched.rules().values()) == {"ok"} and len(watched.rules()) == len(ALERTS))
    assert watched.query("ALERTS") == []
    for rule in ALERTS:  # what an alert compares is there, but for divisions by a rate of zero
        series = re.findall(r"(?:pdlab|vllm):\w+|\bup\b|process_start_time_seconds", rule["expr"])
        for name in series or ["pdlab:router_log_lines_dropped_total"]:
            assert watched.query(name), f"{rule['alert']}: no {name}"


def test_vllms_own_queries_find_data_where_the_page_says_so(watched: Prometheus) -> None:
    found_by = re.findall(r"^\| [^|]*\| (yes|no) \| `([^`]+)` \|$", (OPERATE / "index.md").read_text(), re.MULTILINE)
    rows = [(query, finds) for finds, query in found_by]
    assert len(rows) == 22

    def found() -> dict[str, str]:
        return {query: "yes" if watched.numbers(filled(query)) else "no" for query, _ in rows}

    until(lambda: found() == dict(rows))


# ---------------------------------------------------------------- alerts that fire

# By alert: the series that make it fire within half an hour, a value a minute, as promtool writes them.
FIRES: dict[str, dict[str, str]] = {
    "PdlabRouterAway": {'up{job="router",instance="r"}': "0x40"},
    "PdlabInstanceAway": {'up{job="instances",instance="decode-0",role="decode"}': "0x40"},
    "PdlabNobodyPrefills": {
        'pdlab:router_instances{role="prefill",draining="false",model_name="m"}': "0x40",
        'pdlab:router_instances{role="mixed",draining="false",model_name="m"}': "0x40",
        'pdlab:router_instances{role="decode",draining="false",model_name="m"}': "1x40",
    },
    "PdlabNobodyDecodes": {
        'pdlab:router_instances{role="prefill",draining="false",model_name="m"}': "1x40",
        'pdlab:router_instances{role="decode",draining="false",model_name="m"}': "0x40",
        'pdlab:router_instances{role="decode",draining="true",model_name="m"}': "1x40",
    },
    "PdlabRequestsFail": {
        'pdlab:router_requests_ended_total{stage="done",model_name="m"}': "0+90x40",
        'pdlab:router_requests_ended_total{stage="failed",model_name="m"}': "0+10x40",
    },
    "PdlabRequestsTurnedAway": {
        'pdlab:router_http_requests_rejected_total{code="429",model_name="m"}': "0+10x40",
        'pdlab:router_requests_ended_total{stage="done",model_name="m"}': "0+90x40",
    },
    "PdlabFirstTokenSlow": {
        'pdlab:router_time_to_first_token_seconds_bucket{le="2.5",model_name="m"}': "0+10x40",
        'pdlab:router_time_to_first_token_seconds_bucket{le="5.0",model_name="m"}': "0+90x40",
        'pdlab:router_time_to_first_token_seconds_bucket{le="+Inf",model_name="m"}': "0+90x40",
    },
    "PdlabTokensSlow": {
        'pdlab:router_request_time_per_output_token_seconds_bucket{le="0.1",model_name="m"}': "0+10x40",
        'pdlab:router_request_time_per_output_token_seconds_bucket{le="0.2",model_name="m"}': "0+90x40",
        'pdlab:router_request_time_per_output_token_seconds_bucket{le="+Inf",model_name="m"}': "0+90x40",
    },
    "PdlabQueueStays": {'vllm:num_requests_waiting{instance="prefill-0",role="prefill"}': "3x40"},
    "PdlabKvNearlyFull": {'vllm:kv_cache_usage_perc{instance="decode-0",role="decode"}': "0.97x40"},
    "PdlabPreemptions": {'vllm:num_preemptions_total{instance="decode-0",role="decode"}': "0+20x40"},
    "PdlabTransfersFail": {
        'pdlab:router_transfer_failures_total{kind="handoff",cause="deadline",model_name="m"}': "0+5x40",
        'pdlab:router_handoffs_total{instance="decode-0",role="decode",model_name="m"}': "0+100x40",
    },
    "PdlabKvExpires": {'vllm:nixl_num_kv_expired_reqs_total{instance="prefill-0"}': "0+1x40"},
    "PdlabLeakedBlocks": {'pdlab:leaked_blocks{instance="decode-0"}': "7x40"},
    "PdlabRestarts": {'process_start_time_seconds{job="instances",instance="decode-0"}': "100+60x40"},
    "PdlabLogLost": {'pdlab:log_lines_dropped_total{instance="decode-0"}': "0+5x40"},
}
# The same series as a healthy cluster has them: nothing fires.
HEALTHY = {
    'up{job="router",instance="r"}': "1x40",
    'up{job="instances",instance="decode-0",role="decode"}': "1x40",
    'pdlab:router_instances{role="prefill",draining="false",model_name="m"}': "0x40",
    'pdlab:router_instances{role="decode",draining="false",model_name="m"}': "0x40",
    'pdlab:router_instances{role="mixed",draining="false",model_name="m"}': "1x40",
    'pdlab:router_requests_ended_total{stage="done",model_name="m"}': "0+1000x40",
    'pdlab:router_requests_ended_total{stage="failed",model_name="m"}': "0+5x40",
    'pdlab:router_http_requests_rejected_total{code="429",model_name="m"}': "0+10x40",
    'pdlab:router_time_to_first_token_seconds_bucket{le="1.0",model_name="m"}': "0+95x40",
    'pdlab:router_time_to_first_token_seconds_bucket{le="+Inf",model_name="m"}': "0+100x40",
    'pdlab:router_request_time_per_output_token_seconds_bucket{le="0.05",model_name="m"}': "0+95x40",
    'pdlab:router_request_time_per_output_token_seconds_bucket{le="+Inf",model_name="m"}': "0+100x40",
    'vllm:num_requests_waiting{instance="prefill-0",role="prefill"}': "5 0 5 5 5 5 5 5 0 5 5 5 5 5 0 5 5 5 5 5 0 5 5 5 5 0 5 5 5 5 5 0 5",
    'vllm:kv_cache_usage_perc{instance="decode-0",role="decode"}': "0.9x40",
    'vllm:num_preemptions_total{instance="decode-0",role="decode"}': "0+1x40",
    'pdlab:router_transfer_failures_total{kind="handoff",cause="deadline",model_name="m"}': "0+0.5x40",
    'pdlab:router_handoffs_total{instance="decode-0",role="decode",model_name="m"}': "0+100x40",
    'vllm:nixl_num_kv_expired_reqs_total{instance="prefill-0"}': "0x40",
    'pdlab:leaked_blocks{instance="decode-0"}': "0x40",
    'process_start_time_seconds{job="instances",instance="decode-0"}': "100x40",
    'pdlab:log_lines_dropped_total{instance="decode-0"}': "0x40",
}


def promtool(folder: Path, tests: list[dict[str, object]]) -> None:
    prometheus.need("promtool")
    (folder / "alerts_test.json").write_text(json.dumps({"rule_files": [str(OPERATE / "alerts.yml")], "tests": tests}))
    run = subprocess.run(["promtool", "test", "rules", str(folder / "alerts_test.json")], capture_output=True, timeout=60, check=False)
    assert run.returncode == 0, (run.stdout + run.stderr).decode()


def played(series: dict[str, str], fires: list[str]) -> dict[str, object]:
    """After half an hour exactly these alerts fire."""
    expected = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in fires]
    expr = 'count by (alertname) (ALERTS{alertstate="firing"})'
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [{"expr": expr, "eval_time": "30m", "exp_samples": expected}],
    }


def test_promtool_finds_nothing_wrong_with_the_rules() -> None:
    prometheus.need("promtool")
    run = subprocess.run(["promtool", "check", "rules", str(OPERATE / "alerts.yml")], capture_output=True, timeout=60, check=False)
    assert run.returncode == 0 and f"{len(ALERTS)} rules found" in run.stdout.decode(), (run.stdout + run.stderr).decode()


def test_each_alert_fires_on_its_trouble_and_on_no_other(tmp_path: Path) -> None:
    assert FIRES.keys() == {rule["alert"] for rule in ALERTS}
    promtool(tmp_path, [played(series, [name]) for name, series in FIRES.items()])


def test_no_alert_fires_before_a_healthy_cluster(tmp_path: Path) -> None:
    promtool(tmp_path, [played(HEALTHY, [])])


def test_the_page_lists_every_alert() -> None:
    page = (OPERATE / "index.md").read_text().split("## Alerts")[1].split("##")[0]
    assert set(re.findall(r"`(Pdlab\w+)`", page)) == {rule["alert"] for rule in ALERTS}
