// The cards below the plots: plan, checkpoints, events, configuration, provenance, samples.

const AXES = ["pipeline", "replicate", "shard", "context", "tensor"];

function eachRun(part) { // a heading for each run that has the part
  return RUNS.map((run, index) => {
    const inside = part(run, index);
    return inside && [several ? el("h3", {}, label(index)) : null, inside];
  });
}

function planCard() {
  const head = ["steps", "planned", "tokens", "planned", "done", "ends by", "left"], kinds = ["n", "n", "n", "n", "n", "who", "n"];
  const rows = RUNS.map((run, index) => {
    const h = run.headline, plan = h.plan, left = plan && plan.seconds_left !== null ? duration(plan.seconds_left) : "–";
    const row = plan ? [count(h.step), count(plan.steps), short(h.tokens), short(plan.tokens), `${(100 * plan.done).toFixed(1)} %`, plan.end, left] : [count(h.step), "?", short(h.tokens), "?", "–", "–", "–"];
    return several ? [label(index), ...row] : row;
  });
  const from = RUNS.map((run) => run.headline.plan?.seconds_left_from).find(Boolean);
  const files = RUNS.map((run, index) => (run.plan_file === null ? null : [el("h3", {}, label(index), several ? " · " : "", "plan.json"), el("pre", {}, JSON.stringify(run.plan_file, null, 2))]));
  return card("Plan and progress", "as configured", el("div", { class: "body" },
    several ? table(["", ...head], rows, ["who", ...kinds]) : table(head, rows, kinds),
    from ? el("p", { class: "why" }, `Time left: estimated from the ${from}.`) : null, files));
}

function checkpointCard() {
  if (!RUNS.some((run) => run.checkpoints.length)) return null;
  const body = eachRun((run) => {
    if (!run.checkpoints.length) return null;
    const rows = run.checkpoints.map((c) => ({
      class: c.on_disk ? "" : "dim",
      cells: [count(c.step), count(c.tokens), c.size || "–", duration(c.stall_seconds), duration(c.total_seconds), `${c.on_disk ? "yes" : "deleted"}${c.permanent ? ", kept forever" : ""}${c.only_on_disk ? ", not in the ledger" : ""}`],
    }));
    return [table(["step", "tokens", "size", "stall", "total", "on disk"], rows, ["n", "n", "n", "n", "n", ""]),
      run.checkpoints_left_out ? el("p", { class: "why" }, `${count(run.checkpoints_left_out)} older ones are not shown.`) : null];
  });
  return card("Checkpoints", "newest first", el("div", { class: "body" }, body));
}

// Values by "section.key", one column for each run. Of several runs, the values that differ come first.
function settingsTable(id, columns, ignore) {
  const keys = [...new Set(columns.flatMap((column) => Object.keys(column)))];
  const differs = (key) => new Set(columns.map((column) => JSON.stringify(column[key]))).size > 1;
  const unlike = keys.filter((key) => differs(key) && !ignore.includes(key));
  const rows = (wanted) => {
    const out = [];
    let section = "";
    for (const key of wanted) {
      const [first, ...rest] = key.split(".");
      if (first !== section && rest.length) out.push({ class: "section", cells: [first, ...columns.map(() => "")] });
      section = first;
      out.push({ class: several && differs(key) ? "differs" : "", cells: [rest.join(".") || key, ...columns.map((column) => setting(column[key]))] });
    }
    return table(["", ...columns.map((_, index) => (several ? label(index) : ""))], out, ["key", ...columns.map(() => "value")]);
  };
  if (!several) return [rows(keys)];
  const summary = unlike.length ? `${plural(unlike.length, "value")} differ${unlike.length === 1 ? "s" : ""}` : "no value differs";
  return [el("p", { class: "why" }, summary), unlike.length ? rows(unlike) : null, folded(id, "all values", rows(keys))];
}

function configCard() {
  const changed = eachRun((run) => run.changed.length ? table(["changed", "from", "to", "at step"], run.changed.map(([key, old, now, step]) => [key, setting(old), setting(now), count(step)]), ["", "", "", "n"]) : null).filter(Boolean);
  return card("Configuration", "as last started", el("div", { class: "body" }, changed, settingsTable("config", RUNS.map((run) => run.config), ["run.name"])));
}

// A <details> that stays open over a reload.
function folded(key, title, ...inside) {
  return el("details", { open: Boolean(view.open[key]), ontoggle: (event) => { view.open[key] = event.target.open; } }, el("summary", {}, title), inside);
}

function provenanceCard() {
  const columns = RUNS.map((run) => {
    const { layout = {}, time, step, tokens, ...started } = run.started;
    const values = { folder: run.headline.path, ...run.provenance };
    for (const key of Object.keys(values)) if (Array.isArray(values[key])) values[key] = values[key].join(" ");
    if (values.time) values.time = when(values.time);
    for (const [key, value] of Object.entries(started)) values[`last start.${key}`] = value >= 1e4 ? count(value) : value;
    const axes = Object.entries(layout).filter(([key, value]) => AXES.includes(key) && value > 1).map(([key, value]) => `${key} ${value}`);
    if (Object.keys(layout).length) values["last start.layout"] = axes.join(", ") || "one device";
    return values;
  });
  return card("Provenance", "", el("div", { class: "body" }, settingsTable("provenance", columns, ["folder", "time", "command"])));
}

function sampleCard() {
  if (!RUNS.some((run) => run.samples)) return null;
  return card("Samples", "of the newest evaluation", el("div", { class: "body" }, eachRun((run) => run.samples && [
    el("p", { class: "why" }, `step ${count(run.samples.step)}`),
    run.samples.texts.map(([prompt, text]) => el("pre", {}, el("b", {}, prompt), text.trimEnd())),
  ])));
}

function eventCard() {
  const kinds = Object.keys(EVENTS).filter((kind) => RUNS.some((run) => run.events[kind] && EVENTS[kind][3]));
  if (!kinds.length) return null;
  const body = eachRun((run) => {
    const rows = kinds.flatMap((kind) => { const m = run.events[kind]; return m ? m.step.map((step, i) => [step, kind, m.text[i]]) : []; }).sort((a, b) => a[0] - b[0]);
    return rows.length ? table(["step", "event", "description"], rows.map(([step, kind, text]) => [count(step), kind.replace("_", " "), text]), ["n", "who", ""]) : null;
  });
  return card("Events", "", el("div", { class: "body" }, body));
}
