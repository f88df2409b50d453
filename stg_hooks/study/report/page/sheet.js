// The contact sheet: rows are layers, columns are prompts and seeds, the slider changes the scale of every row.
const guided = cells.filter((cell) => !isPlain(cell));
const scales = [...new Set(guided.map((cell) => cell.scale))].sort((a, b) => a - b);
const modes = [...new Set(guided.map((cell) => cell.mode))];
const rowKey = (cell) => `${cell.mode}/${cell.layers.join("+")}`;
const byPlace = new Map(guided.map((cell) => [`${rowKey(cell)}/${cell.scale}`, cell]));
const sheetRows = [...new Map(guided.map((cell) => [rowKey(cell), cell])).values()];
const tiles = []; // { button, canvas, note, column, cell() }

const cellAt = (row, scale = state.scale) => byPlace.get(`${rowKey(row)}/${scale}`) ?? null;
const columnText = ({ prompt, seed }) => `${prompt}, seed ${seed}`;

const tile = (column, cell) => {
  const canvas = film();
  const note = html("span", { class: "soft" });
  const button = html("button", { type: "button", class: "tile", onclick: () => cell() && choose(cell(), column) }, canvas, note);
  tiles.push({ button, canvas, note, column, cell });
  return button;
};

const fillTile = ({ button, canvas, note, column, cell: find }) => {
  const cell = find();
  const sample = sampleAt(cell, column);
  const playable = sample !== null && sample.strip !== null;
  canvas.hidden = !playable;
  button.disabled = !cell;
  button.setAttribute("aria-pressed", cell !== null && cell === state.cell && column === state.sample);
  if (playable) showFilm(canvas, sample, `${nameOf(cell)}: ${columnText(columns[column])}`);
  if (playable) note.textContent = noteText(sample.metrics[state.metric]);
  else note.textContent = cell ? (isDone(cell) ? "no picture" : cell.status) : "not run";
};

let noteText = number; // of the numbers under the tiles

const drawSheet = () => {
  const box = byId("sheet");
  dropFilms(box);
  tiles.length = 0;
  const head = html("tr", {}, html("td"));
  for (const { prompt, seed } of columns)
    head.append(html("th", { scope: "col", title: prompt }, html("span", { class: "prompt" }, prompt), html("small", {}, `seed ${seed}`)));
  const plain = html("tr", { class: "plain" }, html("th", { scope: "row" }, PLAIN));
  columns.forEach((_, column) => plain.append(html("td", {}, tile(column, () => plainCell))));
  const body = html("tbody");
  for (const row of sheetRows) {
    if (state.mode && row.mode !== state.mode) continue;
    const name = html("th", { scope: "row" }, html("span", {}, html("small", { class: "word" }, row.layers.length > 1 ? "Layers " : "Layer "), layersText(row.layers)));
    if (!state.mode) name.append(html("small", {}, row.mode));
    const line = html("tr", {}, name);
    columns.forEach((_, column) => line.append(html("td", {}, tile(column, () => cellAt(row)))));
    body.append(line);
  }
  box.replaceChildren(html("table", {}, html("thead", {}, head, plain), body));
  box.style.setProperty("--columns", columns.length);
  box.classList.toggle("single", columns.length === 1); // then one row of tiles, not one column
};

const setScale = (index) => {
  const scale = scales[index];
  const chosen = state.cell && !isPlain(state.cell) ? cellAt(state.cell, scale) : null;
  change({ scale, ...(chosen ? { cell: chosen } : {}) });
};

if (sweep) {
  setOptions(byId("mode"), [...(modes.length > 1 ? [["", "all"]] : []), ...modes.map((mode) => [mode, mode])]);
  byId("modes").hidden = modes.length < 2;
  byId("mode").addEventListener("change", (event) => change({ mode: event.target.value }));
  byId("scale").max = Math.max(0, scales.length - 1);
  byId("scale").disabled = scales.length < 2;
  byId("scale").addEventListener("input", (event) => setScale(Number(event.target.value)));
  watch((patch) => {
    byId("scale").value = scales.indexOf(state.scale);
    byId("scale-value").textContent = state.scale === null ? NONE : number(state.scale);
    byId("scale").setAttribute("aria-valuetext", byId("scale-value").textContent);
    byId("mode").value = state.mode;
    if ("mode" in patch && patch.mode !== drawSheet.mode) {
      drawSheet.mode = patch.mode;
      drawSheet();
    }
    noteText = alike(cells.flatMap((cell) => cell.samples.map((sample) => sample.metrics[state.metric])));
    byId("sheet-metric").textContent = state.metric ? `Under each: ${words(state.metric).toLowerCase()}` : "";
    tiles.forEach(fillTile);
  });
}
