import { api, confirmed, count, el, hush, main, plain, send, size, sortable, tell, when } from "./lab.js";

const kinds = ["trace", "config", "profile", "rows", "policy"];
const file = el("input", { type: "file", required: true });
const kind = el("select", {}, kinds.map((name) => el("option", {}, name)));
const said = el("p", { role: "status" });
const listed = el("div", {});
main.append(
  el("h1", {}, "Uploads"), el("p", { class: "soft" }, "Files that experiments name. Policies are code: a lab takes them only with --allow-code."),
  el("form", { class: "bar", onsubmit: (event) => { event.preventDefault(); add(file.files[0]); } },
    el("label", {}, "file", file), el("label", {}, "kind", kind), el("button", { class: "main" }, "Upload")),
  said, listed);

async function add(chosen) {
  try {
    const found = await api(`/uploads?${new URLSearchParams({ name: chosen.name, kind: kind.value })}`, { method: "POST", headers: { "content-type": "application/octet-stream" }, body: chosen });
    hush();
    said.textContent = `${found.name} is there.`;
    await list();
  } catch (error) { tell(error); }
}

async function remove(row) {
  if (!(await confirmed(`Delete ${row.name}? Experiments that name it cannot run again.`, "Delete it"))) return;
  try {
    await send("DELETE", `/uploads/${encodeURIComponent(row.name)}`);
    hush();
    said.textContent = `${row.name} is deleted.`;
    await list();
  } catch (error) { tell(error); }
}

async function list() {
  const rows = await api("/uploads");
  const all = rows.reduce((sum, row) => sum + row.bytes, 0);
  listed.replaceChildren(...(rows.length
    ? [el("p", { class: "soft" }, `${count(rows.length)} ${rows.length === 1 ? "file" : "files"}, ${size(all)}`),
      sortable([plain("name", "name", String, true), plain("kind", "kind", String, true), plain("size", "bytes", size), plain("added", "added_s", when),
        { head: "", value: () => 0, show: (row) => el("button", { type: "button", class: "danger", "aria-label": `Delete ${row.name}`, onclick: () => remove(row) }, "Delete") }], rows, 0, false)]
    : [el("p", {}, "There are none.")]));
}

list().catch(tell);
