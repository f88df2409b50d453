// Cost against effect: one point per cell, and the front of those that nothing beats.
const SCATTER = { left: 56, right: 16, top: 34, bottom: 44, height: 360 };
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
  if (state.better === "none") return [];
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
  picture.append(svg("text", { x: 0, y: 10, class: "title" }, `${words(state.metric)}, mean of the samples`));

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
  // A label stands where it covers no point, no other label and nothing of the line; of less important cells it may miss.
  const spots = order.map((cell) => [...at(cell), 9]);
  front.slice(1).forEach((cell, index) => {
    const [[ax, ay], [bx, by]] = [at(front[index]), at(cell)];
    const parts = Math.ceil(Math.hypot(bx - ax, by - ay) / 4);
    for (let part = 1; part < parts; part++) spots.push([ax + ((bx - ax) * part) / parts, ay + ((by - ay) * part) / parts, 2]);
  });
  const taken = [];
  const isFree = ([start, line], long) =>
    start >= left + 4 && start + long <= width - right && line >= top + 6 && line <= height - bottom - 8 &&
    !spots.some(([sx, sy, r]) => sx + r > start && sx - r < start + long && Math.abs(sy - line) < r + 6) &&
    !taken.some(([other, y, size]) => Math.abs(y - line) < 13 && start < other + size && other < start + long);
  const important = [...(points.includes(state.cell) ? [state.cell] : []), ...[...front].reverse()];
  for (const cell of new Set([...important, ...order])) {
    const [px, py] = at(cell);
    const text = shortName(cell);
    const long = 6.5 * text.length;
    const places = [0, -14, 14, -18, 18, -28, 28].flatMap((dy) =>
      [px + 11, px - 11 - long, ...(dy ? [px - long / 2] : [])].map((start) => [start, py + dy]));
    const place = places.find((one) => isFree(one, long));
    if (!place) continue;
    taken.push([...place, long]);
    picture.append(svg("text", { x: place[0], y: place[1], class: "label" }, text));
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
// Our own measures tell how much there is of something, not whether that is good. Only a metric of the user's judges.
const betterOf = (metric) => (!data.own.includes(metric) ? "none" : LOWER_IS_BETTER.test(metric) ? "lower" : "higher");
// The measure that is shown first: the user's, else one that guidance should keep.
const firstMetric = () => [...data.own, "contrast", "flicker", "sharpness", ...data.metrics].find((name) => data.metrics.includes(name)) ?? null;
// The cell that is shown first: the best by the user's metric, else the middle of the grid.
const firstCell = () => {
  const done = guided.filter(isDone);
  const judged = state.better === "none" ? [] : done.filter((cell) => Number.isFinite(cell.metrics[state.metric]));
  if (judged.length) return judged.reduce((best, cell) => (gainOf(cell) > gainOf(best) ? cell : best));
  const middle = done.filter((cell) => cell.mode === modes[0] && cell.scale === scales[Math.floor(scales.length / 2)]);
  return middle[Math.floor(middle.length / 2)] ?? done[0] ?? plainCell ?? cells[0];
};
const effectText = () => {
  if (state.better === "none") return data.own.length
    ? `This measure does not tell which cell is better; your metric does: ${words(data.own[0])}.`
    : "Nothing measured here tells which cell is better, so no best one is marked, and the cell shown first is merely the middle of the grid. Give a metric of your own: stg.sweep(..., metrics={\"name\": function}).";
  const best = {
    kept: "what stays closest to the unguided samples, which rewards doing little",
    further: "what is furthest from the unguided samples, which damage is, too",
    higher: "the highest value",
    lower: "the lowest value",
  }[state.better];
  return `The line joins the cells that nothing beats at the same or a lower cost (the Pareto front). Best is ${best}.`;
};
const setMetric = (metric) => change({ metric, better: betterOf(metric) });
