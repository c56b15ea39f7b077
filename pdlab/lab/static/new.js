import { api, el, hush, main, send, tell } from "./lab.js";

const text = el("textarea", { id: "file", spellcheck: "false", wrap: "off", "aria-label": "the experiment file", "aria-describedby": "mistakes" });
const gutter = el("pre", { "aria-hidden": "true" });
const mistakes = el("ol", { class: "mistakes", id: "mistakes", "aria-live": "polite" });
const kind = el("select", {}, [["experiments", "experiment"], ["sweeps", "sweep"], ["plans", "plan"], ["tunings", "tuning"]].map(([value, words]) => el("option", { value }, words)));
const seeds = el("input", { type: "number", min: 1, max: 1000, value: 1 });
const tags = el("input", { placeholder: "first, chat" });
const extra = el("div", { class: "form" });
const button = el("button", { class: "main", type: "button", id: "submit" }, "Submit");
const form = el("div", { class: "form" });
const label = (words, control) => el("label", {}, words, control);
const asks = {
  experiments: [],
  sweeps: [["grid", "axes, one a line", "workload.rate=4,8,16", (value) => value.split("\n").filter((line) => line.trim())]],
  plans: [["gpus", "accelerators", "8", String], ["rate", "requests/s wanted", "", Number], ["budget", "$ an hour", "", Number], ["requests", "requests of a simulation", "", Number]],
  tunings: [["policy", "policy", "", String], ["trials", "trials", "50", Number], ["judge", "seeds to judge by", "10", Number]],
};
const pages = { experiments: "/runs", sweeps: "/sweeps", plans: "/plans", tunings: "/tunings" };

main.append(
  el("h1", {}, "New"),
  el("div", { class: "split" },
    el("div", {}, el("div", { class: "bar" }, label("what", kind), label("seeds", seeds), label("tags, with commas", tags), button), extra,
      el("div", { class: "editor" }, gutter, text), mistakes),
    el("div", {}, el("h2", {}, "Make a file from the catalogue"), form)));

function asked() {
  const options = {};
  for (const control of extra.querySelectorAll("[name]")) {
    if (control.value.trim() !== "") options[control.name] = asks[kind.value].find(([name]) => name === control.name)[3](control.value);
  }
  return { experiment: text.value, seeds: Number(seeds.value), tags: tags.value.split(",").map((tag) => tag.trim()).filter(Boolean), options };
}

function lined(wrong = []) {
  const lines = text.value.split("\n").length;
  const bad = new Set(wrong.map((one) => one.line));
  gutter.replaceChildren(...Array.from({ length: lines }, (_, k) => el("span", { class: bad.has(k + 1) ? "wrong" : "" }, `${bad.has(k + 1) ? "✗ " : ""}${k + 1}\n`)));
  gutter.scrollTop = text.scrollTop;
}

function show(wrong, doubts) {
  lined(wrong);
  mistakes.replaceChildren(
    ...wrong.map((one) => el("li", {}, el("button", { type: "button", onclick: () => go(one.line) }, one.line ? `line ${one.line}: ${one.text}` : one.text))),
    ...doubts.map((line) => el("li", { class: "note" }, line)),
    ...(wrong.length ? [] : [el("li", { class: "good" }, "The file can run.")]));
  button.disabled = wrong.length > 0;
}

function go(line) {
  if (!line) return;
  const start = text.value.split("\n").slice(0, line - 1).join("\n").length + (line > 1 ? 1 : 0);
  text.focus();
  text.setSelectionRange(start, text.value.indexOf("\n", start) < 0 ? text.value.length : text.value.indexOf("\n", start));
  text.scrollTop = Math.max(0, (line - 6) * 20);
}

let timer;
let latest = 0;
const later = () => { clearTimeout(timer); timer = setTimeout(check, 350); };

async function check() {
  const mine = ++latest;
  try {
    const found = await send("POST", `/${kind.value}/validate`, asked());
    if (mine === latest) { hush(); show(found.mistakes, found.doubts); }
  } catch (error) {
    if (mine === latest) tell(error);
  }
}

text.addEventListener("input", () => { lined(); later(); });
text.addEventListener("scroll", () => { gutter.scrollTop = text.scrollTop; });
text.addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) button.click(); });
seeds.addEventListener("input", later);
kind.addEventListener("change", () => {
  extra.replaceChildren(...asks[kind.value].map(([name, words, value]) => label(words, name === "grid" ? el("textarea", { name, rows: 2 }, value) : el("input", { name, value }))));
  extra.querySelectorAll("[name]").forEach((control) => control.addEventListener("input", later));
  seeds.value = kind.value === "experiments" ? 1 : 5;
  later();
});
button.addEventListener("click", async () => {
  button.disabled = true;
  try {
    const job = await send("POST", `/${kind.value}`, asked());
    location.href = `${pages[kind.value]}/${job.id}`;
  } catch (error) {
    button.disabled = false;
    error.mistakes?.length ? show(error.mistakes, []) : tell(error);
  }
});

