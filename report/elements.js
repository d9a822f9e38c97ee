// The data, what the reader has chosen, and the elements that the page is built from. None is made from HTML text.

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const several = RUNS.length > 1;
const root = document.documentElement;
const $ = (id) => document.getElementById(id);

function remembered(store, key) {
  try { return JSON.parse(window[store].getItem(key)) || {}; } catch { return {}; }
}

function remember(store, key, value) {
  try { window[store].setItem(key, JSON.stringify(value)); } catch { /* a browser without storage */ }
}

const KEY = "minka-report " + location.pathname;
const view = { // survives a reload
  x: "tokens", smooth: true, log: false, off: [], hidden: ["start"], score: "", range: null, scroll: 0, open: {},
  ...remembered("sessionStorage", KEY),
};

// el("td", {class: "n"}, "text", node, ...): text stays text, whatever is in it.
function el(tag, attributes = {}, ...inside) {
  const drawn = ["svg", "path", "circle"].includes(tag);
  const node = drawn ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...inside.flat(Infinity).filter(Boolean));
  return node;
}

function card(title, subtitle, ...inside) {
  const head = el("div", { class: "head" }, el("h2", {}, title), subtitle && el("span", {}, subtitle));
  return el("section", { class: "card" }, head, inside);
}

const body = (...inside) => el("div", { class: "body" }, inside);

function table(head, rows, kinds = []) {
  const cells = (row, tag) => row.map((cell, i) => el(tag, { class: kinds[i] }, cell));
  const body = rows.map((row) => el("tr", { class: row.class }, cells(row.cells || row, "td")));
  return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, cells(head, "th"))), el("tbody", {}, body)));
}

const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const runColour = (index) => `var(--run-${index % 8})`;
const swatch = (index) => el("i", { class: "swatch", style: `--colour: ${runColour(index)}` });
const label = (index) => (several ? [swatch(index), " ", RUNS[index].name] : []);
