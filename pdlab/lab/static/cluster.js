import { api, badge, confirmed, count, el, hush, main, page, percent, seconds, send, tell } from "./lab.js";
import { chart, literal, stageColours } from "./charts.js";
import { whatIf } from "./what_if.js";

const path = `/clusters/${encodeURIComponent(page.id)}`;
const every_ms = 1000;
const head = el("p", { class: "soft", role: "status" });
const alarms = el("div", { "aria-live": "polite" });
const cards = el("div", { class: "who" });
const strip = el("div", {});
const table = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "what has happened" });
const said = el("p", { role: "status" });
const pause = el("button", { type: "button", id: "pause", "aria-pressed": "false", onclick: () => { paused = !paused; pause.setAttribute("aria-pressed", String(paused)); pause.textContent = paused ? "Go on" : "Hold still"; } }, "Hold still");
const other = whatIf(path);
let paused = false;
let last = 0;
let happened = [];
main.append(el("h1", {}, page.id), head, alarms, said, el("h2", {}, "Instances"), cards,
  el("h2", {}, "Requests through prefill, link and decode"), el("div", { class: "bar" }, pause), strip, ...other.parts, el("h2", {}, "What has happened"), table);

async function ask(instance, what, body, question) {
  if (!(await confirmed(question, "Do it"))) return;
  try {
    said.textContent = (await send("POST", `${path}/instances/${encodeURIComponent(instance)}/${what}`, body)).words;
    hush();
  } catch (error) { tell(error); }
}

function card(row, load) {
  const report = row.report;
  const kv = report && row.kv_blocks ? report.used_blocks / row.kv_blocks : null;
  const others = ["prefill", "decode", "mixed"].filter((role) => role !== row.role);
  const pairs = [["waits / runs", report ? `${count(report.waiting)} / ${count(report.running)}` : "–"], ["batch context", report ? `${count(report.context_tokens)} tokens` : "–"], ["KV", `${percent(kv)} of ${count(row.kv_blocks)} blocks`],
    ["transfers", `${load.incoming} in, ${load.outgoing} out`], ["decode step", report?.decode_steps ? seconds(report.decode_s / report.decode_steps) : "–"], ["preempted", report ? count(report.preempted) : "–"], ["links", row.transports.join(" ") || "–"]];
  return el("section", { class: "card", "data-instance": row.name }, el("h3", {}, row.name, " ", badge(row.role), " ", el("span", { class: row.state === "ready" ? "good" : "warn" }, row.state)),
    kv === null ? null : el("progress", { max: 1, value: kv, "aria-label": `KV of ${row.name}` }), row.refusal ? el("p", { class: "bad" }, row.refusal) : null,
    el("dl", {}, pairs.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])),
    el("div", { class: "bar" }, el("button", { type: "button", class: "danger", onclick: () => ask(row.name, "drain", {}, `Drain ${row.name}? It finishes what it has, and leaves.`) }, "Drain"),
      others.map((role) => el("button", { type: "button", onclick: () => ask(row.name, "switch", { role }, `Make ${row.name} ${role}? It finishes what it has first.`) }, `Make ${role}`))));
}

function moving(found) {
  const out = {};
  found.status.forEach((stage, k) => {
    if (stage !== "transfer") return;
    for (const [name, way] of [[found.prefill_instance[k], "outgoing"], [found.decode_instance[k], "incoming"]]) { out[name] ??= { incoming: 0, outgoing: 0 }; out[name][way] += 1; }
  });
  return out;
}

function draw(found) {
  const starts = found.stages.flatMap((stage) => stage.start_s).filter((start) => start !== null && start > found.now_s - 60);
  const span = Math.min(60, Math.max(5, 1.2 * (found.now_s - Math.min(found.now_s, ...starts))));
  const from = found.now_s - span;
  const marks = happened.filter((one) => ["Switched", "Migrated", "Switch"].includes(one.kind) && one.at_s > from);
  const order = [...found.request_id.keys()].reverse();
  const traces = found.stages.map((stage) => {
    const [x, y, text] = [[], [], []];
    order.forEach((k, place) => {
      const [start, end] = [stage.start_s[k], stage.end_s[k]];
      if (start === null || end < from) return;
      const where = { prefill: found.prefill_instance[k], decode: found.decode_instance[k], "KV transfer": `${found.prefill_instance[k]} to ${found.decode_instance[k]}` }[stage.name];
      x.push(start - found.now_s, end - found.now_s, null);
      y.push(place, place, null);
      text.push(...Array(2).fill(literal(`request ${found.request_id[k]}${where ? `, ${where}` : ""}`)), null);
    });
    return { x, y, text, name: stage.name, mode: "lines", line: { color: stageColours[stage.name], width: 4 }, hovertemplate: `%{text}<br>${stage.name}<extra></extra>` };
  });
  traces.push({ x: marks.map((one) => one.at_s - found.now_s), y: marks.map(() => -1), text: marks.map((one) => literal(`${one.instance} ${one.words}`)), name: "role switches, migrations", mode: "markers", marker: { symbol: "diamond", size: 11, color: "#d1517a" }, hovertemplate: "%{text}<extra></extra>" });
  chart(strip, traces, { height: 420, showlegend: true, xaxis: { title: { text: "seconds ago" }, range: [-span, 0] }, yaxis: { showticklabels: false, autorange: "reversed", fixedrange: true }, uirevision: "kept" }, "Stages of the last minute's requests");
}

function list() {
  const rows = happened.slice(-100).reverse();
  table.replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, ["when", "what", "who", "request", ""].map((words) => el("th", { class: "text", scope: "col" }, words)))),
    el("tbody", {}, rows.map((one) => el("tr", {}, [`${seconds(one.at_s)}`, one.kind, one.instance, one.request_id === null ? "" : String(one.request_id), one.words].map((words, k) => el("td", { class: `text${k === 4 ? " wrap" : ""}${one.alarm ? " bad" : ""}` }, words))))))) ;
}

async function look() {
  try {
    const [view, found, news] = await Promise.all([api(`${path}/instances`), api(`${path}/timeline`), api(`${path}/events?after=${last}`), other.look()]);
    if (news.last < last) { last = 0; happened = []; return; }
    last = news.last;
    happened = [...happened, ...news.events].slice(-1000);
    const load = moving(found);
    head.textContent = `${view.leader ? `${view.leader} leads` : "no router leads"}; ${count(view.instances.length)} instances; ${count(found.status.filter((one) => !["done", "failed", "aborted", "expired", "rejected"].includes(one)).length)} requests under way`;
    const focus = document.activeElement?.closest?.("[data-instance]") ? [document.activeElement.closest("[data-instance]").dataset.instance, document.activeElement.textContent] : null;
    cards.replaceChildren(...view.instances.map((row) => card(row, load[row.name] ?? { incoming: 0, outgoing: 0 })));
    if (focus) [...cards.querySelectorAll("[data-instance]")].find((one) => one.dataset.instance === focus[0])?.querySelectorAll("button").forEach((one) => one.textContent === focus[1] && one.focus());
    const fresh = happened.filter((one) => one.alarm && one.at_s > news.now_s - 30);
    alarms.replaceChildren(...fresh.slice(-3).map((one) => el("p", { class: "note error" }, `${one.instance} ${one.words}`)));
    if (!paused) draw(found);
    if (news.events.length || !table.childElementCount) list();
    document.getElementById("line").textContent = "";
  } catch (error) {
    document.getElementById("line").textContent = "the cluster does not answer";
    tell(error);
  } finally {
    setTimeout(look, every_ms);
  }
}

look();
