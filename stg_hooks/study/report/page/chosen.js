// The chosen cell: one sample with and without guidance, the code that makes it, and its numbers beside the unguided ones.
const narrow = matchMedia("(max-width: 64rem)");

const showSample = (box, cell) => {
  const sample = sampleAt(cell, state.sample);
  const playable = sample !== null && sample.strip !== null;
  if (!playable) {
    dropFilms(box);
    return box.replaceChildren(html("p", { class: "soft" }, cell?.error ?? "no picture"));
  }
  if (!box.querySelector("canvas")) box.replaceChildren(film());
  showFilm(box.firstElementChild, sample, `${nameOf(cell)}: ${columnText(columns[state.sample])}`);
};

const valuesOf = (cell) => {
  const rows = data.metrics.map((name) => [name, cell.metrics[name], plainCell?.metrics[name]]);
  const head = html("tr", {}, ...["", "Unguided", "Guided", "Change"].map((title) => html("th", { scope: "col" }, title)));
  const body = rows.map(([name, value, plain]) => {
    const text = alike(cells.map((other) => other.metrics[name])); // as in the table
    const both = Number.isFinite(value) && Number.isFinite(plain);
    const delta = both ? `${value > plain ? "+" : ""}${text(value - plain)}` : NONE;
    return html("tr", {}, html("th", { scope: "row" }, words(name)), ...[text(plain), text(value), delta].map((cell) => html("td", {}, cell)));
  });
  const last = [["Extra compute", percent(isPlain(cell) ? 0 : cell.cost)], ["Seconds", number(cell.seconds)]].map(([title, text]) =>
    html("tr", {}, html("th", { scope: "row" }, title), html("td"), html("td", {}, text), html("td")));
  return [html("thead", {}, head), html("tbody", {}, ...body, ...last)];
};

// What makes the shown sample with the reader's own pipeline: imports first, then set-up lines, prompt and noise, then
// the call, whose own lines are the last that is not indented and what follows. A JSON string is a Python string, too.
const codeOf = (cell) => {
  const column = columns[state.sample];
  if (!column || !/\bgenerator\b/.test(cell.code)) return cell.code; // an older sweep's
  const lines = cell.code.split("\n");
  const call = lines.findLastIndex((line) => !line.startsWith(" "));
  const isImport = (line) => /^(import|from) /.test(line);
  const before = lines.slice(0, call);
  const imports = ["import torch", ...(isPlain(cell) ? [] : ["import stg_hooks as stg"]), ...before.filter(isImport)];
  const given = before.filter((line) => !isImport(line));
  if (/\bprompt\b/.test(cell.code)) given.push(`prompt = ${JSON.stringify(column.prompt)}`);
  given.push(`generator = torch.Generator().manual_seed(${column.seed})`);
  return [...imports, "", ...given, ...lines.slice(call)].join("\n");
};

// For stg.apply(pipe, **json.load(file)), and stg-hooks generate --settings.
const settingsOf = ({ layers, scale, mode }) => JSON.stringify({ layers, scale, mode });

const showChosen = () => {
  const cell = state.cell;
  byId("chosen-name").textContent = nameOf(cell);
  byId("sample").value = state.sample;
  showSample(byId("plain"), plainCell);
  showSample(byId("guided"), cell);
  byId("code").textContent = codeOf(cell);
  byId("settings").textContent = settingsOf(cell);
  byId("copy-settings").hidden = isPlain(cell);
  byId("values").replaceChildren(...valuesOf(cell));
};

if (sweep && cells.length) {
  byId("sweep").hidden = false;
  // Beside the rest where there is room, at the foot of the screen where there is none.
  const fold = () => { byId("chosen").open = !narrow.matches; };
  narrow.addEventListener("change", fold);
  fold();
  setOptions(byId("sample"), columns.map((column, index) => [index, columnText(column)]));
  byId("samples").hidden = columns.length < 2;
  byId("sample").addEventListener("change", (event) => change({ sample: Number(event.target.value) }));
  copyOnClick(byId("copy"), byId("code"));
  copyOnClick(byId("copy-settings"), byId("settings"));
  watch(showChosen);
  const metric = firstMetric();
  Object.assign(state, { metric, better: betterOf(metric) });
  const first = firstCell();
  change({ cell: first, scale: isPlain(first) ? (scales[0] ?? null) : first.scale, mode: first.mode && modes.includes(first.mode) ? first.mode : (modes[0] ?? "") });
}
