// Heat maps, layer x noise level, one per measure. One place is read in all of them at once.
const MEASURES = [
  { key: "norm", title: "Strength", note: "‖d‖ / ‖cond‖", from: 0 },
  { key: "cosine", title: "Agreement with CFG", note: "cosine of d and cond − uncond", middle: 0 },
  { key: "high_frequency", title: "Fine detail", note: "share of d in the upper half of spatial frequencies", factor: 100, unit: " %" },
  { key: "temporal", title: "Motion", note: "share of d that differs between frames", factor: 100, unit: " %" },
  { key: "std_ratio", title: "Contrast", note: "std(cond + d) / std(cond)", middle: 1 },
  { key: "cost", title: "Cost", note: "extra compute of a guided step", factor: 100, unit: " %", from: 0, flat: true },
];
const NOISE = {
  flow: "the share of noise in the mixture",
  karras: "its standard deviation in units of the data",
  ddpm: "its standard deviation in units of the data",
  run: "the part of the run that is left",
};
const HEAT = { left: 44, bottom: 22, row: 22, widest: 64 };

// Where a value lies on its scale: -1...1 around the middle of a diverging one, 0...1 on the others.
const heatScale = (measure, values) => {
  const [least, most] = [Math.min(...values), Math.max(...values)];
  if ("middle" in measure) {
    const reach = Math.max(Math.abs(least - measure.middle), Math.abs(most - measure.middle)) || 1;
    return { low: measure.middle - reach, high: measure.middle + reach, at: (value) => (value - measure.middle) / reach };
  }
  const low = measure.from ?? least;
  return { low, high: most, at: (value) => (most > low ? (value - low) / (most - low) : 0.5) };
};
const heatColour = (measure, t) => {
  const mix = (a, b, share) => `color-mix(in oklab, var(${b}) ${(100 * share).toFixed(1)}%, var(${a}))`;
  if ("middle" in measure) return mix("--heat-middle", t < 0 ? "--heat-below" : "--heat-above", Math.abs(t));
  return t < 0.5 ? mix("--heat-0", "--heat-1", 2 * t) : mix("--heat-1", "--heat-2", 2 * t - 1);
};

