// The plots: which there are and what each draws. All share one x axis.

const EVENTS = { // kind: [sign, symbol, colour, whether a line crosses every plot, height of the symbol]
  start: ["▷", "triangle-right-open", "--faint", false, 0.03],
  changed: ["▶", "triangle-right", "--warn", true],
  save: ["■", "square", "--faint", false, 0.08],
  eval: ["◆", "diamond", "--part-3", false, 0.13],
  skip: ["✕", "x", "--bad", true],
  suspect: ["?", "x-thin-open", "--warn", true],
  restore: ["↩", "triangle-left", "--warn", true],
  fallback: ["▼", "triangle-down", "--bad", true],
  rewind: ["«", "triangle-left-open", "--warn", true],
  restart: ["⟲", "circle-open", "--warn", true],
  save_failed: ["!", "square-x-open", "--bad", true],
  report_failed: ["!", "square-x-open", "--warn", false, 0.18],
  refuse: ["⊘", "circle-x-open", "--bad", true],
  stop: ["●", "circle", "--soft", false, 0.03],
};
const PARTS = { compute: "solid", data: "dot", save: "square", eval: "diamond" }; // dash of a line, or symbol
const SPLIT = { compute: "--part-0", data: "--part-1", save: "--part-2", eval: "--part-3", repeated: "--bad", "starting, waiting": "--part-4" };

const peak = RUNS.map((run) => run.started.mfu_peak_flops).find(Boolean);
const has = (name) => RUNS.some((run) => run.curves[name]);
// First the score that the runs have in common, whatever else the first of them was scored on.
const scoreNames = [...new Set(["bits_per_byte", ...RUNS.flatMap((run) => Object.keys(run.scores))])].filter((name) => RUNS.some((run) => run.scores[name]));
const sourceNames = scoreNames.filter((name) => name.startsWith("bits_per_byte/"));
const PLOTS = [
  { id: "loss", title: "Loss", subtitle: "nats per token", wide: true, log: true, traces: () => line("loss") },
  { id: "score", title: "Evaluation", subtitle: "± standard error", if: scoreNames.length, traces: scoreTraces, select: scoreNames },
  { id: "sources", title: "By source, newest", subtitle: "bits per byte ± standard error", if: sourceNames.length > 1, traces: sourceTraces, own: true },
  { id: "grad_norm", title: "Gradient norm", subtitle: "before clipping", log: true, traces: () => line("grad_norm") },
  { id: "learning_rate", title: "Learning rate", subtitle: "", traces: () => line("learning_rate"), format: ".3~g" },
  { id: "batch_tokens", title: "Batch size", subtitle: "tokens per step", traces: () => line("batch_tokens"), zero: true },
  { id: "tokens_per_second", title: "Throughput", subtitle: "tokens per second, without saves and evaluations", traces: () => line("tokens_per_second"), zero: true },
  { id: "mfu", title: "MFU", subtitle: peak && `of ${short(peak)}FLOP/s per device`, traces: () => line("mfu"), zero: true, percent: true },
  { id: "parts", title: "Seconds per step", subtitle: "— compute  ··· data  ■ save  ◆ eval", if: has("compute") || has("data"), traces: partTraces, always: "log" },
  { id: "split", title: "Where the time went", subtitle: "of all running time", wide: true, if: RUNS.some((run) => Object.values(run.time).some((s) => s > 0)), traces: splitTraces, own: true },
].filter((plot) => (plot.if === undefined ? has(plot.id) : plot.if));

const isOn = (index) => !view.off.includes(RUNS[index].name);
const on = () => RUNS.map((_, index) => index).filter(isOn);
const colour = (index) => css(`--run-${index % 8}`); // plotly takes no var(...)

function timeUnit() {
  const most = Math.max(0, ...RUNS.flatMap((run) => Object.values(run.curves).map((curve) => curve.seconds.at(-1) || 0)));
  return most > 3 * 86400 ? [86400, "days"] : most > 7200 ? [3600, "hours"] : most > 180 ? [60, "minutes"] : [1, "seconds"];
}

const xs = (curve) => (view.x === "time" ? curve.seconds.map((s) => s / timeUnit()[0]) : curve[view.x]);

// What is drawn of one run; `role` says which part of the plot it is.
const trace = (index, role, more) => ({ type: "scatter", mode: "lines", name: nameOf(index), meta: { run: index, role }, ...more });

function line(name) {
  return on().flatMap((index) => {
    const { curves } = RUNS[index], curve = curves[name], color = colour(index);
    const smooth = view.smooth && curves[`${name}_smooth`], bad = name === "loss" && curves.not_finite;
    const mode = curve?.value.length === 1 ? "markers" : "lines", cross = { symbol: "x", size: 8, color: css("--bad") };
    return [
      curve && trace(index, name, { mode, x: xs(curve), y: curve.value, line: { color, width: smooth ? 1 : 1.5 }, marker: { color }, opacity: smooth ? 0.35 : 1 }),
      smooth && trace(index, `${name}_smooth`, { name: `${nameOf(index)}, smoothed`, x: xs(smooth), y: smooth.value, line: { color, width: 2 } }),
      bad && trace(index, "not_finite", { name: "not finite", mode: "markers", x: xs(bad), y: bad.step.map(() => 0.9), yaxis: "y2", marker: cross, text: bad.step.map((s) => `${nameOf(index)}: step ${s}`), hovertemplate: "%{text}<extra>loss is not finite</extra>" }),
    ].filter(Boolean);
  });
}

