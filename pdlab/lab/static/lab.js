// What all pages share. Whatever comes from outside becomes text, never markup.

export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

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

// ------------------------------------------------------------ words for figures

const missing = "–";
const three = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2));
export const seconds = (value) =>
  value === null || value === undefined ? missing : value === 0 ? "0 s" : Math.abs(value) < 1e-3 ? `${three(value * 1e6)} µs` : Math.abs(value) < 1 ? `${three(value * 1e3)} ms` : `${three(value)} s`;
export const percent = (value) => (value === null || value === undefined ? missing : `${(value * 100).toFixed(value > 0.999 && value < 1 ? 2 : 1).replace(/\.0$/, "")} %`);
export const number = (value) => (value === null || value === undefined ? missing : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(3)));
export const count = (value) => (value === null || value === undefined ? missing : value.toLocaleString("en"));
export const when = (unix) => (unix ? new Date(unix * 1000).toLocaleString() : missing);

// ------------------------------------------------------------ parts of pages

export const tile = (value, label, tone = "") => el("div", { class: "tile" }, el("b", { class: tone }, value), el("span", {}, label));
export const tones = { done: "good", failed: "bad", cancelled: "warn", queued: "soft", running: "" };
export const badge = (state) => el("span", { class: `badge ${tones[state] ?? ""}` }, state);
export const ended = (state) => ["done", "failed", "cancelled"].includes(state);

export function table(heads, rows, { text = 1 } = {}) {
  const cell = (kind, value, index) => el(kind, { class: index < text ? "text" : "" , scope: kind === "th" ? "col" : null }, value);
  return el(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": "table" },
    el("table", {}, el("thead", {}, el("tr", {}, heads.map((head, k) => cell("th", head, k)))), el("tbody", {}, rows.map((row) => el("tr", {}, row.map((value, k) => cell("td", value, k)))))),
  );
}

/** A table whose heads sort it: columns are {head, text, value(row), show(row)}. */
export function sortable(columns, rows, by = 0, down = true) {
  const place = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "table" });
  const draw = () => {
    const key = columns[by].value;
    const order = [...rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === null || x === undefined) return 1;
      if (y === null || y === undefined) return -1;
      return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
    });
    const heads = columns.map((column, k) =>
      el("th", { class: column.text ? "text" : "", scope: "col", "aria-sort": k === by ? (down ? "descending" : "ascending") : "none" },
        el("button", { type: "button", onclick: () => { down = k === by ? !down : true; by = k; draw(); place.querySelectorAll("th button")[k].focus(); } }, column.head)));
    const body = order.map((row) => el("tr", {}, columns.map((column) => el("td", { class: column.text ? "text" : "" }, column.show(row)))));
    place.replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, heads)), el("tbody", {}, body)));
  };
  draw();
  return place;
}

export function confirmed(question, yes) {
  return new Promise((done) => {
    const box = el("dialog", { "aria-label": question }, el("p", {}, question),
      el("div", { class: "bar" }, el("button", { class: "danger", type: "button", id: "yes", onclick: () => box.close("yes") }, yes), el("button", { type: "button", autofocus: true, onclick: () => box.close("") }, "No")));
    box.addEventListener("close", () => { box.remove(); done(box.returnValue === "yes"); });
    document.body.append(box);
    box.showModal();
  });
}

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