// ------------------------------------------------------------ the form

const fields = {};
const choose = (name, words, values, value) => {
  fields[name] = el("select", { id: `field-${name}` }, values.map((one) => el("option", { value: one }, one)));
  fields[name].value = value;
  return label(words, fields[name]);
};
const fill = (name, words, value, kind = "number") => { fields[name] = el("input", { id: `field-${name}`, type: kind, value, step: "any" }); return label(words, fields[name]); };
const quoted = (value) => (/^[\w./:-]+$/.test(value) ? value : JSON.stringify(value));

function written(policies) {
  const f = Object.fromEntries(Object.entries(fields).map(([name, control]) => [name, control.value]));
  const own = policies.find((one) => one.name === f.policy).parameters.map((one) => [one, document.getElementById(`parameter-${one.name}`)?.value ?? ""]).filter(([one, value]) => value !== "" && value !== String(one.default ?? ""));
  const policy = own.length ? `{name: ${f.policy}, ${own.map(([one, value]) => `${one.name}: ${quoted(value)}`).join(", ")}}` : f.policy;
  const lengths = f.workload === "synthetic" ? `, prompt: ${f.prompt}, output: ${f.output}` : "";
  return `name: ${quoted(f.name)}
seed: 0
model: ${f.model}
workload: {source: ${f.workload}, requests: ${f.requests}, rate: ${f.rate}${lengths}}
cluster:
  instances:
    - {role: prefill, count: ${f.prefill}, hardware: ${f.hardware}, tp: ${f.tp}}
    - {role: decode, count: ${f.decode}, hardware: ${f.hardware}, tp: ${f.tp}}
policy: ${policy}
slo: {ttft_s: ${f.ttft}, tpot_s: ${f.tpot}}
`;
}

async function make() {
  const [policies, models, chips, sources] = await Promise.all(["/policies", "/models", "/hardware", "/workloads"].map((path) => api(path)));
  const able = policies.filter((one) => one.decides.includes("dispatch"));
  const parameters = el("div", { class: "form", style: "grid-column:1/-1" });
  const how = el("p", { class: "soft", style: "grid-column:1/-1" });
  form.append(
    fill("name", "name", "mine", "text"), choose("model", "model", models.map((one) => one.name), "llama-3.1-8b"),
    el("h3", {}, "Workload"), choose("workload", "source", sources.map((one) => one.name), "azure-conv-2023"), fill("requests", "requests", 2000), fill("rate", "requests/s", 8), fill("prompt", "prompt tokens (synthetic)", 1024), fill("output", "output tokens (synthetic)", 128),
    el("h3", {}, "Cluster"), choose("hardware", "accelerator", chips.map((one) => one.name), "h100-sxm"), fill("tp", "tp", 1), fill("prefill", "prefill instances", 2), fill("decode", "decode instances", 2),
    el("h3", {}, "Policy"), choose("policy", "policy", able.map((one) => one.name), "least_loaded"), how, parameters,
    el("h3", {}, "Objectives"), fill("ttft", "TTFT, s", 1), fill("tpot", "TPOT, s", 0.05),
    el("button", { type: "button", style: "grid-column:1/-1", id: "make", onclick: () => { text.value = written(policies); lined(); check(); text.focus(); } }, "Write the file"));
  const shown = () => {
    const one = policies.find((policy) => policy.name === fields.policy.value);
    how.textContent = one.how;
    parameters.replaceChildren(...one.parameters.map((parameter) => label(`${parameter.name}${parameter.bounds ? ` (${parameter.bounds})` : ""}`,
      parameter.choices.length ? el("select", { id: `parameter-${parameter.name}` }, [...(parameter.optional ? [""] : []), ...parameter.choices.map(String)].map((value) => el("option", { value, selected: value === String(parameter.default) }, value))) : el("input", { id: `parameter-${parameter.name}`, value: parameter.default ?? "", disabled: parameter.type === "other" }))));
  };
  fields.policy.addEventListener("change", shown);
  shown();
  const again = new URLSearchParams(location.search).get("from");
  text.value = again ? (await api(`/jobs/${encodeURIComponent(again)}`)).experiment : written(policies);
  lined();
  check();
}

make().catch(tell);
