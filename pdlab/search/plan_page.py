"""A plan as one page: the verdict, the Pareto front that a reader chooses the axes of, the ranked table that sorts, and what to run.

The picture is drawn by the page's own few lines of script from the numbers in it; nothing is fetched.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pdlab.experiment.experiment import Experiment
from pdlab.report.page import definition_list, escaped, page, table
from pdlab.search.plan import Plan
from pdlab.search.plan_rows import COLUMNS, PlanRow, comfort_words, notes, sensitivity, verdict

AXES = {  # name: (label, is more better)
    "capacity_rps": ("capacity, requests/s", True),
    "capacity_rps_per_accelerator": ("capacity per GPU, requests/s", True),
    "accelerators": ("GPUs", False),
    "usd_per_h": ("$ an hour", False),
    "usd_per_mtok": ("$ per million tokens", False),
    "ttft_s_p99": ("TTFT p99, s", False),
    "tpot_s_p99": ("TPOT p99, s", False),
}
_STYLE = """<style>
#front{width:100%;max-width:820px;height:auto;display:block}#front text{fill:var(--soft);font-size:12px}
#front .axis{stroke:var(--line)}#front .line{fill:none;stroke:var(--good);stroke-width:1.5}
#front circle{stroke:var(--ink);stroke-width:1;cursor:pointer}
#front .mixed{fill:#2f7ed8}#front .pd{fill:#e0803a}#front .rough{fill-opacity:.25}
#said{min-height:3em}th{cursor:pointer}select{font:inherit;background:var(--box);color:var(--ink);border:1px solid var(--line)}
</style>"""
_SCRIPT = """<script>
const pick = id => document.getElementById(id), svg = pick("front"), W = 820, H = 400, L = 70, B = 50;
const make = (name, attributes, text) => {
  const one = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) one.setAttribute(key, attributes[key]);
  if (text !== undefined) one.textContent = text;
  svg.appendChild(one); return one;
};
const scale = (values, low, high) => {
  let least = Math.min(...values), most = Math.max(...values);
  if (least === most) { least -= Math.abs(least) / 2 || 1; most += Math.abs(most) / 2 || 1; }
  const room = (most - least) * .08; least -= room; most += room;
  const rough = (most - least) / 5, power = 10 ** Math.floor(Math.log10(rough)), step = power * [1, 2, 5, 10].find(k => k * power >= rough);
  const ticks = [];
  for (let k = Math.ceil(least / step); k * step <= most; k++) ticks.push(k * step);
  return {at: v => low + (v - least) / (most - least) * (high - low), ticks};
};
const better = (axis, a, b) => AXES[axis][1] ? a > b : a < b;
function draw() {
  const x = pick("x").value, y = pick("y").value;
  const points = POINTS.filter(p => p[x] != null && p[y] != null);
  svg.replaceChildren();
  if (!points.length) return;
  const across = scale(points.map(p => p[x]), L, W - 20), up = scale(points.map(p => p[y]), H - B, 20);
  for (const v of across.ticks) { make("line", {class: "axis", x1: across.at(v), x2: across.at(v), y1: 20, y2: H - B}); make("text", {x: across.at(v), y: H - B + 18, "text-anchor": "middle"}, +v.toPrecision(6)); }
  for (const v of up.ticks) { make("line", {class: "axis", x1: L, x2: W - 20, y1: up.at(v), y2: up.at(v)}); make("text", {x: L - 8, y: up.at(v) + 4, "text-anchor": "end"}, +v.toPrecision(6)); }
  make("text", {x: (L + W) / 2, y: H - 8, "text-anchor": "middle"}, AXES[x][0]);
  make("text", {transform: `translate(14 ${H / 2}) rotate(-90)`, "text-anchor": "middle"}, AXES[y][0]);
  const front = points.filter(p => !points.some(q => (better(x, q[x], p[x]) && !better(y, p[y], q[y])) || (better(y, q[y], p[y]) && !better(x, p[x], q[x]))));
  front.sort((a, b) => a[x] - b[x]);
  make("polyline", {class: "line", points: front.map(p => `${across.at(p[x])},${up.at(p[y])}`).join(" ")});
  for (const p of points) {
    const dot = make("circle", {class: p.split + (p.rank ? "" : " rough"), cx: across.at(p[x]), cy: up.at(p[y]), r: front.includes(p) ? 7 : 5, tabindex: 0});
    const say = () => { pick("said").textContent = (p.rank ? `${p.rank}. ` : "") + p.deployment + ": " + Object.keys(AXES).filter(k => p[k] != null).map(k => `${AXES[k][0]} ${+p[k].toPrecision(4)}`).join("; ") + (p.rank ? "" : "; roughly, with one seed"); };
    dot.addEventListener("mouseenter", say); dot.addEventListener("focus", say);
  }
}
for (const id of ["x", "y"]) pick(id).addEventListener("change", draw);
draw();
document.querySelectorAll("table").forEach(table => table.querySelectorAll("th").forEach((head, column) => head.addEventListener("click", () => {
  const value = row => { const text = row.cells[column].textContent, found = parseFloat(text.replace(/,/g, "")); const unit = / us/.test(text) ? 1e-6 : / ms/.test(text) ? 1e-3 : 1; return isNaN(found) ? text : found * unit; };
  const sign = head.dataset.up === "1" ? -1 : 1; head.dataset.up = sign === 1 ? "1" : "0";
  const body = table.tBodies[0], rows = [...body.rows];
  rows.sort((a, b) => { const u = value(a), v = value(b); return sign * (typeof u === "number" && typeof v === "number" ? u - v : String(u).localeCompare(String(v))); });
  rows.forEach(row => body.appendChild(row));
})));
</script>"""  # noqa: E501


def plan_page(plan: Plan, found: Sequence[PlanRow], best: Experiment, commands: str) -> str:
    own = list(found)
    body = [
        _STYLE,
        f"<h1>{escaped(plan.base.name)}</h1>",
        f"<p class=soft>{escaped(plan.question.words)}; {escaped(plan.base.model)}; seeds {plan.seeds[0]} to {plan.seeds[-1]}</p>",
        f"<p class='verdict good'>{escaped(verdict(plan, own))}</p>",
        "<h2>What is gained for what</h2>",
        f"<p>{_select('x', 'usd_per_mtok')} across, {_select('y', 'tpot_s_p99')} up. Nothing beats those on the line in both.</p>",
        '<svg id="front" viewBox="0 0 820 400" role="img" aria-label="Pareto front"></svg>',
        "<p id=said class=soft>Point at a deployment. Blue: mixed; orange: prefill and decode apart; pale: known roughly.</p>",
        "<h2>Deployments</h2>",
        table(("", *COLUMNS), [[str(row.rank), *row.cells] for row in own], text=2, marks=_marks(own)),
        f"<p class=soft>A click on a head sorts. Green: the best, and what is not told apart from it. {escaped(comfort_words())}.</p>",
    ]
    if tenths := list(sensitivity(own)):
        body += ["<h2>What if the costs are wrong by a tenth?</h2>", definition_list(tenths)]
    body += ["<h2>What binds at capacity</h2>", definition_list((row.name, f"{row.binds}: {row.evidence}") for row in own)]
    body += ["<h2>What was left out</h2>", "".join(f"<p>{escaped(line)}</p>" for line in notes(plan))]
    body += ["<h2>What to run</h2>", f"<pre>{escaped(commands)}</pre>"]
    body += [f"<details><summary>The first one's experiment file</summary><pre>{escaped(best.to_yaml())}</pre></details>"]
    numbers = f"const AXES = {_script_json(AXES)}, POINTS = {_script_json(points(plan, own))};"
    body += [f"<script>{numbers}</script>", _SCRIPT]
    return page(f"{plan.base.name}, planned", body)


def points(plan: Plan, found: Sequence[PlanRow]) -> list[dict[str, Any]]:
    """The finalists with all figures; others whose capacity is roughly known, without latencies."""
    there = [{key: row.plain[key] for key in ("rank", "deployment", "split", *AXES)} for row in found]
    finalists = {row.finalist.contender for row in found}
    tokens = float(plan.workload.prompt_tokens.mean() + plan.workload.output_tokens.mean())
    for one, rps in plan.search.known.items():
        if one in finalists:
            continue
        candidate, usd = one.candidate, plan.space.usd_per_h(one.candidate)
        there.append(
            {
                "rank": 0,
                "deployment": candidate.words,
                "split": candidate.split,
                "capacity_rps": rps,
                "capacity_rps_per_accelerator": rps / candidate.accelerators,
                "accelerators": candidate.accelerators,
                "usd_per_h": usd,
                "usd_per_mtok": usd / (rps * tokens * 3600 / 1e6),
                "ttft_s_p99": None,
                "tpot_s_p99": None,
            }
        )
    return there


def _marks(found: Sequence[PlanRow]) -> list[list[bool]]:
    return [[(row.rank == 1 or row.tied) and column == 3 for column in range(len(COLUMNS) + 1)] for row in found]


def _select(name: str, chosen: str) -> str:
    options = "".join(
        f'<option value="{key}"{" selected" if key == chosen else ""}>{escaped(label)}</option>' for key, (label, _) in AXES.items()
    )
    return f'<select id="{name}" aria-label="{name} axis">{options}</select>'


def _script_json(value: Any) -> str:
    """JSON that no text in it can end the script of."""
    return json.dumps(value).replace("<", "\\u003c")
