// The cards below the plots: plan, checkpoints, events, configuration, provenance, samples.

const AXES = ["pipeline", "replicate", "shard", "context", "tensor"];

function eachRun(part) { // a heading for each run that has the part
  return RUNS.map((run, index) => {
    const inside = part(run, index);
    return inside && [several && el("h3", {}, label(index)), inside];
  }).filter(Boolean);
}

function planCard() {
  const head = ["steps", "planned", "tokens", "planned", "done", "ends by", "left"], kinds = ["n", "n", "n", "n", "n", "who", "n"];
  const rows = RUNS.map(({ headline: { step, tokens, plan } }, index) => {
    const row = [count(step), count(plan?.steps), short(tokens), short(plan?.tokens), plan ? `${(100 * plan.done).toFixed(1)} %` : "–", plan?.end ?? "–", duration(plan?.seconds_left)];
    return several ? [label(index), ...row] : row;
  });
  const from = RUNS.map((run) => run.headline.plan?.seconds_left_from).find(Boolean);
  const files = RUNS.map((run, index) => run.plan_file !== null && [el("h3", {}, label(index), several && " · ", "plan.json"), el("pre", {}, JSON.stringify(run.plan_file, null, 2))]);
  return card("Plan and progress", "as configured", body(
    several ? table(["", ...head], rows, ["who", ...kinds]) : table(head, rows, kinds),
    from && el("p", { class: "why" }, `Time left: estimated from the ${from}.`), files));
}

function checkpointCard() {
  const parts = eachRun((run) => {
    const rows = run.checkpoints.map((c) => ({
      class: c.on_disk ? "" : "dim",
      cells: [count(c.step), count(c.tokens), c.size || "–", duration(c.stall_seconds), duration(c.total_seconds), `${c.on_disk ? "yes" : "deleted"}${c.permanent ? ", kept forever" : ""}${c.only_on_disk ? ", not in the ledger" : ""}`],
    }));
    return rows.length && [table(["step", "tokens", "size", "stall", "total", "on disk"], rows, ["n", "n", "n", "n", "n", ""]),
      run.checkpoints_left_out > 0 && el("p", { class: "why" }, `${count(run.checkpoints_left_out)} older ones are not shown.`)];
  });
  return parts.length && card("Checkpoints", "newest first", body(parts));
}

// Values by "section.key", one column for each run. Of several runs, the values that differ come first, and the rest
// is in a <details> that stays open over a reload.
function settingsTable(id, columns, ignore) {
  const keys = [...new Set(columns.flatMap((column) => Object.keys(column)))];
  const differs = (key) => new Set(columns.map((column) => JSON.stringify(column[key]))).size > 1;
  const rows = (wanted) => {
    const out = [];
    let section = "";
    for (const key of wanted) {
      const [first, ...rest] = key.split(".");
      if (first !== section && rest.length) out.push({ class: "section", cells: [first, ...columns.map(() => "")] });
      section = first;
      out.push({ class: several && differs(key) ? "differs" : "", cells: [rest.join(".") || key, ...columns.map((column) => setting(column[key]))] });
    }
    return table(["", ...columns.map((_, index) => label(index))], out, ["key", ...columns.map(() => "value")]);
  };
  if (!several) return rows(keys);
  const unlike = keys.filter((key) => differs(key) && !ignore.includes(key)), n = unlike.length;
  const summary = n ? `${count(n)} ${n === 1 ? "value differs" : "values differ"}` : "no value differs";
  const toggle = (event) => { view.open[id] = event.target.open; };
  return [el("p", { class: "why" }, summary), n && rows(unlike),
    el("details", { open: Boolean(view.open[id]), ontoggle: toggle }, el("summary", {}, "all values"), rows(keys))];
}

function configCard() {
  const changed = eachRun((run) => run.changed.length && table(["changed", "from", "to", "at step"], run.changed.map(([key, old, now, step]) => [key, setting(old), setting(now), count(step)]), ["", "", "", "n"]));
  return card("Configuration", "as last started", body(changed, settingsTable("config", RUNS.map((run) => run.config), ["run.name"])));
}

function provenanceCard() {
  const columns = RUNS.map((run) => {
    const { layout = {}, time, step, tokens, ...started } = run.started;
    const values = { folder: run.headline.path, ...run.provenance };
    for (const key of Object.keys(values)) if (Array.isArray(values[key])) values[key] = values[key].join(" ");
    if (values.time) values.time = when(values.time);
    for (const [key, value] of Object.entries(started)) values[`last start.${key}`] = value >= 1e4 ? count(value) : value;
    const axes = AXES.filter((axis) => layout[axis] > 1).map((axis) => `${axis} ${layout[axis]}`);
    if (Object.keys(layout).length) values["last start.layout"] = axes.join(", ") || "one device";
    return values;
  });
  return card("Provenance", "", body(settingsTable("provenance", columns, ["folder", "time", "command"])));
}

function sampleCard() {
  const parts = eachRun((run) => run.samples && [
    el("p", { class: "why" }, `step ${count(run.samples.step)}`),
    run.samples.texts.map(([prompt, text]) => el("pre", {}, el("b", {}, prompt), text.trimEnd())),
  ]);
  return parts.length && card("Samples", "of the newest evaluation", body(parts));
}

function eventCard() {
  const kinds = Object.keys(EVENTS).filter((kind) => EVENTS[kind][3]);
  const parts = eachRun((run) => {
    const marks = kinds.filter((kind) => run.events[kind]).flatMap((kind) => run.events[kind].step.map((step, i) => [step, kind, run.events[kind].text[i]]));
    const rows = marks.sort((a, b) => a[0] - b[0]).map(([step, kind, text]) => [count(step), kind.replace("_", " "), text]);
    return rows.length && table(["step", "event", "description"], rows, ["n", "who", ""]);
  });
  return parts.length && card("Events", "", body(parts));
}
