// The data, what the reader has chosen (kept over a reload), elements made without HTML, numbers as text.

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const root = document.documentElement;
const $ = (id) => document.getElementById(id);

function remembered(store, key, fallback) {
  try { return { ...fallback, ...JSON.parse(window[store].getItem(key) || "{}") }; } catch { return { ...fallback }; }
}

function remember(store, key, value) {
  try { window[store].setItem(key, JSON.stringify(value)); } catch { /* a browser that keeps nothing */ }
}

const KEY = "minka-report " + location.pathname;
const view = remembered("sessionStorage", KEY, {
  x: "tokens", smooth: true, log: false, off: [], hidden: ["start"], score: "", range: null, scroll: 0, open: {},
});

// el("td", {class: "n"}, "text", node, ...): text stays text, whatever it holds.
function el(tag, attributes = {}, ...inside) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "colour") node.style.setProperty("--colour", value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...inside.flat(Infinity).filter((part) => part !== null && part !== undefined && part !== ""));
  return node;
}

const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const runColour = (index) => `var(--run-${index % 8})`;
const finite = (value) => typeof value === "number" && Number.isFinite(value);
const count = (value) => (finite(value) ? value.toLocaleString("en-US") : "–");
const fixed = (value, digits) => (finite(value) ? value.toFixed(digits) : value === null || value === undefined ? "–" : String(value));
const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

function short(value, unit = "") {
  if (!finite(value)) return "–";
  for (const [size, name] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= size) return `${Number((value / size).toPrecision(3))}${name}${unit}`;
  }
  return `${Number(value.toPrecision(3))}${unit}`;
}

function size(bytes) {
  if (!finite(bytes)) return "–";
  for (const [of, name] of [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) {
    if (bytes >= of) return `${Number((bytes / of).toPrecision(3))} ${name}`;
  }
  return `${bytes} B`;
}

function duration(seconds) {
  if (!finite(seconds)) return "–";
  if (seconds < 10) return `${Number(seconds.toPrecision(2))} s`;
  if (seconds < 100) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 100) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

const when = (time) => new Date(time * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });

function shown(value) {
  if (value === undefined) return "–";
  if (value === null) return "not set";
  if (value === "") return "(empty)";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

function card(title, told, ...inside) {
  return el("section", { class: "card" }, el("div", { class: "head" }, el("h2", {}, title), told ? el("span", {}, told) : null), inside);
}

const swatch = (index) => el("i", { class: "swatch", colour: runColour(index) });
const several = RUNS.length > 1;
const label = (index) => (several ? [swatch(index), " ", RUNS[index].name] : []);
