// A run's figures and tables, alike on the lab's page and in report.html.
import { count, number, percent, plain, seconds, size, sortable } from "./parts.js";
import { chart, limit, literal, palette, stageColours } from "./charts.js";

export function distribution(place, figures, key, words, objective) {
  const values = figures.cdf[key];
  if (!values) return;
  chart(place, [{ x: values, y: figures.shares, mode: "lines", name: words, line: { color: palette[0] }, hovertemplate: "%{y:.1%} within %{x:.4g} s<extra></extra>" }],
    { height: 320, title: { text: `${words}: share of the requests` }, xaxis: { title: { text: "seconds" }, rangemode: "tozero" }, yaxis: { tickformat: ".0%", range: [0, 1.01] }, shapes: objective ? [limit(objective, "objective")] : [] }, `${words} distribution`);
}

export function loads(place, load) {
  const names = Object.keys(load.instances);
  const rows = [["waiting", "waiting"], ["running", "running"], ["kv_use", "KV use"]];
  const traces = rows.flatMap(([key], row) => names.map((name, k) => ({ x: load.time_s, y: load.instances[name][key], name: literal(name), legendgroup: name, showlegend: row === 0, mode: "lines", connectgaps: true, line: { color: palette[k % palette.length], width: 1.4 }, xaxis: "x", yaxis: row ? `y${row + 1}` : "y" })));
  const layout = { height: 560, showlegend: true, grid: { rows: 3, columns: 1 }, hovermode: "x unified", xaxis: { title: { text: "seconds" }, anchor: "y3" } };
  rows.forEach(([, words], row) => { layout[row ? `yaxis${row + 1}` : "yaxis"] = { title: { text: words }, domain: [1 - (row + 1) / 3 + 0.04, 1 - row / 3 - 0.02], rangemode: "tozero", ...(row === 2 ? { tickformat: ".0%" } : {}) }; });
  chart(place, traces, layout, "Waiting requests, running sequences and KV use of each instance over time");
}

/** The stages of some requests, a line each. `range` is of time; without one all of it is shown. */
export function strip(place, found, title, range = null) {
  const traces = found.stages.map((stage) => {
    const [x, y] = [[], []];
    stage.start_s.forEach((start, k) => { if (start !== null && stage.end_s[k] !== null && stage.end_s[k] >= start) { x.push(start, stage.end_s[k], null); y.push(k, k, null); } });
    const where = { prefill: "prefill_instance", decode: "decode_instance" }[stage.name];
    return { x, y, name: stage.name, mode: "lines", line: { color: stageColours[stage.name], width: Math.max(2, Math.min(9, 420 / found.request_id.length)) },
      text: y.map((k) => (k === null ? null : `request ${found.request_id[k]}${where && found[where][k] ? ` on ${literal(found[where][k])}` : ""}`)), hovertemplate: `%{text}<br>${stage.name} %{x:.4g} s<extra></extra>` };
  });
  return chart(place, traces, { height: 500, showlegend: true, title: { text: title }, xaxis: { title: { text: "seconds" }, ...(range ? { range } : {}) }, yaxis: { showticklabels: false, autorange: "reversed", fixedrange: true } }, "Stages of some requests over time");
}

export const worst = (rows) => sortable([
  plain("request", "request_id", String), plain("times its objective", "times_objective", (value) => (value === null ? "not served" : number(value))), plain("status", "status", undefined, true), plain("TTFT", "ttft_s", seconds), plain("TPOT", "tpot_s", seconds), plain("E2E", "e2e_s", seconds), plain("queue", "queue_s", seconds), plain("KV transfer", "transfer_s", seconds),
  plain("prompt", "prompt_tokens", count), plain("output", "output_tokens", count), plain("arrival", "arrival_s", seconds), plain("prefill", "prefill_instance", undefined, true), plain("decode", "decode_instance", undefined, true), plain("preempted", "preemptions", count), plain("reason", "reason", undefined, true)], rows, 1);
export const instances = (rows) => sortable([
  plain("instance", "name", String, true), plain("role", "role", String, true), { head: "hardware", text: true, value: (row) => row.hardware, show: (row) => (row.hardware ? `${row.accelerators} x ${row.hardware}` : String(row.accelerators)) }, plain("busy", "busy_fraction", percent), plain("prefill", "prefill_busy_fraction", percent), plain("decode", "decode_busy_fraction", percent), plain("KV mean", "kv_use_mean", percent), plain("KV peak", "kv_use_peak", percent), plain("requests", "requests", count), plain("prefill tokens", "prefill_tokens", count), plain("decode tokens", "decode_tokens", count)], rows, 0, false);

export const links = (rows) => sortable([
  plain("link", "name", String, true), plain("busy", "busy_fraction", percent), plain("used", "utilisation", percent), plain("carried", "bytes", size), plain("capacity", "capacity_bytes_per_s", (value) => `${size(value)}/s`), plain("most transfers at once", "peak_flows", count)], rows, 0, false);
