// All cells in one table. A heading sorts; a row chooses its cell.
// Layers by number, then those that are named.
const layersOrder = (cell) => cell.layers.map((layer) => (Number.isInteger(layer) ? String(layer).padStart(6, "0") : layer)).join("+");
const numeric = (title, order, factor, unit) => {
  const text = alike(cells.filter(isDone).map(order), factor, unit);
  return { title, order, value: (cell) => text(order(cell)) };
};
const measures = [...new Set([firstMetric(), ...data.metrics])].filter((name) => name !== null)
  .map((name) => numeric(words(name), (cell) => cell.metrics[name]));
const COLUMNS = [
  { title: "Layers", value: (cell) => cell.layers.join("+"), order: layersOrder },
  { title: "Mode", kind: "text", value: (cell) => (isPlain(cell) ? NONE : cell.mode), order: (cell) => (isPlain(cell) ? "" : cell.mode) },
  { title: "Scale", value: (cell) => number(cell.scale), order: (cell) => cell.scale },
  // The measure that counts most comes first: a phone shows it without scrolling.
  ...measures.slice(0, 1),
  numeric("Extra compute", (cell) => (isPlain(cell) ? 0 : cell.cost), 100, " %"),
  ...measures.slice(1),
  numeric("Seconds", (cell) => cell.seconds),
];
const sorting = { column: null, up: true };
const lines = new Map(); // cell -> <tr>

const compare = (a, b) => {
  const missing = (value) => value === null || value === undefined;
  if (missing(a) || missing(b)) return missing(a) - missing(b); // last, whichever way the rest is sorted
  return (a < b ? -1 : a > b ? 1 : 0) * (sorting.up ? 1 : -1);
};
const sortTable = (column) => {
  sorting.up = sorting.column === column ? !sorting.up : true;
  sorting.column = column;
  const body = byId("table").querySelector("tbody");
  const order = COLUMNS[column].order;
  body.append(...[...lines.keys()].sort((a, b) => compare(order(a), order(b))).map((cell) => lines.get(cell)));
  byId("table").querySelectorAll("thead th").forEach((head, index) => {
    if (index === column) head.setAttribute("aria-sort", sorting.up ? "ascending" : "descending");
    else head.removeAttribute("aria-sort");
  });
};

const drawTable = () => {
  const head = html("tr", {}, ...COLUMNS.map(({ title, kind }, index) =>
    html("th", { scope: "col", class: kind }, html("button", { type: "button", onclick: () => sortTable(index) }, title))));
  const body = html("tbody");
  for (const cell of cells.filter(isDone)) {
    const name = html("button", { type: "button", "aria-label": `Choose ${nameOf(cell)}` }, isPlain(cell) ? PLAIN : COLUMNS[0].value(cell));
    const line = html("tr", { "data-cell": cell.id, onclick: () => choose(cell) }, html("th", { scope: "row" }, name),
      ...COLUMNS.slice(1).map((column) => html("td", { class: column.kind }, column.value(cell))));
    lines.set(cell, line);
    body.append(line);
  }
  byId("table").append(html("table", {}, html("thead", {}, head), body));
};

if (sweep) {
  drawTable();
  hintAtOverflow(byId("table"), byId("table-hint"));
  watch(() => {
    for (const [cell, line] of lines) line.classList.toggle("chosen", cell === state.cell);
  });
  const failed = cells.filter((cell) => !isDone(cell));
  byId("failed").hidden = !failed.length;
  byId("failures").append(...failed.map((cell) => html("li", {}, html("b", {}, nameOf(cell)), html("code", {}, cell.error ?? cell.status))));
}
