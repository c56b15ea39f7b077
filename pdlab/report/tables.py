"""The terminal's view of a summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pdlab.results.metrics import DEFINITIONS, SPREADS
from pdlab.results.units import number, percent, seconds, size

Summary = Mapping[str, Any]

POINTS = ("mean", "p50", "p90", "p99", "max")
BEST = "★"


def summary_table(summary: Summary, title: str = "", *, explain: bool = False) -> RenderableType:
    """A run in the order of the question: what it rests on, how many met their objectives, what binds, then latencies, instances and links.
    With `explain` also what each word means."""
    parts: list[RenderableType] = [Text.assemble(("overloaded  ", "bold red"), line) for line in overload_lines(summary)]
    parts += [Text.assemble(("rests on  ", "bold"), (line, "dim")) for line in rests_on(summary)]
    parts += [_figures(answers(summary)), Text(""), *verdict_lines(summary), Text(""), _latencies(summary), Text("")]
    parts += [_figures(details(summary)), Text(""), _instances(summary)]
    if summary["links"]:
        parts += [Text(""), _links(summary)]
    if summary["reasons"]:
        parts.append(Text.assemble(("not served  ", "bold"), "; ".join(f"{n:,} x {reason}" for reason, n in summary["reasons"].items())))
    if reading := summary["run"].get("workload"):
        parts.append(Text.assemble(("trace read as  ", "bold"), reading))
    parts += [Text.assemble(("warning  ", "bold yellow"), line) for line in summary["warnings"]]
    if explain:
        parts += [Text(""), definitions()]
    heading = title + (" (partial: stopped early)" if summary["partial"] else "")
    return Panel(Group(*parts), title=heading or None, title_align="left", border_style="dim", padding=(0, 1))


def rests_on(summary: Summary) -> list[str]:
    """What the seconds of a simulation are calibrated on; nothing of what was measured."""
    lines: list[str] = summary["run"].get("rests_on", [])
    return lines


def overload_lines(summary: Summary) -> list[str]:
    """What has to be said before anything else: that the run did not keep up."""
    if not summary.get("overloaded"):
        return []
    window = summary["window"]
    rates = f"{number(window['offered_rps'])} req/s arrived, {number(window['served_rps'])} were served"
    return [f"the queue grew to the end: {rates}. Attainment and goodput depend on the run's length"]


def warm_up_words(summary: Summary) -> str | None:
    """Which requests do not count; None where all do."""
    window = summary.get("window")
    if not window or not window["warm_up_requests"]:
        return None
    words = f"the first {window['warm_up_requests']:,} requests ({seconds(window['warm_up_s'])}) do not count: MSER-5 on TTFT"
    whole = percent(window["slo_attainment_untrimmed"])
    return words if whole == percent(summary["slo_attainment"]) else f"{words}; with them attainment is {whole}"


def verdict_lines(summary: Summary) -> list[Text]:
    """What binds, what more explains the misses, and how much room decode has."""
    return [bottleneck_line(summary), *(Text.assemble((f"{kind}  ", "bold"), evidence) for kind, evidence in verdict_notes(summary))]


def verdict_notes(summary: Summary) -> list[tuple[str, str]]:
    """Beside the bottleneck: the causes of misses, and decode's headroom."""
    found = summary["bottleneck"]
    notes = [(cause["kind"], cause["evidence"]) for cause in found.get("causes", ())]
    headroom = found.get("headroom")
    return [*notes, ("headroom", headroom["evidence"])] if headroom else notes


def bottleneck_line(summary: Summary) -> Text:
    found = summary["bottleneck"]
    colour = "green" if found["resource"] == "none" else "red"
    return Text.assemble(("bottleneck  ", "bold"), (found["resource"], f"bold {colour}"), f": {found['evidence']}")


def _latencies(summary: Summary) -> Table:
    table = plain_table("", *POINTS, "objective")
    for label, key in SPREADS:
        objective = summary["slo"].get(key)
        cells = [seconds(summary[key][point]) for point in POINTS]
        table.add_row(label, *cells, f"≤ {seconds(objective)}" if objective is not None else "")
    return table


def figures(summary: Summary) -> list[tuple[str, str]]:
    """The single figures of a run, worded: (label, value)."""
    return [*answers(summary), *details(summary)]


def answers(summary: Summary) -> list[tuple[str, str]]:
    """Those that the question is about."""
    lost = {k: summary[k] for k in ("failed", "rejected", "unfinished") if summary[k]}
    served = f"{summary['completed']:,} of {summary['requests']:,}" + "".join(f", {n:,} {k}" for k, n in lost.items())
    each = f"TTFT {percent(summary['ttft_attainment'])}, TPOT {percent(summary['tpot_attainment'])}"
    accelerators = number(summary["goodput_rps_per_accelerator"])
    return [
        ("SLO attainment", f"{percent(summary['slo_attainment'])} ({each})"),
        ("goodput", f"{number(summary['goodput_rps'])} req/s, {accelerators} for each of {summary['accelerators']} accelerators"),
        ("throughput", f"{number(summary['throughput_rps'])} req/s, {number(summary['output_tokens_per_s'])} output tokens/s"),
        ("completed", f"{served} in {seconds(summary['duration_s'])}"),
        *([("warm-up", warm_up)] if (warm_up := warm_up_words(summary)) else []),
    ]


def details(summary: Summary) -> list[tuple[str, str]]:
    return [
        ("prefix hits", f"{percent(summary['prefix_hit_rate'])} of prompt tokens"),
        ("KV moved", size(summary["transfer_bytes"])),
        ("retries, preemptions, migrations", f"{summary['retries']:,}, {summary['preemptions']:,}, {summary['migrations']:,}"),
    ]


def _figures(lines: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for label, value in lines:
        table.add_row(label, value)
    return table


def _instances(summary: Summary) -> Table:
    table = plain_table("instance", "role", "busy", "prefill", "decode", "KV mean", "KV peak", "requests")
    for use in summary["instances"]:
        table.add_row(
            use["name"],
            use["role"],
            percent(use["busy_fraction"]),
            percent(use["prefill_busy_fraction"]),
            percent(use["decode_busy_fraction"]),
            percent(use["kv_use_mean"]),
            percent(use["kv_use_peak"]),
            f"{use['requests']:,}",
        )
    return table


def _links(summary: Summary) -> Table:
    table = plain_table("link", "busy", "used", "carried", "capacity", "flows")
    for row in link_rows(summary):
        table.add_row(*row)
    return table


def link_rows(summary: Summary) -> list[list[str]]:
    """Of each link: name, busy, used, carried, capacity, most transfers at once."""
    return [
        [
            link["name"],
            percent(link["busy_fraction"]),
            percent(link["utilisation"]),
            size(link["bytes"]),
            f"{size(link['capacity_bytes_per_s'])}/s",
            f"{link['peak_flows']}",
        ]
        for link in summary["links"]
    ]


def definitions() -> RenderableType:
    """What the words mean."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(style="dim")
    for term, meaning in DEFINITIONS.items():
        grid.add_row(term, meaning)
    return Padding(grid, 0)


def plain_table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold", expand=False)
    for k, name in enumerate(columns):
        text = k == 0 or name == "role"
        table.add_column(name, justify="left" if text else "right", no_wrap=True, style="bold" if k == 0 else "")
    return table
