"""The terminal's view of a summary: one table a run, one to compare several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pdlab.results.metrics import DEFINITIONS, SPREADS
from pdlab.results.units import MISSING, number, percent, seconds, size

Summary = Mapping[str, Any]

POINTS = ("mean", "p50", "p90", "p99", "max")
BEST = "★"


def summary_table(summary: Summary, title: str = "") -> RenderableType:
    """Everything a run says of itself: latencies, attainment, instances, links, the bottleneck, and what each word means."""
    parts: list[RenderableType] = [_latencies(summary), Text(""), _figures(summary), Text(""), _instances(summary)]
    if summary["links"]:
        parts += [Text(""), _links(summary)]
    parts += [Text(""), bottleneck_line(summary)]
    if summary["reasons"]:
        parts.append(Text.assemble(("not served  ", "bold"), "; ".join(f"{n:,} x {reason}" for reason, n in summary["reasons"].items())))
    if reading := summary["run"].get("workload"):
        parts.append(Text.assemble(("trace read as  ", "bold"), reading))
    parts += [Text.assemble(("warning  ", "bold yellow"), line) for line in summary["warnings"]]
    parts += [Text(""), _definitions()]
    heading = title + (" (partial: stopped early)" if summary["partial"] else "")
    return Panel(Group(*parts), title=heading or None, title_align="left", border_style="dim", padding=(0, 1))


def bottleneck_line(summary: Summary) -> Text:
    found = summary["bottleneck"]
    colour = "green" if found["resource"] == "none" else "red"
    return Text.assemble(("bottleneck  ", "bold"), (found["resource"], f"bold {colour}"), f": {found['evidence']}")


def _latencies(summary: Summary) -> Table:
    table = _plain("", *POINTS, "objective")
    for label, key in SPREADS:
        objective = summary["slo"].get(key)
        cells = [seconds(summary[key][point]) for point in POINTS]
        table.add_row(label, *cells, f"≤ {seconds(objective)}" if objective is not None else "")
    return table


def figures(summary: Summary) -> list[tuple[str, str]]:
    """The single figures of a run, worded: (label, value)."""
    lost = {k: summary[k] for k in ("failed", "rejected", "unfinished") if summary[k]}
    served = f"{summary['completed']:,} of {summary['requests']:,}" + "".join(f", {n:,} {k}" for k, n in lost.items())
    each = f"TTFT {percent(summary['ttft_attainment'])}, TPOT {percent(summary['tpot_attainment'])}"
    accelerators = number(summary["goodput_rps_per_accelerator"])
    return [
        ("completed", f"{served} in {seconds(summary['duration_s'])}"),
        ("SLO attainment", f"{percent(summary['slo_attainment'])} ({each})"),
        ("goodput", f"{number(summary['goodput_rps'])} req/s, {accelerators} for each of {summary['accelerators']} accelerators"),
        ("throughput", f"{number(summary['throughput_rps'])} req/s, {number(summary['output_tokens_per_s'])} output tokens/s"),
        ("prefix hits", f"{percent(summary['prefix_hit_rate'])} of prompt tokens"),
        ("KV moved", size(summary["transfer_bytes"])),
        ("retries, preemptions, migrations", f"{summary['retries']:,}, {summary['preemptions']:,}, {summary['migrations']:,}"),
    ]


def _figures(summary: Summary) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for label, value in figures(summary):
        table.add_row(label, value)
    return table


def _instances(summary: Summary) -> Table:
    table = _plain("instance", "role", "busy", "prefill", "decode", "KV mean", "KV peak", "requests")
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
    table = _plain("link", "busy", "used", "carried", "capacity", "flows")
    for row in link_rows(summary):
        table.add_row(*row)
    return table


def link_rows(summary: Mapping[str, Any]) -> list[list[str]]:
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


def _definitions() -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(style="dim")
    for term, meaning in DEFINITIONS.items():
        grid.add_row(term, meaning)
    return Padding(grid, 0)


def _plain(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold", expand=False)
    for k, name in enumerate(columns):
        text = k == 0 or name == "role"
        table.add_column(name, justify="left" if text else "right", no_wrap=True, style="bold" if k == 0 else "")
    return table


@dataclass(frozen=True, slots=True)
class TableRow:
    """One line of a comparison: how to read it, how to word it, and which direction is better (0: neither)."""

    label: str
    read: Callable[[Summary], float | None]
    word: Callable[[float | None], str]
    better: int


def _rows() -> list[TableRow]:
    def point(key: str, name: str) -> Callable[[Summary], float | None]:
        return lambda s: s[key][name]

    def plain(key: str) -> Callable[[Summary], float | None]:
        return lambda s: s[key]

    return [
        TableRow("SLO attainment", plain("slo_attainment"), percent, 1),
        TableRow("goodput, req/s", plain("goodput_rps"), number, 1),
        TableRow("  per accelerator", plain("goodput_rps_per_accelerator"), number, 1),
        TableRow("throughput, req/s", plain("throughput_rps"), number, 1),
        TableRow("output tokens/s", plain("output_tokens_per_s"), number, 1),
        *(TableRow(f"{label} {p}", point(key, p), seconds, -1) for label, key in SPREADS[:5] for p in ("mean", "p50", "p90", "p99")),
        TableRow("failed", plain("failed"), number, -1),
        TableRow("rejected", plain("rejected"), number, -1),
        TableRow("prefix hits", plain("prefix_hit_rate"), percent, 1),
        TableRow("KV moved", plain("transfer_bytes"), size, 0),
        TableRow("preemptions", plain("preemptions"), number, -1),
    ]


def compared(results: Sequence[tuple[str, Summary]]) -> list[tuple[str, list[tuple[str, bool]]]]:
    """For each row its label and, for each run, (wording, is it the best). Values that read the same rank the same; where all do, none is
    marked."""
    lines = []
    for row in _rows():
        values = [row.read(summary) for _, summary in results]
        words = [row.word(v) for v in values]
        known = [v for v in values if v is not None]
        best = row.word(max(known) if row.better > 0 else min(known)) if known and row.better and len(set(words)) > 1 else None
        lines.append((row.label, [(word, word == best) for word in words]))
    return lines


def comparison(results: Sequence[tuple[str, Summary]]) -> RenderableType:
    """One column a run, the best of each row marked; below, each run's bottleneck."""
    table = _plain("", *(name for name, _ in results))
    for label, cells in compared(results):
        if all(words == MISSING for words, _ in cells):
            continue
        table.add_row(label, *(Text(f"{words} {BEST}", "bold green") if best else Text(f"{words}  ") for words, best in cells))
    lines = [Text.assemble((f"{name}  ", "bold"), bottleneck_line(summary)) for name, summary in results]
    note = Text(f"{BEST} best of its row", "dim")
    return Panel(Group(table, note, Text(""), *lines), title="comparison", title_align="left", border_style="dim", padding=(0, 1))