const heatMap = (measure, rows, layers, levels, point) => {
  const values = new Map(rows.map((row) => [`${row.layer}/${row.noise_level}`, row[measure.key]]));
  const known = [...values.values()].filter(Number.isFinite);
  if (!known.length) return null;
  const text = alike(known, measure.factor, measure.unit);
  // A cost that is the same at all noise levels needs one row only.
  const flat = measure.flat && layers.every((l) => new Set(levels.map((n) => values.get(`${l}/${n}`))).size === 1);
  const shown = flat ? levels.slice(0, 1) : levels;
  const scale = heatScale(measure, known);
  const value = html("output", { class: "reading" });
  const box = html("div", { class: "plot", tabindex: 0, role: "group", "aria-label": `${measure.title}: heat map, read with the arrow keys` });
  const cursor = svg("rect", { class: "cursor", visibility: "hidden" });
  let size = { width: 0, columns: 1 };

  const draw = (width) => {
    const column = Math.min(HEAT.widest, Math.max(5, (width - HEAT.left) / layers.length));
    size = { width, column };
    const inner = HEAT.left + column * layers.length;
    const picture = svg("svg", { width: inner, height: shown.length * HEAT.row + HEAT.bottom, "aria-hidden": "true" });
    shown.forEach((level, y) => {
      const middle = (y + 0.5) * HEAT.row;
      if (!flat) picture.append(svg("text", { x: HEAT.left - 6, y: middle, class: "end" }, number(level)));
      layers.forEach((layer, x) => {
        const v = values.get(`${layer}/${level}`);
        const known = Number.isFinite(v);
        const t = known ? scale.at(v) : 0;
        const rect = svg("rect", { x: HEAT.left + x * column, y: y * HEAT.row, width: column + 0.3, height: HEAT.row + 0.3, class: known ? "" : "unknown" });
        if (known) rect.style.fill = heatColour(measure, t);
        picture.append(rect);
        if (column < 40) return;
        const strong = known && Math.abs(t) > 0.55 ? "strong" : "weak";
        picture.append(svg("text", { x: HEAT.left + (x + 0.5) * column, y: middle, class: `middle ${strong}` }, text(v).replace(measure.unit, "")));
      });
    });
    const every = Math.ceil(24 / column);
    layers.forEach((layer, x) => {
      if (x % every) return;
      picture.append(svg("text", { x: HEAT.left + (x + 0.5) * column, y: shown.length * HEAT.row + 13, class: "middle" }, `${layer}`));
    });
    picture.append(cursor);
    box.replaceChildren(picture);
    mark(heat.place);
  };
  const mark = (place) => {
    if (!place) return;
    const y = flat ? 0 : place.y;
    fill(cursor, { x: HEAT.left + place.x * size.column, y: y * HEAT.row, width: size.column, height: HEAT.row, visibility: "visible" }, []);
    value.textContent = text(values.get(`${layers[place.x]}/${levels[place.y]}`));
  };
  const follow = (event) => {
    const bounds = box.firstElementChild.getBoundingClientRect();
    const x = Math.floor((event.clientX - bounds.left - HEAT.left) / size.column);
    const y = Math.floor((event.clientY - bounds.top) / HEAT.row);
    if (x >= 0 && x < layers.length && y >= 0 && y < shown.length) point({ x, y: flat ? (heat.place?.y ?? 0) : y });
  };
  box.addEventListener("pointermove", follow);
  box.addEventListener("pointerdown", follow);
  box.addEventListener("focus", () => heat.place || point({ x: 0, y: 0 }));
  box.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const within = (value, count) => Math.max(0, Math.min(count - 1, value));
    const { x, y } = heat.place ?? { x: 0, y: 0 };
    point({ x: within(x + step[0], layers.length), y: within(y + step[1], levels.length) });
  });
  drawAtWidth(box, draw);
  const kind = "middle" in measure ? "diverging" : "sequential";
  const legend = html("div", { class: "legend" }, text(scale.low), html("i", { class: kind }), text(scale.high));
  const head = html("div", { class: "head" }, html("h3", {}, measure.title), value);
  const figure = html("figure", { class: "card", "data-measure": measure.key }, head, html("p", { class: "soft" }, measure.note), box, legend);
  return { figure, mark };
};

const heat = { place: null };
const drawProfile = (mode) => {
  const rows = profile.rows.filter((row) => row.mode === mode);
  const layers = [...new Set(rows.map((row) => row.layer))].sort((a, b) => a - b);
  const levels = [...new Set(rows.map((row) => row.noise_level))].sort((a, b) => b - a);
  const names = new Map(profile.layers.map((layer) => [layer.index, layer.name]));
  heat.place = null;
  const place = byId("heat-place");
  place.textContent = "Point at a map to read it";
  const point = (at) => {
    heat.place = at;
    const layer = layers[at.x];
    const name = names.get(layer);
    place.textContent = `Layer ${layer}${name ? ` (${name})` : ""}, noise level ${number(levels[at.y])}`;
    for (const map of maps) map.mark(at);
  };
  const maps = MEASURES.map((measure) => heatMap(measure, rows, layers, levels, point)).filter((map) => map);
  byId("heat").replaceChildren(...maps.map((map) => map.figure));
};

if (profile && profile.rows.length) {
  byId("profile").hidden = false;
  if (profile.noise_kind in NOISE) byId("noise-kind").textContent = ` (${NOISE[profile.noise_kind]})`;
  const modes = [...new Set(profile.rows.map((row) => row.mode))];
  setOptions(byId("profile-mode"), modes.map((mode) => [mode, mode]));
  byId("profile-modes").hidden = modes.length < 2;
  byId("profile-mode").addEventListener("change", (event) => drawProfile(event.target.value));
  drawProfile(modes[0]);
}
