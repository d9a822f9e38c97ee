// Where the runs come from and how they went on: a lane a run, a dot an event, a curve a fork.

const LANE = 18, DOTS = { start: "fill", restore: "ring", fallback: "cross", rewind: "ring", restart: "ring", stop: "fill", fork: "fill", fold: "small" };

function lineageCard() {
  const graph = DATA.lineage;
  if (!graph.rows.length) return null;
  const seen = new Set(), items = [];
  graph.rows.forEach((row, index) => {
    const lane = graph.lanes[row.lane];
    if (!seen.has(row.lane)) items.push(el("li", { class: "lane" }, lane.name, lane.run === null ? el("span", { class: "at" }, "  (not on this page)") : null));
    seen.add(row.lane);
    items.push(el("li", { "data-row": index }, el("b", {}, row.title), " ", el("span", { class: "at" }, row.kind === "fold" ? "" : `step ${count(row.step)}${row.time ? " · " + when(row.time) : ""}`), row.text ? el("span", { class: "text" }, row.text) : null));
  });
  const list = el("ol", {}, items);
  list.style.paddingLeft = `${LANE * graph.lanes.length + 14}px`;
  const holder = el("div", { id: "graph" }, list);
  new ResizeObserver(() => drawGraph(holder)).observe(holder);
  return card("Lineage", "", el("div", { class: "body scroll tall" }, holder));
}

function svg(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function drawGraph(holder) {
  holder.querySelector("svg")?.remove();
  const { lanes, rows, links } = DATA.lineage;
  const at = (index) => {
    const item = holder.querySelector(`[data-row="${index}"]`);
    return [LANE * rows[index].lane + 8, item.offsetTop + 14];
  };
  const stroke = (lane) => (lanes[lane].run === null ? "var(--faint)" : `var(--run-${lanes[lane].run % 8})`);
  const picture = svg("svg", { width: LANE * lanes.length + 10, height: holder.offsetHeight, "aria-hidden": "true" });
  const path = (d, lane) => picture.append(svg("path", { d, fill: "none", stroke: stroke(lane), "stroke-width": 2, "stroke-linecap": "round" }));
  for (const [from, to] of links) {
    const [x1, y1] = at(from), [x2, y2] = at(to), bend = Math.min(22, y2 - y1);
    path(`M${x1},${y1} C${x1},${y1 + bend} ${x2},${y1} ${x2},${y1 + bend} L${x2},${y2}`, rows[to].lane);
  }
  rows.forEach((row, index) => {
    if (index && rows[index - 1].lane === row.lane) {
      const [x, y1] = at(index - 1), [, y2] = at(index);
      path(`M${x},${y1} L${x},${y2}`, row.lane);
      if (row.lost) path(`M${x},${y2} C${x + 12},${y2} ${x + 12},${y2 - 16} ${x + 2},${y2 - 16}`, row.lane); // back to an earlier step
    }
  });
  rows.forEach((row, index) => {
    const [x, y] = at(index), kind = DOTS[row.kind] || "fill", bad = row.kind === "fallback";
    const fill = kind === "fill" || kind === "small" ? stroke(row.lane) : "var(--card)";
    picture.append(svg("circle", { cx: x, cy: y, r: kind === "small" ? 2 : 5, fill, stroke: bad ? "var(--bad)" : stroke(row.lane), "stroke-width": 2 }));
  });
  holder.prepend(picture);
}
