// Figures in the page's own colours; they follow light and dark, and the width.
/* global Plotly */

export const palette = ["#2f7ed8", "#e0803a", "#3aa06b", "#8e62c7", "#d1517a", "#2aa5b0", "#a08a2c", "#6f7b8a"];
export const stageColours = { queued: "#9aa3ad", prefill: "#2f7ed8", "wait for room": "#d9a441", "KV transfer": "#8e62c7", "wait to decode": "#c78a8a", decode: "#3aa06b" };
const drawn = new Set();
const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function dressed(layout) {
  const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"), automargin: true };
  const found = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: colour("--ink"), family: "system-ui, sans-serif", size: 13 },
    margin: { l: 50, r: 14, t: 40, b: layout.showlegend ? 80 : 46 }, legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0 }, showlegend: false, hoverlabel: { bgcolor: colour("--box"), font: { color: colour("--ink") } },
    ...layout,
  };
  for (const key of Object.keys(found).filter((key) => /^[xy]axis/.test(key))) found[key] = { ...axis, ...found[key] };
  found.xaxis ??= axis;
  found.yaxis ??= axis;
  return found;
}

/** A name as it is: Plotly would read markup in it. */
export const literal = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

/** Draw, or draw anew. `label` is what a reader without eyes is told. */
export function chart(place, traces, layout, label) {
  place.classList.add("chart");
  place.setAttribute("role", "img");
  place.setAttribute("aria-label", label);
  place.figure = [traces, layout];
  drawn.add(place);
  return Plotly.react(place, traces, dressed(layout), config);
}

export const limit = (at, words, axis = "x") => {
  const line = axis === "x" ? { x0: at, x1: at, y0: 0, y1: 1, yref: "paper" } : { y0: at, y1: at, x0: 0, x1: 1, xref: "paper" };
  return { type: "line", ...line, line: { color: "#d43d3d", width: 1.5, dash: "dash" }, name: words };
};

addEventListener("theme", () => {
  for (const place of drawn) if (place.isConnected && place.figure) Plotly.react(place, place.figure[0], dressed(place.figure[1]), config);
});
