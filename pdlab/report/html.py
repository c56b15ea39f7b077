"""report.html: what a run says of itself as one page; a few lines of it for notebooks.

It is one file that needs nothing else. Its figures are those of the lab's page of a run; without scripts its words and tables are there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from pdlab.report import tables
from pdlab.report.aggregates import aggregates, consecutive
from pdlab.report.page import definition_list, escaped, page, table
from pdlab.report.script import report_script
from pdlab.results.metrics import DEFINITIONS, SPREADS
from pdlab.results.records import Records, Samples
from pdlab.results.units import number, percent, seconds

Summary = Mapping[str, Any]
_HASH_SHOWN = 12  # digits; summary.json has all
CLIENT_POINTS = ("p50", "p99", "max")
CLIENT_WORDS = {
    "sent late": "how long after its arrival was due the client sent a request; TTFT and E2E count from when it was sent",
    "read late": "how late the client, asked every 20 ms, came to what was ready: the error of its timestamps",
}


def run_page(
    summary: Summary, records: Records, samples: Samples, experiment: Mapping[str, Any] | None = None, warnings: Iterable[str] = ()
) -> str:
    """The report of one run. `experiment` is the resolved one, as plain values."""
    name = str((experiment or {}).get("name") or "run")
    found = aggregates(summary, records, samples)
    told = {**found, "slo": summary["slo"], "instances": summary["instances"], "links": summary["links"], "lanes": consecutive(records)}
    body = [
        f"<h1>{escaped(name)}</h1>",
        f"<p class=soft>{escaped(_about(summary))}</p>",
        *(f"<p class=soft>{escaped(line)}</p>" for line in tables.rests_on(summary)),
        *(
            f"<p class=warning>{escaped(line)}</p>"
            for line in dict.fromkeys([*_overload(summary), *_partial(summary), *summary["warnings"], *warnings])
        ),
        _tiles(summary),
        _verdict(summary),
        "<h2>Latency</h2>",
        _latency_table(summary),
        f"<div class=pair>{_figure('ttft')}{_figure('tpot')}</div>",
        "<noscript><p class=warning>The figures are drawn by a script, which this reader does not run.</p></noscript>",
        "<h2>Run</h2>",
        definition_list(tables.figures(summary)),
        *_reasons(summary),
        "<h2>Instances</h2>",
        f"<div id=instances>{_instance_table(summary)}</div>",
        *(("<h2>Links</h2>", f"<div id=links>{_link_table(summary)}</div>") if summary["links"] else ()),
        *(("<h2>The client that measured</h2>", *_client(summary["client"])) if "client" in summary else ()),
        *(("<h2>Load over time</h2>", _figure("load")) if samples.any_load else ()),
        "<h2>Requests through prefill, link and decode</h2>",
        "<p class=soft>Drag to zoom; double click shows all.</p>",
        _figure("lanes"),
        "<h2>The requests furthest from their objectives</h2>",
        f"<div id=worst>{_worst_table(found['worst'])}</div>",
        "<h2>What the words mean</h2>",
        definition_list(DEFINITIONS.items()),
    ]
    if experiment:
        body += ["<h2>Experiment, resolved</h2>", f"<details open><summary>YAML</summary><pre>{escaped(_yaml(experiment))}</pre></details>"]
    return page(name, [*body, *report_script(told)])


def fragment(summary: Summary) -> str:
    """A run in a few lines, for notebooks, which bring their own style."""
    rows = "".join(
        f"<tr><th style='text-align:left'>{escaped(k)}</th><td style='text-align:left'>{escaped(v)}</td></tr>"
        for k, v in tables.figures(summary)
    )
    found = summary["bottleneck"]
    notes = "".join(f"<br><b>{escaped(kind)}</b>: {escaped(evidence)}" for kind, evidence in tables.verdict_notes(summary))
    bottleneck = f"<p><b>bottleneck: {escaped(found['resource'])}</b>: {escaped(found['evidence'])}{notes}</p>"
    over = "".join(f"<p><b>overloaded</b>: {escaped(line)}</p>" for line in tables.overload_lines(summary))
    return f"{over}<table>{rows}</table>{bottleneck}{_latency_table(summary)}"


def _about(summary: Summary) -> str:
    run = summary["run"]
    known = [f"{key} {run[key]}" for key in ("world", "seed", "pdlab", "version") if run.get(key) is not None]
    if (policy := run.get("policy_hash")) is not None:
        known.append(f"policy hash {policy[:_HASH_SHOWN]}")
    count = summary["requests"]
    return ", ".join([f"{count:,} request{'s' if count != 1 else ''} in {seconds(summary['duration_s'])}", *known])


def _overload(summary: Summary) -> list[str]:
    return [f"Overloaded: {line}." for line in tables.overload_lines(summary)]


def _partial(summary: Summary) -> list[str]:
    return [f"Stopped early: {summary['unfinished']:,} requests had not ended and count as misses."] if summary["partial"] else []


def _figure(id: str) -> str:
    return f"<div class=chart id={id}></div>"


def _tiles(summary: Summary) -> str:
    attained = summary["slo_attainment"]
    tone = "" if attained is None else "good" if attained >= 0.9 else "bad"
    tiles = [
        ("SLO attainment", percent(attained), tone),
        ("goodput, req/s", number(summary["goodput_rps"]), ""),
        ("throughput, req/s", number(summary["throughput_rps"]), ""),
        ("output tokens/s", number(summary["output_tokens_per_s"]), ""),
        ("TTFT p99", seconds(summary["ttft_s"]["p99"]), ""),
        ("TPOT p99", seconds(summary["tpot_s"]["p99"]), ""),
    ]
    cells = [f'<div class=tile><b class="{tone}">{escaped(value)}</b><span>{escaped(label)}</span></div>' for label, value, tone in tiles]
    return "<div class=tiles>" + "".join(cells) + "</div>"


def _verdict(summary: Summary) -> str:
    found = summary["bottleneck"]
    tone = " good" if found["resource"] == "none" else ""
    more = "".join(f"<br><b>{escaped(kind)}</b> {escaped(evidence)}" for kind, evidence in tables.verdict_notes(summary))
    return f'<p class="verdict{tone}"><b>Bottleneck: {escaped(found["resource"])}</b><br>{escaped(found["evidence"])}{more}</p>'


def _latency_table(summary: Summary) -> str:
    rows = []
    for label, key in SPREADS:
        objective = summary["slo"].get(key)
        limit = f"≤ {seconds(objective)}" if objective is not None else ""
        rows.append([label, *(seconds(summary[key][point]) for point in tables.POINTS), limit])
    return table(["", *tables.POINTS, "objective"], rows)


def _instance_table(summary: Summary) -> str:
    head = [
        "instance",
        "role",
        "hardware",
        "busy",
        "prefill",
        "decode",
        "KV mean",
        "KV peak",
        "requests",
        "prefill tokens",
        "decode tokens",
    ]
    rows = [
        [
            use["name"],
            use["role"],
            f"{use['accelerators']} x {use['hardware']}" if use["hardware"] else f"{use['accelerators']}",
            *(
                percent(use[key])
                for key in ("busy_fraction", "prefill_busy_fraction", "decode_busy_fraction", "kv_use_mean", "kv_use_peak")
            ),
            *(f"{use[key]:,}" for key in ("requests", "prefill_tokens", "decode_tokens")),
        ]
        for use in summary["instances"]
    ]
    return table(head, rows, text=3)


def _link_table(summary: Summary) -> str:
    return table(["link", "busy", "used", "carried", "capacity", "most transfers at once"], tables.link_rows(summary))


def _worst_table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["request", "times its objective", "status", "TTFT", "TPOT", "E2E"]

    def times(row: Mapping[str, Any]) -> str:
        return "not served" if row["times_objective"] is None else number(row["times_objective"])

    latencies = ("ttft_s", "tpot_s", "e2e_s")
    return table(head, [[str(row["request_id"]), times(row), row["status"], *(seconds(row[key]) for key in latencies)] for row in rows])


def _client(client: Mapping[str, Any]) -> list[str]:
    """What measuring cost, and how far it may be off: of a bench run only."""
    late = (("sent late", "send_late_s"), ("read late", "read_late_s"))
    each = client["tokens_per_chunk"]
    return [
        table(["", *CLIENT_POINTS], [[label, *(seconds(client[key][point]) for point in CLIENT_POINTS)] for label, key in late]),
        definition_list(
            [
                ("CPU", f"{percent(client['cpu_share'])} of a core, {seconds(client['cpu_s'])} in all"),
                ("connections", f"{client['connections']:,}"),
                ("chunks", f"{client['chunks']:,}" + (f" of {number(each)} tokens each" if each is not None else "")),
                *CLIENT_WORDS.items(),
            ]
        ),
    ]


def _reasons(summary: Summary) -> list[str]:
    if not summary["reasons"]:
        return []
    return ["<h2>Not served</h2>", table(["reason", "requests"], [[r, f"{n:,}"] for r, n in summary["reasons"].items()])]


def _yaml(experiment: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(experiment), sort_keys=False, allow_unicode=True, width=110)
