// Parts of pages, and words for figures. Whatever comes from outside becomes text, never markup.

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

// ------------------------------------------------------------ words for figures

const missing = "–";
const three = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2));
export const seconds = (value) =>
  value === null || value === undefined ? missing : value === 0 ? "0 s" : Math.abs(value) < 1e-3 ? `${three(value * 1e6)} µs` : Math.abs(value) < 1 ? `${three(value * 1e3)} ms` : `${three(value)} s`;
export const percent = (value) => (value === null || value === undefined ? missing : `${(value * 100).toFixed(value > 0.999 && value < 1 ? 2 : 1).replace(/\.0$/, "")} %`);
export const number = (value) => (value === null || value === undefined ? missing : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(3)));
export const count = (value) => (value === null || value === undefined ? missing : value.toLocaleString("en"));
export const size = (value) => {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  const k = value ? Math.min(units.length - 1, Math.floor(Math.log10(value) / 3)) : 0;
  return value === null || value === undefined ? missing : `${+(value / 1000 ** k).toPrecision(3)} ${units[k]}`;
};
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

/** A column of `sortable`. */
export const plain = (head, key, show = (value) => value ?? "–", text = false) => ({ head, text, value: (row) => row[key], show: (row) => show(row[key]) });
