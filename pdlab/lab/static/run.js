import { api, confirmed, count, el, badge, ended, hush, listen, main, number, page, percent, remover, seconds, send, table, tell, tile, watched, when } from "./lab.js";
import { chart, palette } from "./charts.js";
import { distribution, instances, links, loads, strip, worst } from "./run_figures.js";

const path = `/experiments/${page.id}`;
const head = el("div", {});
const live = el("div", { "aria-live": "off" });
const results = el("div", {});
main.append(head, live, results);
let shown = "";

function top(job) {
  const cancel = el("button", { class: "danger", type: "button", id: "cancel", onclick: async () => {
    if (await confirmed(`Cancel ${job.name}? What it has computed is lost.`, "Cancel it")) send("DELETE", path).catch(tell);
  } }, "Cancel");
  const again = el("a", { href: `/new?from=${job.id}` }, "Change and run");
  head.replaceChildren(
    el("h1", {}, job.name, " ", badge(job.state)),
    el("p", { class: "soft" }, `${job.model}, ${job.policy}, submitted ${when(job.submitted_s)}, ${job.seeds === 1 ? "one seed" : `${job.seeds} seeds`}, id ${job.id}`),
    el("p", {}, job.tags.map((tag) => el("span", { class: "tag" }, tag))),
    el("div", { class: "bar" }, ...(ended(job.state) ? [again, remover(job, path)] : [cancel])),
    ...job.failure.split("\n").filter(Boolean).map((line) => el("p", { class: "note error" }, line)));
}

// ------------------------------------------------------------ while it runs

const bar = el("progress", { max: 1, "aria-label": "progress" });
const words = el("p", { class: "soft" });
const curve = el("div", {});

function running(job) {
  const { done, total, simulated_s: at, figures, history } = job.progress;
  if (!live.isConnected || !live.childElementCount) live.append(bar, words, curve);
  if (!total) { bar.removeAttribute("value"); words.textContent = job.state === "queued" ? "It waits for a free core." : "It begins."; return; }
  bar.max = total;
  bar.value = done;
  words.textContent = figures
    ? `${count(done)} of ${count(total)} requests, ${seconds(at)} simulated: TTFT ${seconds(figures.ttft_p50_s)} (p99 ${seconds(figures.ttft_p99_s)}), TPOT ${seconds(figures.tpot_p50_s)} (p99 ${seconds(figures.tpot_p99_s)}) so far`
    : `${count(done)} of ${count(total)} ${job.progress.phase || ""}`;
  if (history?.length > 1) {
    const lines = ["ttft_p50_s", "ttft_p99_s", "tpot_p99_s"];
    chart(curve, lines.map((name, k) => ({ x: history.map((one) => one.simulated_s), y: history.map((one) => one[name]), name: name.replace("_s", "").replaceAll("_", " "), mode: "lines", line: { color: palette[k] } })),
      { height: 320, showlegend: true, title: { text: "So far" }, xaxis: { title: { text: "simulated seconds" } }, yaxis: { title: { text: "seconds" }, rangemode: "tozero", type: "log" } }, "TTFT and TPOT so far");
  }
}

// ------------------------------------------------------------ when it is done

