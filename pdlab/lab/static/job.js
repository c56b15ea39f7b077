// A plan, a sweep, a tuning, or a board.
import { api, badge, confirmed, count, el, ended, hush, listen, main, number, page, percent, plain, remover, seconds, send, sortable, table, tell, watched, when } from "./lab.js";
import { chart, literal, palette } from "./charts.js";

const path = `/${page.kind}/${page.id}`;
const head = el("div", {});
const live = el("div", {});
const results = el("div", {});
main.append(head, live, results);

function top(job) {
  const cancel = el("button", { class: "danger", type: "button", onclick: async () => { if (await confirmed(`Cancel ${job.name}?`, "Cancel it")) send("DELETE", path).catch(tell); } }, "Cancel");
  head.replaceChildren(el("h1", {}, job.name, " ", badge(job.state)),
    el("p", { class: "soft" }, [job.kind, job.model, job.policy].filter(Boolean).join(", "), `, submitted ${when(job.submitted_s)}, id ${job.id}`),
    el("p", {}, job.tags.map((tag) => el("span", { class: "tag" }, tag))),
    el("div", { class: "bar" }, ended(job.state) ? remover(job, path) : cancel), ...job.failure.split("\n").filter(Boolean).map((line) => el("p", { class: "note error" }, line)));
}

function running(job) {
  const { done, total, phase } = job.progress;
  live.replaceChildren(el("progress", total ? { max: total, value: done, "aria-label": "progress" } : { "aria-label": "progress" }),
    el("p", { class: "soft" }, total ? `${count(done)} of ${count(total)}${phase ? `, ${phase}` : ""}` : job.state === "queued" ? "It waits for free cores." : "It begins."));
}

const report = () => el("p", {}, el("a", { href: `/api/v1${path}/report` }, "the page that the command writes"));

async function plan(job) {
  const rows = job.summary.finalists;
  const choices = await api(`${path}/experiments`);
  const run = async (row) => {
    try {
      const file = choices[rows.indexOf(row)].split("\n").filter((line) => !line.startsWith("base_dir:")).join("\n");
      location.href = `/runs/${(await send("POST", "/experiments", { experiment: file, tags: [`plan ${job.id.slice(0, 6)}`] })).id}`;
    } catch (error) { tell(error); }
  };
  const place = el("div", {});
  const against = { accelerators: "accelerators", usd_per_h: "$ an hour", ttft_s_p99: "TTFT p99, s", tpot_s_p99: "TPOT p99, s" };
  const axis = el("select", { "aria-label": "against" }, Object.entries(against).map(([key, words]) => el("option", { value: key }, words)));
  axis.value = new Set(rows.map((row) => row.accelerators)).size > 1 ? "accelerators" : "ttft_s_p99";
  results.replaceChildren(el("p", { class: "soft" }, `${count(job.summary.considered)} deployments were considered. Click one to run it at 80 % of its capacity.`), el("div", { class: "bar" }, el("label", {}, "against", axis)), place,
    el("h2", {}, "Finalists"), sortable([
      plain("rank", "rank", String), { head: "deployment", text: true, value: (row) => row.deployment, show: (row) => el("button", { type: "button", class: "row", onclick: () => run(row) }, row.deployment) },
      plain("capacity, req/s", "capacity_rps", number), plain("±", "capacity_half_rps", number), plain("accelerators", "accelerators", count), plain("each, req/s", "capacity_rps_per_accelerator", number), plain("$ an hour", "usd_per_h", number), plain("TTFT p99", "ttft_s_p99", seconds), plain("TPOT p99", "tpot_s_p99", seconds), plain("binds", "binds", undefined, true)], rows, 0, false), report());
  const draw = () => {
    const key = axis.value;
    const front = pareto(rows, key);
    const dots = (some, name, colour, mode) => ({ x: some.map((row) => row[key]), y: some.map((row) => row.capacity_rps), customdata: some.map((row) => rows.indexOf(row)), text: some.map((row) => literal(row.deployment)), name, mode, marker: { size: 11, color: colour }, line: { color: colour },
      error_y: { type: "data", array: some.map((row) => row.capacity_half_rps ?? 0), color: colour }, hovertemplate: "%{text}<br>%{y:.4g} req/s at %{x:.4g}<extra></extra>" });
    return chart(place, [dots(rows.filter((row) => !front.includes(row)), "others", palette[7], "markers"), dots(front, "Pareto front", palette[0], "lines+markers")],
      { height: 420, title: { text: "Capacity of the finalists" }, showlegend: true, xaxis: { title: { text: against[key] }, rangemode: "tozero", ...(key === "accelerators" ? { dtick: Math.max(1, Math.ceil(Math.max(...rows.map((row) => row[key])) / 8)) } : {}) }, yaxis: { title: { text: "requests/s" }, rangemode: "nonnegative" } }, `Capacity of each finalist against its ${against[key]}`);
  };
  axis.addEventListener("change", draw);
  await draw();
  place.on("plotly_click", (event) => run(rows[event.points[0].customdata]));
}