function scoreTraces() {
  const name = scoreNames.includes(view.score) ? view.score : scoreNames[0];
  return on().filter((index) => RUNS[index].scores[name]).flatMap((index) => {
    const score = RUNS[index].scores[name], x = xs(score), color = colour(index), error = score.stderr.map((e) => e ?? 0);
    const band = x.length > 1 && { x, line: { width: 0 }, hoverinfo: "skip", showlegend: false };
    const edge = (sign) => score.value.map((v, i) => (v === null ? null : v + sign * error[i]));
    const margin = score.stderr.map((e) => (e === null ? "" : ` ± ${e.toPrecision(3)}`));
    return [
      band && trace(index, "low", { ...band, y: edge(-1) }),
      band && trace(index, "high", { ...band, y: edge(1), fill: "tonexty", fillcolor: clear(color, 0.15) }),
      trace(index, "score", { mode: "lines+markers", x, y: score.value, line: { color, width: 2 }, marker: { color, size: 6 }, customdata: margin, hovertemplate: "%{y:.4f}%{customdata}", error_y: band ? undefined : { array: error, color, thickness: 1 } }),
    ].filter(Boolean);
  });
}

function sourceTraces() {
  return on().filter((index) => sourceNames.some((name) => RUNS[index].scores[name])).map((index) => {
    const names = sourceNames.filter((name) => RUNS[index].scores[name]), color = colour(index);
    const y = names.map((name) => cut(name.replace(/^bits_per_byte\//, "")));
    const [x, error] = ["value", "stderr"].map((key) => names.map((name) => RUNS[index].scores[name][key].at(-1)));
    return trace(index, "sources", { mode: "markers", orientation: "h", y, x, error_x: { array: error.map((e) => e ?? 0), thickness: 1, width: 3, color }, marker: { color, size: 8 }, hovertemplate: "%{x:.4f}" });
  });
}

function partTraces() {
  return on().flatMap((index) => Object.entries(PARTS).filter(([part]) => RUNS[index].curves[part]).map(([part, style]) => {
    const curve = RUNS[index].curves[part], spikes = part === "save" || part === "eval", color = colour(index);
    const dash = spikes ? undefined : style, symbol = spikes ? style : "circle", name = several ? `${nameOf(index)}: ${part}` : part;
    return trace(index, part, { name, mode: spikes ? "markers" : "lines", x: xs(curve), y: curve.value.map((v) => (v > 0 ? v : null)), line: { color, width: 1.5, dash }, marker: { symbol, color, size: 6 }, hovertemplate: "%{y:.3g} s" });
  }));
}

function decades() {
  const all = RUNS.flatMap((run) => Object.keys(PARTS).flatMap((part) => (run.curves[part] || { value: [] }).value)).filter((v) => v > 0);
  return Math.log10(all.reduce((a, b) => Math.max(a, b), 0) / all.reduce((a, b) => Math.min(a, b), Infinity));
}

function splitTraces() {
  return Object.entries(SPLIT).filter(([part]) => RUNS.some((run) => run.time[part] > 0)).map(([part, name]) => {
    const total = (run) => Object.values(run.time).reduce((a, b) => a + b, 0) || 1;
    return { type: "bar", orientation: "h", name: part, y: on().map((i) => cut(RUNS[i].name)), x: on().map((i) => RUNS[i].time[part] / total(RUNS[i])), customdata: on().map((i) => duration(RUNS[i].time[part])), hovertemplate: "%{x:.1%}, %{customdata}", marker: { color: css(name) }, showlegend: true, meta: { role: part } };
  });
}

// Events that changed the course of a run are drawn in every plot, frequent ones under the loss only.
function eventTraces(plot) {
  const traces = [];
  for (const index of on()) for (const [kind, marks] of Object.entries(RUNS[index].events)) {
    const [, symbol, name, through, high = 0.97] = EVENTS[kind];
    if (view.hidden.includes(kind) || (!through && plot.id !== "loss")) continue;
    const x = xs(marks), base = { type: "scatter", yaxis: "y2", showlegend: false };
    if (through) traces.push({ ...base, mode: "lines", x: x.flatMap((v) => [v, v, null]), y: x.flatMap(() => [0, 1, null]), line: { color: css(name), width: 1, dash: "dot" }, hoverinfo: "skip", meta: { run: index, role: "line", kind } });
    traces.push({ ...base, mode: "markers", x, y: x.map(() => high), name: kind, marker: { symbol, color: css(name), size: x.length > 80 ? 3 : 6 }, text: marks.text.map((text, i) => clean(`${several ? RUNS[index].name + ": " : ""}step ${marks.step[i]}${text ? ", " + text : ""}`)), hovertemplate: `%{text}<extra>${kind}</extra>`, meta: { run: index, role: "event", kind } });
  }
  return traces;
}

// plotly renders a few tags in texts (<b>, <a href>): text from a run must not contain any.
const clean = (text) => (text.length > 120 ? text.slice(0, 119) + "…" : text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll("%{", "% {");
const nameOf = (index) => clean(RUNS[index].name);
const cut = (text) => clean(text.length > 22 ? text.slice(0, 10) + "…" + text.slice(-11) : text);
const clear = (hex, alpha) => hex + Math.round(alpha * 255).toString(16).padStart(2, "0");

function layout(plot, touch) {
  const axis = { gridcolor: css("--grid"), linecolor: css("--line"), zerolinecolor: css("--line"), tickfont: { size: 11, color: css("--soft") }, exponentformat: "B", automargin: true, fixedrange: touch };
  const base = {
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", font: { family: css("--sans"), size: 12, color: css("--ink") }, margin: { l: 48, r: 14, t: 10, b: 34 },
    hovermode: "x unified", hoverdistance: 12, hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { size: 12, color: css("--ink") }, namelength: 24 },
    showlegend: false, dragmode: touch ? false : "zoom", separators: ".,",
  };
  if (plot.id === "split") return { ...base, barmode: "stack", bargap: 0.35, hovermode: "closest", showlegend: true, legend: { orientation: "h", y: -0.28, x: 0, font: { size: 11 }, itemclick: false, itemdoubleclick: false, traceorder: "normal" }, margin: { l: 10, r: 14, t: 6, b: 30 }, xaxis: { ...axis, range: [0, 1], tickformat: ".0%", fixedrange: true }, yaxis: { ...axis, fixedrange: true, autorange: "reversed", visible: several } };
  if (plot.id === "sources") return { ...base, hovermode: "closest", xaxis: { ...axis, fixedrange: true }, yaxis: { ...axis, fixedrange: true, autorange: "reversed", type: "category" }, margin: { ...base.margin, l: 10 } };
  const log = plot.always === "log" || (plot.log && view.log), unit = view.x === "time" ? `running time, ${timeUnit()[1]}` : view.x;
  return {
    ...base,
    xaxis: { ...axis, title: { text: unit, font: { size: 11, color: css("--faint") }, standoff: 4 }, range: view.range ? [...view.range] : undefined, autorange: !view.range, hoverformat: view.x === "time" ? ".2f" : ",d", rangemode: "tozero", zeroline: false },
    yaxis: { ...axis, type: log ? "log" : "linear", dtick: plot.always === "log" && decades() > 2 ? 1 : undefined, exponentformat: log ? "power" : "B", rangemode: plot.zero && !log ? "tozero" : "normal", tickformat: plot.percent ? ".0%" : plot.format, hoverformat: plot.percent ? ".1%" : ".4~g", zeroline: false },
    yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
  };
}

function plotCards() {
  const narrow = PLOTS.filter((plot) => !plot.wide);
  if (narrow.length % 2) narrow.at(-1).wide = true; // no hole in the grid
  return PLOTS.map((plot) => {
    const node = card(plot.title, plot.subtitle, el("div", { class: "plot", id: `plot-${plot.id}` }));
    node.className = `card${plot.wide ? " wide" : ""}${plot.id === "split" ? " short" : ""}`;
    const options = (plot.select || []).map((name) => el("option", { value: name, selected: name === view.score }, name));
    const choose = (event) => { view.score = event.target.value; draw([plot]); };
    if (options.length > 1) node.firstChild.append(el("select", { "aria-label": "which score", onchange: choose }, options));
    return node;
  });
}

async function draw(plots = PLOTS) {
  const touch = matchMedia("(pointer: coarse)").matches; // a finger scrolls the page instead of zooming
  for (const plot of plots) {
    const node = $(`plot-${plot.id}`), traces = plot.own ? plot.traces() : [...plot.traces(), ...eventTraces(plot)];
    await Plotly.react(node, traces, layout(plot, touch), { responsive: true, displayModeBar: false, doubleClick: "reset+autosize" });
    if (!plot.own && !node.dataset.linked) {
      node.dataset.linked = "yes";
      node.on("plotly_relayout", (change) => zoomed(plot, change));
    }
  }
}

// A zoom in one plot zooms all of them; a double click resets all.
function zoomed(from, change) {
  let range = view.range;
  if (Array.isArray(change["xaxis.range"])) range = change["xaxis.range"];
  else if ("xaxis.range[0]" in change) range = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
  else if (change["xaxis.autorange"]) range = null;
  if (String(range) === String(view.range)) return;
  view.range = range;
  for (const plot of PLOTS.filter((other) => !other.own && other !== from)) {
    Plotly.relayout($(`plot-${plot.id}`), range ? { "xaxis.range": [...range] } : { "xaxis.autorange": true });
  }
}
