import { el, main, percent, number, seconds, send, table, tell } from "./lab.js";
import { chart, limit, literal, palette } from "./charts.js";

const ids = (new URLSearchParams(location.search).get("ids") || "").split(",").filter(Boolean);
const words = { slo_attainment: percent, goodput_rps: number, throughput_rps: number };
const show = (key, value) => (words[key] || (key.endsWith("attainment") || key.includes("hit") ? percent : key.includes("per_s") ? number : key.includes("_s.") || key.endsWith("_s") ? seconds : number))(value);

function overlaid(place, found, key, title) {
  const traces = found.ids.map((id, k) => ({ x: found.cdf[id][key], y: found.shares, name: literal(found.names[k]), mode: "lines", line: { color: palette[k % palette.length] }, hovertemplate: "%{y:.1%} within %{x:.4g} s<extra>%{fullData.name}</extra>" })).filter((trace) => trace.x);
  const objective = found.slo[key];
  chart(place, traces, { height: 380, title: { text: `${title}: share of the requests` }, showlegend: true, xaxis: { title: { text: "seconds" }, rangemode: "tozero" }, yaxis: { tickformat: ".0%", range: [0, 1.01] }, shapes: objective ? [limit(objective, "objective")] : [] }, `${title} of ${found.names.join(", ")}`);
}

function page(found) {
  const [ttft, tpot, e2e] = [el("div", {}), el("div", {}), el("div", {})];
  main.append(
    el("h1", {}, found.names.join(" against ")),
    ...found.pairs.flatMap((pair) => [
      el("h2", {}, `${found.names[0]} against `, el("a", { href: `/runs/${pair.id}` }, pair.name)),
      el("div", { class: `verdict ${pair.verdict.some((line) => line.decided) ? "fine" : ""}` }, pair.verdict.map((line) => el("p", {}, line.decided ? el("b", {}, line.words) : line.words))),
      ...pair.notes.map((line) => el("p", { class: "note" }, line))]),
    el("h2", {}, "Distributions"), el("div", { class: "pair" }, ttft, tpot, e2e),
    el("h2", {}, "Figures"),
    table(["", ...found.names.map((name, k) => el("a", { href: `/runs/${found.ids[k]}` }, name))], found.figures.map((figure) => [figure.label, ...figure.values.map((value) => show(figure.key, value))])),
    el("h2", {}, "What differs in the files"),
    ...found.pairs.map((pair) => el("p", {}, el("b", {}, pair.name), ": ", pair.differs || "nothing")));
  overlaid(ttft, found, "ttft_s", "TTFT");
  overlaid(tpot, found, "tpot_s", "TPOT");
  overlaid(e2e, found, "e2e_s", "E2E");
}

if (ids.length < 2) main.append(el("h1", {}, "Compare"), el("p", {}, "Choose two runs or more on the ", el("a", { href: "/" }, "page of runs"), "."));
else send("POST", "/compare", { ids }).then(page).catch(tell);
