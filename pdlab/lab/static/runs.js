import { api, badge, count, el, ended, hush, listen, main, number, percent, seconds, tell, when } from "./lab.js";

const kinds = { experiment: "experiments", plan: "plans", sweep: "sweeps", tuning: "tunings", board: "boards" };
const places = { experiment: "/runs", plan: "/plans", sweep: "/sweeps", tuning: "/tunings", board: "/boards" };
const query = new URLSearchParams(location.search);
const asked = { kind: "experiment", state: "", tag: "", text: "", sort: "submitted_s", descending: "true", offset: 0, limit: 100 };
for (const name of Object.keys(asked)) if (query.has(name)) asked[name] = query.get(name);
const chosen = new Map();
const rows = new Map();
let total = 0;

const columns = [
  ["name", "name", (job) => el("a", { href: `${places[job.kind]}/${job.id}` }, job.name), true],
  ["state", "state", state, true],
  ["policy", "policy", (job) => el("span", { class: "wrap" }, job.policy), true],
  ["model", "model", (job) => job.model, true],
  ["", "tags", (job) => job.tags.map((tag) => el("span", { class: "tag" }, tag)), true],
  ["requests", "requests", (job) => count(job.requests)],
  ["slo_attainment", "attainment", (job) => percent(job.slo_attainment)],
  ["goodput_rps", "goodput, req/s", (job) => number(job.goodput_rps)],
  ["ttft_p99_s", "TTFT p99", (job) => seconds(job.ttft_p99_s)],
  ["tpot_p99_s", "TPOT p99", (job) => seconds(job.tpot_p99_s)],
  ["submitted_s", "submitted", (job) => when(job.submitted_s)],
];

function state(job) {
  const { done, total: all } = job.progress;
  return job.state === "running" && all ? [badge(job.state), " ", el("progress", { max: all, value: done, "aria-label": `${done} of ${all}` })] : badge(job.state);
}

const field = (name, label, control) => {
  control.value = asked[name];
  control.name = name;
  control.addEventListener(control.tagName === "INPUT" ? "input" : "change", () => { asked[name] = control.value; asked.offset = 0; later(); });
  return el("label", {}, label, control);
};
const options = (...values) => values.map(([value, words]) => el("option", { value }, words));
const tagged = el("select", {}, ...options(["", "any"]));
const compare = el("button", { class: "main", type: "button", disabled: true, id: "compare", onclick: () => { location.href = `/compare?ids=${[...chosen.keys()].join(",")}`; } }, "Compare");
const listed = el("div", { class: "scroll" });
const paging = el("div", { class: "bar" });

main.append(
  el("h1", {}, "Runs"),
  el("div", { class: "bar", role: "search" },
    field("kind", "what", el("select", {}, ...options(...Object.entries(kinds)))),
    field("text", "name, policy, model or id", el("input", { type: "search", maxlength: 200 })),
    field("state", "state", el("select", {}, ...options(["", "any"], ...["queued", "running", "done", "failed", "cancelled"].map((word) => [word, word])))),
    field("tag", "tag", tagged), compare),
  listed, paging);

let timer;
const later = () => { clearTimeout(timer); timer = setTimeout(load, 200); };

async function load() {
  const wanted = new URLSearchParams(Object.entries(asked).filter(([name, value]) => value !== "" && name !== "kind"));
  history.replaceState(null, "", `?${new URLSearchParams(Object.entries(asked).filter(([, value]) => value !== ""))}`);
  try {
    const found = await api(`/${kinds[asked.kind] ?? "experiments"}?${wanted}`);
    hush();
    rows.clear();
    for (const job of found.jobs) rows.set(job.id, job);
    total = found.total;
    draw();
  } catch (error) {
    tell(error);
  }
}

function row(job) {
  const box = el("input", { type: "checkbox", "aria-label": `choose ${job.name}`, disabled: job.kind !== "experiment" || job.state !== "done", checked: chosen.has(job.id) });
  const made = el("tr", { "data-id": job.id, class: chosen.has(job.id) ? "chosen" : "" }, el("td", { class: "text" }, box), columns.map(([, , show, text]) => el("td", { class: text ? "text" : "" }, show(job))));
  box.addEventListener("change", () => { box.checked ? chosen.set(job.id, job) : chosen.delete(job.id); made.classList.toggle("chosen", box.checked); counted(); });
  return made;
}

function counted() {
  compare.disabled = chosen.size < 2 || chosen.size > 8;
  compare.textContent = chosen.size ? `Compare ${chosen.size} chosen` : "Compare";
}

function draw() {
  const heads = columns.map(([sort, words, , text]) => {
    const way = asked.sort === sort ? (asked.descending === "true" ? "descending" : "ascending") : "none";
    const by = () => { asked.descending = String(asked.sort === sort ? asked.descending !== "true" : true); asked.sort = sort; asked.offset = 0; load(); };
    return el("th", { class: text ? "text" : "", scope: "col", "aria-sort": sort ? way : null }, sort ? el("button", { type: "button", onclick: by }, words) : words);
  });
  const none = el("p", { class: "soft" }, "Nothing here yet. ", el("a", { href: "/new" }, "Submit an experiment"), ".");
  listed.replaceChildren(rows.size ? el("table", {}, el("thead", {}, el("tr", {}, el("th", { class: "text" }, el("span", { class: "soft" }, "✓")), heads)), el("tbody", {}, [...rows.values()].map(row))) : none);
  const [from, size] = [Number(asked.offset), Number(asked.limit)];
  const go = (offset) => () => { asked.offset = offset; load(); };
  paging.replaceChildren(el("span", { class: "soft" }, total ? `${count(from + 1)} to ${count(Math.min(from + size, total))} of ${count(total)}` : ""),
    el("button", { type: "button", disabled: from === 0, onclick: go(Math.max(0, from - size)) }, "Earlier"), el("button", { type: "button", disabled: from + size >= total, onclick: go(from + size) }, "Later"));
  counted();
}

listen("/events", (job) => {
  if (rows.has(job.id)) {
    const last = rows.get(job.id);
    rows.set(job.id, job);
    listed.querySelector(`tr[data-id="${job.id}"]`)?.replaceWith(row(job));
    if (ended(job.state) && !ended(last.state)) counted();
  } else if (job.kind === asked.kind && asked.offset === 0) later();
});
api("/tags").then((tags) => { tagged.append(...options(...tags.map((tag) => [tag, tag]))); tagged.value = asked.tag; }).catch(tell);
load();
