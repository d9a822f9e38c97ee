// The lineage graph: a lane for each run, a dot for each event, a curve for each fork.

const LANE = 18, HOLLOW = ["restore", "rewind", "restart", "fallback"];

function lineageCard() {
  const { lanes, rows } = DATA.lineage;
  if (!rows.length) return null;
  const items = rows.flatMap((row, index) => {
    const { name, run } = lanes[row.lane], first = rows[index - 1]?.lane !== row.lane;
    const at = row.kind === "fold" ? "" : `step ${count(row.step)}${row.time ? " · " + when(row.time) : ""}`;
    return [
      first && el("li", { class: "lane" }, name, run === null && el("span", { class: "at" }, "  (not on this page)")),
      el("li", { "data-row": index }, el("b", {}, row.title), " ", el("span", { class: "at" }, at), row.text && el("span", { class: "text" }, row.text)),
    ];
  });
  const holder = el("div", { id: "graph" }, el("ol", { style: `padding-left: ${LANE * lanes.length + 14}px` }, items));
  new ResizeObserver(() => drawGraph(holder)).observe(holder);
  return card("Lineage", "", el("div", { class: "body scroll tall" }, holder));
}

function drawGraph(holder) {
  holder.querySelector("svg")?.remove();
  const { lanes, rows, links } = DATA.lineage;
  const stroke = ({ lane }) => (lanes[lane].run === null ? "var(--faint)" : runColour(lanes[lane].run));
  const path = (d, row) => el("path", { d, fill: "none", stroke: stroke(row), "stroke-width": 2, "stroke-linecap": "round" });
  const dots = rows.map((row, index) => [LANE * row.lane + 8, holder.querySelector(`[data-row="${index}"]`).offsetTop + 14]);
  const forks = links.map(([from, to]) => {
    const [[x1, y1], [x2, y2]] = [dots[from], dots[to]], bend = Math.min(22, y2 - y1);
    return path(`M${x1},${y1} C${x1},${y1 + bend} ${x2},${y1} ${x2},${y1 + bend} L${x2},${y2}`, rows[to]);
  });
  const lines = rows.map((row, index) => {
    const [x, y] = dots[index];
    return rows[index - 1]?.lane === row.lane && [
      path(`M${x},${dots[index - 1][1]} L${x},${y}`, row),
      row.lost && path(`M${x},${y} C${x + 12},${y} ${x + 12},${y - 16} ${x + 2},${y - 16}`, row), // back to an earlier step
    ];
  });
  const circles = rows.map((row, index) => {
    const [cx, cy] = dots[index], fill = HOLLOW.includes(row.kind) ? "var(--card)" : stroke(row);
    return el("circle", { cx, cy, r: row.kind === "fold" ? 2 : 5, fill, stroke: row.kind === "fallback" ? "var(--bad)" : stroke(row), "stroke-width": 2 });
  });
  holder.prepend(el("svg", { width: LANE * lanes.length + 10, height: holder.offsetHeight, "aria-hidden": "true" }, forks, lines, circles));
}
