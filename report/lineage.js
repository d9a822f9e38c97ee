// The lineage graph: a lane for each run, a dot for each event, a curve for each fork.

const LANE = 18, HOLLOW = ["restore", "rewind", "restart", "fallback"];

function lineageCard() {
  const { lanes, rows } = DATA.lineage;
  if (!rows.length) return null;
  const items = rows.flatMap((row, index) => {
    const { name, run } = lanes[row.lane], first = !index || rows[index - 1].lane !== row.lane;
    const at = row.kind === "fold" ? "" : `step ${count(row.step)}${row.time ? " · " + when(row.time) : ""}`;
    const lane = el("li", { class: "lane" }, name, run === null ? el("span", { class: "at" }, "  (not on this page)") : null);
    const item = el("li", { "data-row": index }, el("b", {}, row.title), " ", el("span", { class: "at" }, at), row.text ? el("span", { class: "text" }, row.text) : null);
    return first ? [lane, item] : [item];
  });
  const list = el("ol", {}, items);
  list.style.paddingLeft = `${LANE * lanes.length + 14}px`;
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
  const stroke = (lane) => (lanes[lane].run === null ? "var(--faint)" : runColour(lanes[lane].run));
  const picture = svg("svg", { width: LANE * lanes.length + 10, height: holder.offsetHeight, "aria-hidden": "true" });
  const path = (d, lane) => picture.append(svg("path", { d, fill: "none", stroke: stroke(lane), "stroke-width": 2, "stroke-linecap": "round" }));
  const dots = rows.map((row, index) => [LANE * row.lane + 8, holder.querySelector(`[data-row="${index}"]`).offsetTop + 14]);
  for (const [from, to] of links) {
    const [[x1, y1], [x2, y2]] = [dots[from], dots[to]], bend = Math.min(22, y2 - y1);
    path(`M${x1},${y1} C${x1},${y1 + bend} ${x2},${y1} ${x2},${y1 + bend} L${x2},${y2}`, rows[to].lane);
  }
  rows.forEach((row, index) => {
    if (!index || rows[index - 1].lane !== row.lane) return;
    const [x, y] = dots[index];
    path(`M${x},${dots[index - 1][1]} L${x},${y}`, row.lane);
    if (row.lost) path(`M${x},${y} C${x + 12},${y} ${x + 12},${y - 16} ${x + 2},${y - 16}`, row.lane); // back to an earlier step
  });
  rows.forEach((row, index) => {
    const [cx, cy] = dots[index], fill = HOLLOW.includes(row.kind) ? "var(--card)" : stroke(row.lane);
    picture.append(svg("circle", { cx, cy, r: row.kind === "fold" ? 2 : 5, fill, stroke: row.kind === "fallback" ? "var(--bad)" : stroke(row.lane), "stroke-width": 2 }));
  });
  holder.prepend(picture);
}
