// The head of the page, the controls above the plots, and how the page starts and reloads.

function header() {
  $("title").replaceChildren(several ? `${RUNS.length} runs` : RUNS[0].name);
  $("state").replaceChildren(...(several ? [] : pill(RUNS[0].status)));
  $("written").textContent = `as of ${when(DATA.written)}${DATA.refresh_seconds ? `, updated every ${DATA.refresh_seconds} s` : ""}`;
  $("runs").replaceChildren(...RUNS.map(runHead));
  $("notes").replaceChildren(...RUNS.flatMap((run) => run.warnings.map((line) => el("p", { class: "note" }, several ? `${run.name}: ` : "", line))));
}

function runHead(run, index) {
  const h = run.headline, { plan, best } = h, off = !isOn(index);
  const toggle = () => { view.off = off ? view.off.filter((name) => name !== run.name) : [...view.off, run.name]; header(); draw(); };
  const name = el("button", { class: "name", type: "button", "aria-pressed": String(!off), title: "show or hide this run", onclick: toggle }, swatch(index), run.name);
  const error = best && finite(best.stderr) ? `± ${best.stderr.toFixed(3)} ` : "";
  return el("section", { class: `run${off ? " off" : ""}`, style: `--colour: ${runColour(index)}` },
    several && el("div", { class: "run-head" }, name, pill(run.status)),
    progress(plan),
    el("dl", { class: "keys" },
      number("step", count(h.step), plan && `of ${count(plan.steps)}`),
      number("tokens", short(h.tokens), plan && `of ${short(plan.tokens)}`),
      number("loss", fixed(h.loss, 4), "nats per token"),
      best && number("best score", fixed(best.bits_per_byte, 4), `${error}bits/byte, step ${count(best.step)}`),
      h.tokens_per_second && number("tokens/s", short(h.tokens_per_second), finite(h.mfu) && `MFU ${(100 * h.mfu).toFixed(1)} %`),
      number("running time", duration(h.running_seconds), plan && plan.seconds_left !== null && `${duration(plan.seconds_left)} left`),
      h.events.skip && number("skipped", count(h.events.skip), "steps; no weight changed"),
      h.steps_void > 0 && number("repeated", count(h.steps_void), "steps, from an earlier checkpoint")));
}

function number(name, value, more) {
  return el("div", {}, el("dt", {}, name), el("dd", {}, value, more && el("small", {}, more)));
}

function pill(status) {
  return [el("span", { class: `pill ${status.kind}` }, status.label), status.why && el("span", { class: "why" }, status.why)];
}

function progress(plan) {
  if (!plan) return el("div", { class: "progress" });
  const bar = el("i", { style: `width: ${100 * plan.done}%` });
  return el("div", { class: "progress", role: "progressbar", "aria-label": "progress", "aria-valuenow": Math.round(100 * plan.done) }, bar);
}

function setTheme() {
  const chosen = remembered("localStorage", "minka-report-theme").theme;
  root.dataset.theme = chosen || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}

function segment(key, choices) {
  const choose = (value) => { view[key] = value; if (key === "x") view.range = null; controls(); draw(); };
  return el("div", { class: "segment", role: "group" }, choices.map(([value, name]) =>
    el("button", { type: "button", "aria-pressed": String(value === view[key]), onclick: () => choose(value) }, name)));
}

function eventChip(kind) {
  const hidden = view.hidden.includes(kind), [sign, , colour] = EVENTS[kind];
  const toggle = () => { view.hidden = hidden ? view.hidden.filter((k) => k !== kind) : [...view.hidden, kind]; controls(); draw(); };
  return el("button", { type: "button", class: "chip", style: `--colour: var(${colour})`, "aria-pressed": String(!hidden), onclick: toggle }, el("i", {}, sign), kind.replace("_", " "));
}

function controls() {
  const kinds = Object.keys(EVENTS).filter((kind) => RUNS.some((run) => run.events[kind]));
  $("controls").replaceChildren(
    segment("x", [["tokens", "tokens"], ["step", "steps"], ["time", "time"]]),
    segment("log", [[false, "linear"], [true, "log"]]),
    has("loss_smooth") ? segment("smooth", [[true, "smooth"], [false, "raw"]]) : "",
    kinds.length ? el("div", { class: "chips" }, el("span", {}, "events"), kinds.map(eventChip)) : "");
}

async function loadPlotly() {
  if (typeof DecompressionStream === "undefined") throw new Error("this browser cannot unpack the plot script (no DecompressionStream); use a newer one");
  const packed = Uint8Array.from(atob($("plotly").textContent), (letter) => letter.charCodeAt(0));
  const script = document.createElement("script");
  script.textContent = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  script.nonce = document.querySelector("script[nonce]").nonce;
  document.head.append(script);
}

// The page of a running run reloads itself and keeps its place. It waits while a finger or a button is down.
function refresh() {
  let busy = 0;
  for (const name of ["pointerdown", "pointermove", "wheel", "keydown", "touchmove"]) addEventListener(name, () => { busy = Date.now(); }, { passive: true });
  addEventListener("pagehide", () => { remember("sessionStorage", KEY, { ...view, scroll: scrollY }); });
  if (DATA.refresh_seconds) setInterval(() => {
    if (document.visibilityState === "visible" && Date.now() - busy > 1500) location.reload();
  }, 1000 * DATA.refresh_seconds);
}

async function startPage() {
  setTheme();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { setTheme(); draw(); });
  $("theme").addEventListener("click", () => {
    remember("localStorage", "minka-report-theme", { theme: root.dataset.theme === "dark" ? "light" : "dark" });
    setTheme();
    draw();
  });
  header();
  controls();
  $("plots").style.setProperty("--rows", RUNS.length + 1);
  $("plots").append(...plotCards());
  if (RUNS.some((run) => run.steps > DATA.points)) $("plots").append(el("p", { class: "why wide" }, `Curves of more than ${count(DATA.points)} points are thinned: of each stretch the minimum and the maximum are drawn, so no spike is lost. ledger.jsonl has all points.`));
  $("tables").append(...[lineageCard(), checkpointCard(), planCard(), eventCard(), configCard(), provenanceCard(), sampleCard()].filter(Boolean));
  if ("scrollRestoration" in history) history.scrollRestoration = "manual";
  scrollTo(0, view.scroll);
  refresh();
  try {
    await loadPlotly();
    await draw();
  } catch (error) {
    $("failed").hidden = false;
    $("failed").textContent = `The plots could not be drawn: ${error.message}`;
    throw error;
  }
  root.dataset.drawn = String(Math.round(performance.now()));
}

startPage();
