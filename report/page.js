// Header, controls, and the order in which all of it comes up.

function setTheme() {
  const chosen = remembered("localStorage", "minka-report-theme", {}).theme;
  root.dataset.theme = chosen || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}

function figure(name, value, more) {
  return [el("div", {}, el("dt", {}, name), el("dd", {}, value, more ? el("small", {}, more) : null))];
}

function runHead(run, index) {
  const f = run.figures, plan = f.plan, best = f.best, state = run.state;
  const off = !isOn(index);
  const toggle = () => { view.off = isOn(index) ? [...view.off, run.name] : view.off.filter((name) => name !== run.name); header(); draw(); };
  const name = el("button", { class: "name", type: "button", "aria-pressed": String(!off), title: "show or hide this run", onclick: toggle }, swatch(index), run.name);
  const error = best && finite(best.stderr) ? `± ${best.stderr.toFixed(3)} ` : "";
  const skipped = (f.events.skip || 0);
  return el("section", { class: `run${off ? " off" : ""}`, colour: runColour(index) },
    several ? el("div", { class: "run-head" }, name, pill(state)) : null,
    plan ? el("div", { class: "progress", role: "progressbar", "aria-label": "done", "aria-valuenow": Math.round(100 * plan.done) }, progress(plan.done)) : el("div", { class: "progress" }),
    el("dl", { class: "keys" },
      figure("step", count(f.step), plan ? `of ${count(plan.steps)}` : ""),
      figure("tokens", short(f.tokens), plan ? `of ${short(plan.tokens)}` : ""),
      figure("loss", fixed(f.loss, 4), "nats a token"),
      best ? figure("best score", fixed(best.value, 4), `${error}bits/byte, step ${count(best.step)}`) : null,
      f.tokens_per_second ? figure("tokens/s", short(f.tokens_per_second), finite(f.mfu) ? `MFU ${(100 * f.mfu).toFixed(1)} %` : "") : null,
      figure("running", duration(f.running_seconds), plan && plan.seconds_left !== null ? `${duration(plan.seconds_left)} left` : ""),
      skipped ? figure("refused", count(skipped), "steps; no weight changed") : null,
      f.steps_void ? figure("done again", count(f.steps_void), "steps, after a return") : null));
}

const pill = (state) => [el("span", { class: `pill ${state.kind}` }, state.label), state.why ? el("span", { class: "why" }, state.why) : ""];

function progress(done) {
  const bar = el("i");
  bar.style.width = `${100 * done}%`;
  return bar;
}

function header() {
  $("title").replaceChildren(several ? `${RUNS.length} runs` : RUNS[0].name);
  $("state").replaceChildren(...(several ? [] : pill(RUNS[0].state)));
  $("written").textContent = `as of ${when(DATA.written)}${DATA.refresh_seconds ? `, again every ${DATA.refresh_seconds} s` : ""}`;
  $("runs").replaceChildren(...RUNS.map(runHead));
}

function notes() {
  const told = [];
  for (const { name, figures } of RUNS) {
    const where = several ? `${name}: ` : "", torn = figures.torn_lines;
    if (torn.length) told.push(`${where}${torn.length === 1 ? "line" : "lines"} ${torn.slice(0, 12).join(", ")}${torn.length > 12 ? " …" : ""} of ledger.jsonl ${torn.length === 1 ? "is" : "are"} cut off or mangled, and left out.`);
    for (const note of figures.notes) told.push(where + note);
  }
  const most = Math.max(...RUNS.map((run) => run.steps)), thinned = RUNS.some((run) => Object.values(run.curves).some((c) => c.value.length < run.steps && c.value.length >= DATA.points / 2));
  $("notes").replaceChildren(...told.map((line) => el("p", { class: "note" }, line)));
  if (most > DATA.points && thinned) $("plots").append(el("p", { class: "why wide" }, `Curves of more than ${count(DATA.points)} points are thinned: of each stretch the least and the greatest value are drawn, so no spike is lost. The whole is in ledger.jsonl.`));
}

function segment(choices, now, choose) {
  const node = el("div", { class: "segment", role: "group" });
  for (const [value, name] of choices) node.append(el("button", { type: "button", "aria-pressed": String(value === now), onclick: () => choose(value) }, name));
  return node;
}

function controls() {
  const again = () => { controls(); draw(); };
  const kinds = Object.keys(EVENTS).filter((kind) => RUNS.some((run) => run.marks[kind]));
  const chip = (kind) => el("button", { type: "button", class: "chip", colour: `var(${EVENTS[kind][2]})`, "aria-pressed": String(!view.hidden.includes(kind)), onclick: () => { view.hidden = view.hidden.includes(kind) ? view.hidden.filter((k) => k !== kind) : [...view.hidden, kind]; again(); } }, el("i", {}, EVENTS[kind][0]), kind.replace("_", " "));
  $("controls").replaceChildren(
    segment([["tokens", "tokens"], ["step", "steps"], ["time", "time"]], view.x, (x) => { view.x = x; view.range = null; again(); }),
    segment([[false, "linear"], [true, "log"]], view.log, (log) => { view.log = log; again(); }),
    has("loss_smooth") ? segment([[true, "smooth"], [false, "raw"]], view.smooth, (smooth) => { view.smooth = smooth; again(); }) : "",
    kinds.length ? el("div", { class: "chips" }, el("span", {}, "events"), kinds.map(chip)) : "");
}

async function loadPlotly() {
  if (typeof DecompressionStream === "undefined") throw new Error("this browser cannot unpack the drawing script (DecompressionStream); take a newer one");
  const text = atob($("plotly").textContent), packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
  const script = document.createElement("script");
  script.textContent = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  script.nonce = document.querySelector("script[nonce]").nonce;
  document.head.append(script);
}

// A page of a run that goes on loads itself again, where the reader is; not while a finger or a button is down.
function refresh() {
  let busy = 0;
  for (const name of ["pointerdown", "pointermove", "wheel", "keydown", "touchmove"]) addEventListener(name, () => { busy = Date.now(); }, { passive: true });
  addEventListener("pagehide", () => { remember("sessionStorage", KEY, { ...view, scroll: scrollY }); });
  if (!DATA.refresh_seconds) return;
  setInterval(() => {
    if (document.visibilityState === "visible" && Date.now() - busy > 1500) location.reload();
  }, 1000 * DATA.refresh_seconds);
}

async function begin() {
  setTheme();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { setTheme(); draw(); });
  $("theme").addEventListener("click", () => {
    remember("localStorage", "minka-report-theme", { theme: root.dataset.theme === "dark" ? "light" : "dark" });
    setTheme();
    draw();
  });
  header();
  controls();
  $("plots").append(...plotCards());
  $("tables").append(...[lineageCard(), checkpointCard(), planCard(), eventCard(), configCard(), provenanceCard(), sampleCard()].filter(Boolean));
  notes();
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

begin();
