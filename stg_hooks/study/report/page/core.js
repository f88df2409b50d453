// What every part of the page uses: the data, how nodes are made and numbers written, and what is chosen.
const byId = (name) => document.getElementById(name);
const data = JSON.parse(byId("data").textContent);
const { profile, sweep } = data;

const NONE = "–";
const PLAIN = "Unguided";

// Children that are strings become text nodes: nothing that comes from a file is ever read as HTML.
const fill = (node, attributes, children) => {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
};
const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const sign = (text) => text.replace("-", "−");
const number = (value) => (Number.isFinite(value) ? sign(`${Number(value.toPrecision(3))}`) : NONE);
// Write numbers that are read side by side with as many decimals as tell them apart, for example 0.50 beside 0.13.
const alike = (values, factor = 1, unit = "") => {
  const known = values.filter(Number.isFinite).map((value) => factor * value);
  const spread = Math.max(...known) - Math.min(...known) || Math.abs(known[0]) || 1;
  const whole = known.every(Number.isInteger);
  const decimals = whole ? 0 : Math.min(6, Math.max(0, 2 - Math.floor(Math.log10(spread))));
  return (value) => (Number.isFinite(value) ? sign((factor * value).toFixed(decimals)) + unit : NONE);
};
const percent = (value) => (Number.isFinite(value) ? `${number(100 * value)} %` : NONE);
const words = (name) => name[0].toUpperCase() + name.slice(1).replaceAll("_", " ");

const isPlain = (cell) => cell.layers.length === 0;
const isDone = (cell) => cell.status === "done";
const layersText = (layers) => layers.join(" + ");
const nameOf = (cell) =>
  isPlain(cell) ? PLAIN : `${cell.layers.length > 1 ? "Layers" : "Layer"} ${layersText(cell.layers)}, ${cell.mode}, scale ${number(cell.scale)}`;

// Options of a <select>: pairs of value and text.
const setOptions = (select, pairs) => select.replaceChildren(...pairs.map(([value, text]) => html("option", { value }, text)));

// Everything that the reader can choose. Who shows something of it watches for changes.
const state = { cell: null, sample: 0, scale: null, mode: null, metric: null, better: "higher" };
const watchers = [];
const watch = (callback) => watchers.push(callback);
const change = (patch) => {
  Object.assign(state, patch);
  for (const watcher of watchers) watcher(patch);
};

const cells = sweep ? sweep.cells : [];
const plainCell = cells.find((cell) => isPlain(cell)) ?? null;
const samplesOf = new Map(cells.map((cell) => [cell, new Map(cell.samples.map((s) => [`${s.prompt}/${s.seed}`, s]))]));
// A sample names its prompt and its seed by their place in the sweep's lists.
const shown = new Set([...samplesOf.values()].flatMap((samples) => [...samples.keys()])); // of large sweeps not all
const columns = (sweep ? sweep.prompts.flatMap((prompt, p) => sweep.seeds.map((seed, s) => ({ prompt, seed, key: `${p}/${s}` }))) : [])
  .filter(({ key }) => shown.has(key) || !shown.size);
const sampleAt = (cell, column) => (cell && samplesOf.get(cell).get(columns[column].key)) ?? null;

// A cell is chosen from the sheet, the plot, the table or by moving the slider; all of them show it.
const choose = (cell, sample = state.sample) =>
  change({ cell, sample, ...(isPlain(cell) ? {} : { scale: cell.scale, ...(state.mode === "" ? {} : { mode: cell.mode }) }) });

// Draw now and whenever the width of `box` changes.
const drawAtWidth = (box, draw) => {
  let width = 0;
  new ResizeObserver(() => {
    if (box.clientWidth && box.clientWidth !== width) draw((width = box.clientWidth));
  }).observe(box);
};

// Round numbers that cover [low, high] in about `count` steps.
const ticks = (low, high, count) => {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, index) => Number(((first + index) * step).toPrecision(12)));
};

const THEMES = { auto: "dark", dark: "light", light: "auto" };
const setTheme = (theme) => {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = `◐ ${theme}`;
  byId("theme").setAttribute("aria-label", `Theme: ${theme}`);
};
setTheme("auto");
byId("theme").addEventListener("click", () => setTheme(THEMES[document.documentElement.dataset.theme]));

for (const [name, value] of data.facts) byId("facts").append(html("div", {}, html("dt", {}, name), html("dd", {}, value)));