/** Those that carry more than all that cost as little. */
const pareto = (rows, key) => [...rows].filter((row) => row[key] !== null).sort((a, b) => a[key] - b[key] || b.capacity_rps - a.capacity_rps).filter((row, k, all) => all.slice(0, k).every((other) => other.capacity_rps < row.capacity_rps));

function sweep(job) {
  const { axes, points } = job.summary;
  const figures = [["slo_attainment", "SLO attainment", percent], ["goodput_rps", "goodput, req/s", number], ["ttft_s.p99", "TTFT p99", seconds], ["tpot_s.p99", "TPOT p99", seconds]];
  const worded = (value) => (typeof value === "string" ? value : JSON.stringify(value));
  const axis = el("select", { "aria-label": "axis" }, axes.map((key, k) => el("option", { value: k }, key)));
  const places = figures.map(() => el("div", {}));
  const draw = () => {
    const index = Number(axis.value);
    const numeric = points.every((point) => typeof point.values[index] === "number");
    const groups = Map.groupBy ? Map.groupBy(points, (point) => others(point, index)) : points.reduce((map, point) => map.set(others(point, index), [...(map.get(others(point, index)) || []), point]), new Map());
    figures.forEach(([key, words], which) => chart(places[which], [...groups].map(([name, some], k) => {
      const there = some.filter((point) => point.figures[key]).sort((a, b) => (numeric ? a.values[index] - b.values[index] : 0));
      return { x: there.map((point) => (numeric ? point.values[index] : worded(point.values[index]))), y: there.map((point) => point.figures[key].mean), error_y: { type: "data", array: there.map((point) => point.figures[key].half ?? 0) }, name: literal(name || words), mode: "lines+markers", line: { color: palette[k % palette.length] } };
    }), { height: 320, title: { text: words }, showlegend: groups.size > 1, xaxis: { title: { text: literal(axes[index]) }, ...(numeric ? {} : { type: "category" }) }, yaxis: { rangemode: "nonnegative", ...(key === "slo_attainment" ? { tickformat: ".0%", range: [0, 1.02] } : {}) } }, `${words} by ${axes[index]}`));
  };
  const others = (point, index) => point.values.map((value, k) => (k === index ? null : `${axes[k]} ${worded(value)}`)).filter(Boolean).join(", ");
  axis.addEventListener("change", draw);
  results.replaceChildren(el("div", { class: "bar" }, el("label", {}, "by", axis)), el("div", { class: "pair" }, places), el("h2", {}, "Points"),
    sortable([...axes.map((key, k) => ({ head: key, text: true, value: (point) => point.values[k], show: (point) => worded(point.values[k]) })),
      ...figures.map(([key, words, show]) => ({ head: words, value: (point) => point.figures[key]?.mean, show: (point) => `${show(point.figures[key]?.mean)}${point.figures[key]?.half > 1e-9 * Math.abs(point.figures[key].mean) ? ` ± ${show(point.figures[key].half)}` : ""}` })),
      { head: "", text: true, value: (point) => point.marks.join(), show: (point) => point.marks.join(", ") }], points, 0, false), report());
  draw();
}

function tuning(job) {
  const found = job.summary;
  results.replaceChildren(el("div", { class: "verdict fine" }, found.verdict),
    el("p", { class: "soft" }, `${found.policy}: ${count(found.trials.complete)} trials complete, ${count(found.trials.pruned)} pruned, ${count(found.trials.failed)} failed; judged on ${found.judged_on}`),
    ...found.judged.flatMap((one) => [el("h2", {}, `Trial ${one.trial}: ${one.verdict}`), table(["parameter", "value"], Object.entries(one.parameters).map(([name, value]) => [name, JSON.stringify(value)])),
      table(["figure", "untuned", "tuned", "difference", ""], Object.entries(one.figures).map(([name, figure]) => [name, number(figure.untuned.mean), number(figure.tuned.mean), `${number(figure.difference.mean)} ± ${number(figure.difference.half)}`, figure.verdict]))]));
}

const board = () => results.replaceChildren(el("iframe", { src: `/api/v1${path}/report`, title: "the board's page", sandbox: "" }), report());
const pages = { plans: plan, sweeps: sweep, tunings: tuning, boards: board };

async function show(job) {
  top(job);
  watched(job, live);
  if (!ended(job.state)) return running(job);
  live.replaceChildren();
  if (job.state === "done") await pages[page.kind](await api(path));
}

api(path).then((job) => { hush(); show(job).catch(tell); if (!ended(job.state)) listen(`${path}/events`, (news) => show(news).catch(tell)); }).catch(tell);
