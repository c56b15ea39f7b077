// report.html: its figures, from what lies in the page itself. The tables are there without it, and can be sorted with it.
import { distribution, instances, links, loads, strip, worst } from "./run_figures.js";
import { count } from "./parts.js";

const at = (id) => document.getElementById(id);
const told = JSON.parse(at("told").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
dark.addEventListener("change", () => dispatchEvent(new Event("theme")));
for (const [id, made] of Object.entries({ instances, links, worst })) if (at(id)) at(id).replaceChildren(made(told[id]));

/** The library that draws is packed, so that the file stays small. */
async function unpacked() {
  const packed = Uint8Array.from(atob(at("plotly").textContent), (letter) => letter.charCodeAt(0));
  const script = document.createElement("script");
  script.textContent = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  document.head.append(script);
}

async function draw() {
  await unpacked();
  distribution(at("ttft"), told, "ttft_s", "TTFT", told.slo.ttft_s);
  distribution(at("tpot"), told, "tpot_s", "TPOT", told.slo.tpot_s);
  if (at("load")) loads(at("load"), told.load);
  strip(at("lanes"), told.lanes, `${count(told.lanes.request_id.length)} consecutive requests of ${count(told.lanes.requests)}`);
}

draw().catch((error) => { for (const place of document.querySelectorAll(".chart")) place.textContent = `This browser cannot draw it: ${error.message}`; });
