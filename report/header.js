// The head of the page: title, status and headline numbers of each run, warnings.

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
      best && number("best score", fixed(best.value, 4), `${error}bits/byte, step ${count(best.step)}`),
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
