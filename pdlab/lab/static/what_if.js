import { api, count, el, hush, percent, seconds, send, table, tell } from "./lab.js";

/** Another policy asked beside a cluster's own: its form, and where it would decide otherwise. `look` asks the lab for the newest. */
export function whatIf(path) {
  const list = el("datalist", { id: "policies" });
  const name = el("input", { id: "what-if", list: "policies", required: true, autocomplete: "off", size: 24 });
  const parameters = el("input", { id: "what-if-parameters", placeholder: '{"name of one": 3}', autocomplete: "off", size: 24 });
  const stop = el("button", { type: "button", hidden: true, onclick: () => change("DELETE") }, "Ask it no more");
  const form = el("form", { class: "bar", onsubmit: (event) => { event.preventDefault(); change("POST"); } },
    el("label", {}, "policy", name), el("label", {}, "parameters", parameters), list, el("button", { class: "main" }, "Ask it beside"), stop);
  const state = el("p", { id: "what-if-state" });
  const found = el("div", { id: "what-if-found" });
  let drawn = "";
  api("/policies").then((known) => list.replaceChildren(...known.map((one) => el("option", { value: one.name })))).catch(tell);

  function asked() {
    const written = parameters.value.trim();
    if (!written) return name.value.trim();
    let values;
    try { values = JSON.parse(written); } catch { values = null; }
    if (values === null || typeof values !== "object" || Array.isArray(values)) throw new Error(`parameters ${written} are no mapping; write {"name": value}`);
    return { name: name.value.trim(), ...values };
  }

  async function change(method) {
    try {
      const answer = await send(method, `${path}/what-if`, method === "POST" ? { policy: asked() } : undefined);
      hush();
      draw(method === "POST" ? answer : null);
    } catch (error) { tell(error); }
  }

  function say(view) {
    const words = view.state === "catching up" ? `catching up, ${count(view.behind_bytes)} bytes of the log to go` : view.state;
    const anew = view.restarts ? `; the router began anew ${view.restarts === 1 ? "once" : `${count(view.restarts)} times`}` : "";
    state.replaceChildren(el("b", {}, view.policy), " asked beside ", el("b", {}, view.decides || "the router's policy"), ": ",
      el("span", { class: view.state === "live" ? "good" : "warn" }, words), `; ${count(view.events)} events, up to ${seconds(view.at_s)}${anew}`);
  }

  function draw(view) {
    stop.hidden = !view;
    if (!view) { state.replaceChildren(); found.replaceChildren(); drawn = ""; return; }
    say(view);
    const figures = JSON.stringify([view.policy, view.trouble, view.hooks, view.departures]);
    if (figures === drawn) return;
    drawn = figures;
    const share = (differ, all) => (all ? `${percent(differ / all)} (${count(differ)} of ${count(all)})` : "–");
    const open = found.querySelector("details")?.open;
    found.replaceChildren(...[
      view.trouble ? el("p", { class: "note error" }, view.trouble) : null,
      view.hooks.length ? table(["decision", "would decide otherwise", "of the last ones"], view.hooks.map((one) => [one.hook, share(one.differ, one.asked), share(one.lately_differ, one.lately_asked)])) : el("p", { class: "soft" }, "nothing was decided yet"),
      view.departures.length ? el("details", { open }, el("summary", {}, "Where it would"),
        table(["when", "decision", "request", view.decides, view.policy], view.departures.map((one) => [seconds(one.at_s), one.hook, String(one.request_id ?? ""), one.decided, one.other]), { text: 5 })) : null,
    ].filter(Boolean));
  }

  const look = async () => draw(await api(`${path}/what-if`));

  return { parts: [el("h2", {}, "What if another policy decided?"), form, state, found], look };
}
