"""report.html: one page, one file, nothing fetched; light or dark as the reader's system is.

Figures are inline SVG whose ink and grid are taken from the page's own colours.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import yaml

from pdlab.metrics import DEFINITIONS
from pdlab.records import Records, Samples
from pdlab.report import figures, tables
from pdlab.report.units import number, percent, seconds, size

Summary = Mapping[str, Any]

_STYLE = """
:root{color-scheme:light dark;--ink:#22272e;--soft:#68707a;--line:#dde1e6;--page:#fff;--box:#f5f7f9;--good:#1d7d47;--bad:#c0352b}
@media (prefers-color-scheme:dark){
:root{--ink:#e2e6ea;--soft:#98a2ad;--line:#3a414a;--page:#15191e;--box:#1f252c;--good:#5fc78c;--bad:#f07a70}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1060px;padding:28px 20px 60px;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
h1{font-size:25px;margin:0}h2{font-size:17px;margin:34px 0 10px}
p{margin:6px 0}.soft{color:var(--soft)}.good{color:var(--good)}.bad{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:20px 0}
.tile{background:var(--box);border-radius:8px;padding:10px 14px}
.tile b{display:block;font-size:21px;line-height:1.3}.tile span{color:var(--soft);font-size:13px}
.verdict{background:var(--box);border-left:4px solid var(--bad);border-radius:0 8px 8px 0;padding:10px 14px}
.verdict.good{border-color:var(--good);color:inherit}
.warning{border-left:4px solid #d29a22;background:var(--box);padding:8px 14px;margin:6px 0}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:4px 12px 4px 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--soft);font-size:13px}th:first-child,td:first-child,.text{text-align:left}
td.best{color:var(--good);font-weight:600}
figure{margin:14px 0;overflow-x:auto}figure svg{width:100%;min-width:560px;height:auto;display:block}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 18px;margin:0}dt{font-weight:600}dd{margin:0}
pre{background:var(--box);border-radius:8px;padding:14px;overflow-x:auto;font:13px/1.45 ui-monospace,monospace}
summary{cursor:pointer;font-weight:600}
"""


def run_page(
    summary: Summary, records: Records, samples: Samples, experiment: Mapping[str, Any] | None = None, warnings: Iterable[str] = ()
) -> str:
    """The report of one run. `experiment` is the resolved one, as plain values."""
    name = str((experiment or {}).get("name") or "run")
    slo = (summary["slo"]["ttft_s"], summary["slo"]["tpot_s"])
    roles = {use["name"]: use["role"] for use in summary["instances"]}
    body = [
        f"<h1>{_text(name)}</h1>",
        f"<p class=soft>{_text(_about(summary))}</p>",
        *(f"<p class=warning>{_text(line)}</p>" for line in dict.fromkeys([*_partial(summary), *summary["warnings"], *warnings])),
        _tiles(summary),
        _verdict(summary),
        "<h2>Latency</h2>",
        _latency_table(summary),
        _svg(figures.distributions(records, slo), "distributions", "TTFT and TPOT distributions with their objectives"),
        "<h2>Run</h2>",
        _definition_list(tables.figures(summary)),
        *_reasons(summary),
        "<h2>Instances</h2>",
        _instance_table(summary),
        *(("<h2>Links</h2>", _link_table(summary)) if summary["links"] else ()),
        "<h2>Load over time</h2>",
        _svg(figures.load(samples, roles), "load", "Waiting requests, running sequences and KV use over time"),
        "<h2>Requests through prefill, link and decode</h2>",
        _svg(figures.timeline(records), "timeline", "Timeline of some requests"),
        "<h2>What the words mean</h2>",
        _definition_list(DEFINITIONS.items()),
    ]
    if experiment:
        body += ["<h2>Experiment, resolved</h2>", f"<details open><summary>YAML</summary><pre>{_text(_yaml(experiment))}</pre></details>"]
    return _page(name, body)


def comparison_page(runs: Sequence[tuple[str, Summary, Records]]) -> str:
    """Several runs side by side, the best of each row marked."""
    first = runs[0][1]["slo"] if runs else {"ttft_s": None, "tpot_s": None}
    lines = tables.compared([(name, summary) for name, summary, _ in runs])
    rows = [[label, *(f"{words} ★" if best else words for words, best in cells)] for label, cells in lines]
    marks = [[False, *(best for _, best in cells)] for _, cells in lines]
    same = all(summary["slo"] == first for _, summary, _ in runs)
    body = [
        "<h1>Comparison</h1>",
        f"<p class=soft>{len(runs)} runs; ★ is the best of its row</p>",
        _table(["", *(name for name, _, _ in runs)], rows, marks=marks),
        _svg(
            figures.compared_distributions([(n, r) for n, _, r in runs], (first["ttft_s"], first["tpot_s"]) if same else (None, None)),
            "compared",
            "TTFT and TPOT distributions of all runs",
        ),
        "<h2>Bottlenecks</h2>",
        *(f"<p><b>{_text(name)}</b></p>{_verdict(summary)}" for name, summary, _ in runs),
        "<h2>What the words mean</h2>",
        _definition_list(DEFINITIONS.items()),
    ]
    return _page("comparison", body)


def fragment(summary: Summary) -> str:
    """A run in a few lines, for notebooks, which bring their own style."""
    rows = "".join(
        f"<tr><th style='text-align:left'>{_text(k)}</th><td style='text-align:left'>{_text(v)}</td></tr>"
        for k, v in tables.figures(summary)
    )
    found = summary["bottleneck"]
    return f"{_latency_table(summary)}<table>{rows}</table><p><b>bottleneck: {_text(found['resource'])}</b>: {_text(found['evidence'])}</p>"


def _page(title: str, body: Sequence[str]) -> str:
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_text(title)} · pdlab</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _about(summary: Summary) -> str:
    run = summary["run"]
    known = [
        f"{key.replace('_', ' ')} {run[key]}" for key in ("world", "seed", "pdlab", "version", "policy_hash") if run.get(key) is not None
    ]
    return ", ".join([f"{summary['requests']:,} requests in {seconds(summary['duration_s'])}", *known])


def _partial(summary: Summary) -> list[str]:
    return [f"Stopped early: {summary['unfinished']:,} requests had not ended and count as misses."] if summary["partial"] else []


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
    cells = [f'<div class=tile><b class="{tone}">{_text(value)}</b><span>{_text(label)}</span></div>' for label, value, tone in tiles]
    return "<div class=tiles>" + "".join(cells) + "</div>"


def _verdict(summary: Summary) -> str:
    found = summary["bottleneck"]
    tone = " good" if found["resource"] == "none" else ""
    return f'<p class="verdict{tone}"><b>Bottleneck: {_text(found["resource"])}.</b> {_text(found["evidence"])}.</p>'


def _latency_table(summary: Summary) -> str:
    rows = []
    for label, key in tables.SPREADS:
        objective = summary["slo"].get(key)
        limit = f"≤ {seconds(objective)}" if objective is not None else ""
        rows.append([label, *(seconds(summary[key][point]) for point in tables.POINTS), limit])
    return _table(["", *tables.POINTS, "objective"], rows)


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
    return _table(head, rows, text=3)


def _link_table(summary: Summary) -> str:
    rows = [
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
    return _table(["link", "busy", "used", "carried", "capacity", "most transfers at once"], rows)


def _reasons(summary: Summary) -> list[str]:
    if not summary["reasons"]:
        return []
    return ["<h2>Not served</h2>", _table(["reason", "requests"], [[r, f"{n:,}"] for r, n in summary["reasons"].items()])]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, text: int = 1, marks: Sequence[Sequence[bool]] | None = None) -> str:
    def cell(kind: str, column: int, words: str, best: bool = False) -> str:
        names = " ".join(["text"] * (column < text) + ["best"] * best)
        return f'<{kind} class="{names}">{_text(words)}</{kind}>' if names else f"<{kind}>{_text(words)}</{kind}>"

    top = "".join(cell("th", k, words) for k, words in enumerate(head))
    lines = []
    for r, row in enumerate(rows):
        cells = (cell("td", k, words, marks[r][k] if marks else False) for k, words in enumerate(row))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _definition_list(terms: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{_text(term)}</dt><dd>{_text(meaning)}</dd>" for term, meaning in terms) + "</dl>"


def _svg(figure: figures.Picture, name: str, label: str) -> str:
    """The figure as inline SVG: ids of its own (several share a page), colours that follow the page, text as text."""
    buffer = io.StringIO()
    with mpl.rc_context({**figures.STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", drawing)
    drawing = re.sub(r' xmlns(:xlink)?="[^"]*"', "", drawing).replace("xlink:href", "href")
    drawing = drawing.replace(figures.INK, "var(--ink)").replace(figures.GRID, "var(--line)")
    # Attributes do not know var(); only styles do.
    drawing = re.sub(r'(?<![\w-])(fill|stroke)="(var\(--\w+\))"', r'style="\1:\2"', drawing)
    return f'<figure role="img" aria-label="{_text(label)}">{drawing}</figure>'


def _yaml(experiment: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(experiment), sort_keys=False, allow_unicode=True, width=110)


def _text(words: str) -> str:
    return html.escape(str(words))
