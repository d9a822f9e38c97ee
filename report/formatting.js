// Numbers, times and settings as text.

const finite = Number.isFinite;
const count = (value) => (finite(value) ? value.toLocaleString("en-US") : "–");
const fixed = (value, digits) => (finite(value) ? value.toFixed(digits) : setting(value ?? undefined));
const compact = new Intl.NumberFormat("en-US", { notation: "compact", maximumSignificantDigits: 3 }); // 1.23M
const short = (value) => (finite(value) ? compact.format(value) : "–");
const when = (time) => new Date(time * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });

function duration(seconds) {
  if (!finite(seconds)) return "–";
  if (seconds < 10) return `${Number(seconds.toPrecision(2))} s`;
  if (seconds < 100) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 100) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

function setting(value) {
  if (value === undefined) return "–";
  if (value === null) return "not set";
  if (value === "") return "(empty)";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}
