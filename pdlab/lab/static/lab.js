// What all pages of the lab share. Whatever comes from outside becomes text, never markup.
import { el, when } from "./parts.js";

export * from "./parts.js";

export const main = document.querySelector("main");
export const page = main.dataset;

export class Wrong extends Error {
  constructor(status, told) {
    super((told.errors || ["the lab's answer cannot be read"]).join("\n"));
    this.status = status;
    this.mistakes = told.mistakes || [];
  }
}

export async function api(path, options = {}) {
  let answer;
  try {
    answer = await fetch(`/api/v1${path}`, options);
  } catch {
    throw new Wrong(0, { errors: ["the lab does not answer: is it running?"] });
  }
  if (answer.status === 401) location.href = "/login";
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Wrong(answer.status, body);
  return body;
}

export const send = (method, path, body) =>
  api(path, { method, headers: { "content-type": "application/json" }, body: body === undefined ? undefined : JSON.stringify(body) });

export function tell(error, place = document.getElementById("told")) {
  place.replaceChildren(...String(error.message || error).split("\n").map((line) => el("p", { class: "note error", role: "alert" }, line)));
}

export const hush = () => document.getElementById("told").replaceChildren();

export function confirmed(question, yes) {
  return new Promise((done) => {
    const box = el("dialog", { "aria-label": question }, el("p", {}, question),
      el("div", { class: "bar" }, el("button", { class: "danger", type: "button", id: "yes", onclick: () => box.close("yes") }, yes), el("button", { type: "button", autofocus: true, onclick: () => box.close("") }, "No")));
    box.addEventListener("close", () => { box.remove(); done(box.returnValue === "yes"); });
    document.body.append(box);
    box.showModal();
  });
}

/** A button that deletes what has ended, after it has asked. */
export const remover = (job, path) => el("button", { class: "danger", type: "button", id: "delete", onclick: async () => {
  if (!(await confirmed(`Delete ${job.name} and its files?`, "Delete it"))) return;
  try { await send("DELETE", `${path}/results`); location.href = "/"; } catch (error) { tell(error); }
} }, "Delete");

/** Server-sent events: `heard` gets each job; a connection that breaks is said to be, and comes back by itself. */
export function listen(path, heard) {
  const source = new EventSource(`/api/v1${path}`);
  const line = document.getElementById("line");
  source.addEventListener("job", (event) => heard(JSON.parse(event.data)));
  source.addEventListener("end", () => source.close());
  source.addEventListener("open", () => { line.textContent = ""; });
  source.addEventListener("error", () => {
    line.textContent = "connection lost, trying again";
    if (source.readyState === EventSource.CLOSED) setTimeout(() => { listen(path, heard); }, 2000);
  });
  addEventListener("pagehide", () => source.close());
  return source;
}

// ------------------------------------------------------------ silence

const QUIET_MS = 30_000;
let told = null; // what was heard last, and when that came here: clocks differ
const silent = el("p", { class: "note", role: "status", hidden: true });
/** Says so where nothing more is heard of a running job. */
export function watched(job, place) {
  if (job.state !== "running") told = null;
  else if (told?.heard_s !== job.heard_s) told = { heard_s: job.heard_s, at: Date.now() };
  if (!silent.isConnected) place.after(silent);
  quiet();
}
function quiet() {
  silent.hidden = told === null || Date.now() - told.at < QUIET_MS;
  if (!silent.hidden) silent.textContent = `Nothing was heard of it since ${when(told.heard_s)}.`;
}
setInterval(quiet, 5000);

// ------------------------------------------------------------ light and dark

const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");
const kept = () => { try { return localStorage.getItem("theme"); } catch { return null; } };
const applied = () => { root.dataset.theme = kept() || (dark.matches ? "dark" : "light"); dispatchEvent(new Event("theme")); };
applied();
dark.addEventListener("change", applied);
document.getElementById("theme").addEventListener("click", () => {
  try { localStorage.setItem("theme", root.dataset.theme === "dark" ? "light" : "dark"); } catch { /* this browser keeps nothing */ }
  applied();
});