async function finished(job) {
  live.replaceChildren();
  const summary = job.summary;
  if (!summary) return tell("its files are gone: submit it again to have them");
  const stretch = told();
  const figures = await api(`${path}/figures`);
  const binds = summary.bottleneck;
  const points = ["mean", "p50", "p90", "p99", "max"];
  const lines = [["TTFT", "ttft_s"], ["TPOT", "tpot_s"], ["ITL", "itl_s"], ["E2E", "e2e_s"], ["queue", "queue_s"], ["KV transfer", "transfer_s"]].filter(([, key]) => summary[key]);
  const [ttft, tpot, load, lanes] = [el("div", {}), el("div", {}), el("div", {}), el("div", {})];
  results.replaceChildren(
    ...(summary.overloaded ? [el("p", { class: "note" }, "Overloaded: its queue grew to the end, and its figures depend on its length.")] : []),
    ...summary.warnings.map((line) => el("p", { class: "note" }, line)),
    el("div", { class: "tiles" },
      tile(percent(summary.slo_attainment), "SLO attainment", summary.slo_attainment >= 0.9 ? "good" : "bad"), tile(number(summary.goodput_rps), "goodput, req/s"), tile(number(summary.throughput_rps), "throughput, req/s"),
      tile(number(summary.output_tokens_per_s), "output tokens/s"), tile(seconds(summary.ttft_s.p99), "TTFT p99"), tile(seconds(summary.tpot_s.p99), "TPOT p99"), tile(count(summary.requests), "requests")),
    el("div", { class: `verdict ${binds.resource === "none" ? "fine" : ""}` }, el("b", {}, `Bottleneck: ${binds.resource}`), el("br"), binds.evidence),
    el("p", {}, el("a", { href: `/api/v1${path}/report` }, "report"), " · ", el("a", { href: `/api/v1${path}/trace`, download: true }, "trace for Perfetto"), " · ", el("a", { href: `/api/v1${path}/requests?format=parquet`, download: true }, "requests as parquet")),
    el("h2", {}, "Latency"),
    table(["", ...points, "objective"], lines.map(([name, key]) => [name, ...points.map((point) => seconds(summary[key][point])), summary.slo[key] ? `≤ ${seconds(summary.slo[key])}` : ""])),
    el("div", { class: "pair" }, ttft, tpot),
    ...seedTable(job),
    el("h2", {}, "Requests through prefill, link and decode"), el("p", { class: "soft" }, "Drag to zoom: more of the requests appear. Double click: all."), lanes,
    el("h2", {}, "Load over time"), load,
    el("h2", {}, "The requests furthest from their objectives"), worst(figures.worst),
    el("h2", {}, "Instances"), instances(summary.instances),
    ...(summary.links.length ? [el("h2", {}, "Links"), links(summary.links)] : []),
    el("details", {}, el("summary", {}, "Experiment"), el("pre", {}, job.experiment)));
  distribution(ttft, figures, "ttft_s", "TTFT", summary.slo.ttft_s);
  distribution(tpot, figures, "tpot_s", "TPOT", summary.slo.tpot_s);
  loads(load, figures.load);
  timeline(lanes, stretch);
}

const told = (from = 0, to = null) => api(`${path}/timeline?limit=80&from_s=${from}${to === null ? "" : `&to_s=${to}`}`).catch((error) => { tell(error); return null; });

async function timeline(place, asked, from = 0, to = null) {
  const found = await asked;
  if (!found) return;
  await strip(place, found, `${count(found.request_id.length)} of ${count(found.requests)} requests`, to === null ? null : [from, to]);
  if (place.zooms) return;
  place.zooms = true;
  const zoom = (...range) => timeline(place, told(...range), ...range);
  place.on("plotly_relayout", (change) => {
    if (change["xaxis.range[0]"] !== undefined) zoom(Math.max(0, change["xaxis.range[0]"]), change["xaxis.range[1]"]);
    else if (change["xaxis.autorange"]) zoom();
  });
}

function seedTable(job) {
  const found = job.seed_figures;
  if (!found) return [];
  const rows = [["SLO attainment", "slo_attainment", percent], ["goodput, req/s", "goodput_rps", number], ["TTFT p99", "ttft_s.p99", seconds], ["TPOT p99", "tpot_s.p99", seconds]];
  const seeds = Object.keys(found.by_seed);
  return [el("h2", {}, `Over ${seeds.length} seeds`), el("p", { class: "soft" }, "Means and 95 % intervals by Student's t. The rest of this page is of the first seed."),
    table(["", "mean", "±", ...seeds.map((seed) => `seed ${seed}`)], rows.map(([words, key, show]) => [words, show(found.figures[key]?.mean), show(found.figures[key]?.half), ...seeds.map((seed) => show(found.by_seed[seed][key]))]))];
}

async function show(job) {
  top(job);
  watched(job, live);
  if (!ended(job.state)) return running(job);
  live.replaceChildren();
  if (job.state === "done" && shown !== job.id) { shown = job.id; await finished("summary" in job ? job : await api(path)); }
}

api(path).then((job) => { hush(); show(job).catch(tell); if (!ended(job.state)) listen(`${path}/events`, (news) => show(news).catch(tell)); }).catch(tell);
