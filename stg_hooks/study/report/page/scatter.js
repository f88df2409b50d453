// Cost against effect: one point per cell, and the front of those that nothing beats.
const SCATTER = { left: 56, right: 16, top: 14, bottom: 44, height: 340 };
const SHAPES = [
  (r) => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`,
  (r) => `M${-r} ${-r}h${2 * r}v${2 * r}h${-2 * r}z`,
  (r) => `M0 ${-1.3 * r}L${1.2 * r} ${0.9 * r}H${-1.2 * r}z`,
  (r) => `M0 ${-1.4 * r}L${1.4 * r} 0L0 ${1.4 * r}L${-1.4 * r} 0z`,
];
const LOWER_IS_BETTER = /clipped|frechet|(^|_)(fid|fvd|loss|error)($|_)/i;

const byCost = cells.filter(isDone).every((cell) => isPlain(cell) || Number.isFinite(cell.cost));
const costOf = (cell) => (byCost ? (isPlain(cell) ? 0 : cell.cost) : cell.seconds);
const costText = byCost ? percent : (value) => `${number(value)} s`;

// How good a value is: larger is better.
const gainOf = (cell) => {
  const value = cell.metrics[state.metric];
  if (state.better === "higher") return value;
  if (state.better === "lower") return -value;
  return (state.better === "kept" ? -1 : 1) * Math.abs(value - (plainCell ? plainCell.metrics[state.metric] : 0));
};

// The points that no other beats: walking from the cheapest, those with a larger gain than all before.
const frontOf = (points) => {
  let best = -Infinity;
  // Nothing keeps what the unguided sample has as well as that sample.
  const sorted = points.filter((cell) => state.better !== "kept" || !isPlain(cell)).sort((a, b) => costOf(a) - costOf(b) || gainOf(b) - gainOf(a));
  return sorted.filter((cell) => gainOf(cell) > best && ((best = gainOf(cell)), true));
};

const shortName = (cell) => (isPlain(cell) ? PLAIN.toLowerCase() : `L${cell.layers.join("+")} × ${number(cell.scale)}`);

const drawScatter = (width) => {
  const box = byId("scatter");
  const points = cells.filter((cell) => isDone(cell) && Number.isFinite(costOf(cell)) && Number.isFinite(cell.metrics[state.metric]));
  if (!points.length) return box.replaceChildren(html("p", { class: "soft" }, "No finished cell has both a cost and this measure."));
  const focused = box.contains(document.activeElement);
  const range = (values, from) => {
    const [low, high] = [Math.min(...values, from ?? Infinity), Math.max(...values)];
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    return [low - room, high + room];
  };
  const [x0, x1] = range(points.map(costOf), 0);
  const [y0, y1] = range(points.map((cell) => cell.metrics[state.metric]));
  const { left, right, top, bottom, height } = SCATTER;
  const x = (value) => left + ((value - x0) / (x1 - x0)) * (width - left - right);
  const y = (value) => height - bottom - ((value - y0) / (y1 - y0)) * (height - top - bottom);
  const at = (cell) => [x(costOf(cell)), y(cell.metrics[state.metric])];

  const picture = svg("svg", { width, height, role: "group", "aria-label": "Cost against effect; the arrow keys go from point to point" });
  for (const value of ticks(x0, x1, width / 90)) {
    picture.append(svg("line", { x1: x(value), x2: x(value), y1: top, y2: height - bottom }));
    picture.append(svg("text", { x: x(value), y: height - bottom + 16, class: "middle" }, costText(value)));
  }
  for (const value of ticks(y0, y1, 6)) {
    picture.append(svg("line", { x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    picture.append(svg("text", { x: left - 6, y: y(value), class: "end" }, number(value)));
  }
  picture.append(svg("text", { x: (left + width - right) / 2, y: height - 8, class: "middle" }, byCost ? "extra compute per guided step" : "seconds per cell"));

  const front = frontOf(points);
  picture.append(svg("polyline", { class: "front", points: front.map((cell) => at(cell).join(",")).join(" ") }));
  const order = [...points].sort((a, b) => costOf(a) - costOf(b) || gainOf(a) - gainOf(b));
  const current = order.includes(state.cell) ? state.cell : order[0];
  for (const cell of order) {
    const kind = Math.max(0, modes.indexOf(cell.mode)) % SHAPES.length;
    const size = isPlain(cell) ? 6 : 4 + (3 * (scales.indexOf(cell.scale) + 1)) / scales.length;
    const point = svg("path", {
      d: SHAPES[isPlain(cell) ? 3 : kind](size), transform: `translate(${at(cell).join(" ")})`, role: "button",
      class: `point ${isPlain(cell) ? "plain" : `kind-${kind}`}${cell === state.cell ? " chosen" : ""}`,
      tabindex: cell === current ? 0 : -1, "data-cell": cell.id,
      "aria-label": `${nameOf(cell)}: ${words(state.metric)} ${number(cell.metrics[state.metric])}, cost ${costText(costOf(cell))}`,
      onclick: () => choose(cell),
    });
    point.append(svg("title", {}, point.getAttribute("aria-label")));
    picture.append(point);
  }
  const taken = [];
  for (const cell of [...(points.includes(state.cell) ? [state.cell] : []), ...[...front].reverse()]) {
    const [px, py] = at(cell);
    const text = shortName(cell);
    const long = 7 * text.length;
    const end = width - right;
    const start = Math.max(left + 4, Math.min(px + 10 + long > end ? px - 10 - long : px + 10, end - long));
    const line = Math.max(top + 12, py - 7);
    if (taken.some(([a, b, l]) => Math.abs(b - line) < 13 && start < a + l && a < start + long)) continue;
    taken.push([start, line, long]);
    picture.append(svg("text", { x: start, y: line, class: "label" }, text));
  }
  const step = { ArrowRight: 1, ArrowDown: -1, ArrowUp: 1, ArrowLeft: -1 };
  picture.addEventListener("keydown", (event) => {
    const here = order.findIndex((cell) => cell.id === event.target.dataset.cell);
    if (event.key === "Enter" || event.key === " ") choose(order[here]);
    else if (event.key in step) choose(order[(here + step[event.key] + order.length) % order.length]);
    else return;
    event.preventDefault();
  });
  const used = modes.length > 1 ? modes.map((mode, index) => html("span", { class: `kind-${index % SHAPES.length}` }, key(index), mode)) : [];
  const plain = points.includes(plainCell) ? [html("span", { class: "plain" }, key(3), PLAIN.toLowerCase())] : [];
  const sizes = scales.length > 1 ? [`larger points: larger scale`] : [];
  box.replaceChildren(picture, html("div", { class: "legend" }, ...used, ...plain, ...sizes));
  if (focused) picture.querySelector('[tabindex="0"]').focus({ preventScroll: true });
};
const key = (index) => svg("svg", { width: 14, height: 14, viewBox: "-7 -7 14 14", "aria-hidden": "true" }, svg("path", { d: SHAPES[index % SHAPES.length](4.5), class: "point" }));

if (sweep) {
  let width = 0;
  drawAtWidth(byId("scatter"), (now) => drawScatter((width = now)));
  setOptions(byId("metric"), data.metrics.map((name) => [name, words(name)]));
  byId("metric").addEventListener("change", (event) => setMetric(event.target.value));
  byId("better").addEventListener("change", (event) => change({ better: event.target.value }));
  watch(() => {
    byId("metric").value = state.metric;
    byId("better").value = state.better;
    byId("effect").textContent = effectText();
    if (width) drawScatter(width);
  });
}
// Our own measures tell how much there is of something, not whether that is good; damage changes them most.
const CHANGES = ["sharpness", "contrast", "saturation", "flicker", "motion", "difference"];
const betterOf = (metric) => {
  if (data.own.includes(metric)) return LOWER_IS_BETTER.test(metric) ? "lower" : "higher";
  return CHANGES.includes(metric) ? "kept" : LOWER_IS_BETTER.test(metric) ? "lower" : "higher";
};
// The measure that is shown first: the user's, else one that guidance should keep.
const firstMetric = () => [...data.own, "contrast", "flicker", "sharpness", ...data.metrics].find((name) => data.metrics.includes(name)) ?? null;
const effectText = () => ({
  kept: "Best is what stays closest to the unguided samples in this measure: strong changes are often damage. A metric of your own (stg.sweep(metrics=...)) is shown first.",
  further: "Best is what is furthest from the unguided samples, which damage is, too.",
  higher: "Best is the highest value.",
  lower: "Best is the lowest value.",
})[state.better];
const setMetric = (metric) => change({ metric, better: betterOf(metric) });
