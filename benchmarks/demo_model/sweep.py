"""Sweep skip guidance over the demo's model: all layers, modes and scales, then a final with fresh noise.

    python -m benchmarks.demo_model.sweep            # coarse: many settings, few clips
    python -m benchmarks.demo_model.sweep --final    # the best settings of it, many clips, another seed

Every cell (one setting) is kept in --work when it is done, and never computed twice: interrupt and repeat at will, or
run two processes with --part 0/2 and --part 1/2. Whoever finds all cells done writes the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import stg_hooks as stg
from benchmarks.demo_model import digits
from stg_hooks import demo
from stg_hooks.demo import judge
from stg_hooks.modes.modes import MODES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
WEIGHTS = Path(demo.__file__).parent / "weights"
MEASURES = tuple(judge.MEASURES)
REFERENCE = 2000
RESAMPLES = 200
LAYERS = [(0,), (1,), (2,), (3,), (4,), (5,), (6,), (7,), (4, 5), (5, 6), (6, 7), (4, 5, 6), (5, 6, 7), (3, 4, 5, 6)]


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
    """One setting. Without a mode it is the plain pipeline."""

    guidance_scale: float
    steps: int
    mode: str = ""
    layers: tuple[int, ...] = ()
    scale: float = 0.0
    start: float = 0.0
    stop: float = 1.0
    rescale: float = 0.0

    @property
    def name(self) -> str:
        """Describe the setting to a reader."""
        words = ["no CFG" if self.guidance_scale == 1 else f"CFG {self.guidance_scale:g}", f"{self.steps} steps"]
        if self.mode:
            layers = f"layer{'s' * (len(self.layers) > 1)} {'+'.join(map(str, self.layers))}"
            words[0] += f" + STG {layers}, {self.mode}, scale {self.scale:g}"
        words += [f"from {self.start:.0%}"] if self.start > 0 else []
        words += [f"until {self.stop:.0%}"] if self.stop < 1 else []
        words += [f"rescale {self.rescale:g}"] if self.rescale else []
        return ", ".join(words)

    @property
    def plain(self) -> Cell:
        """The same setting without skip guidance."""
        return Cell(self.guidance_scale, self.steps)

    def settings(self) -> dict[str, Any]:
        """Return what the demo needs to sample like this."""
        return {name: getattr(self, name) for name in ("layers", "mode", "scale", "guidance_scale", "steps")}

    def applied(self, pipe: Any) -> AbstractContextManager[Any]:
        """Guide the pipeline by this setting."""
        if not self.mode:
            return nullcontext()
        names = ("scale", "mode", "start", "stop", "rescale")
        return stg.apply(pipe, layers=list(self.layers), **{name: getattr(self, name) for name in names})


class Bench:
    """Sample and grade cells, all from the same noise and conditions, and keep what was found."""

    def __init__(self, work: Path, phase: str, count: int, seed: int, batch: int) -> None:
        self.work, self.count, self.seed, self.batch = work, count, seed, batch
        self.pipe, self.grader = demo.load(), judge.load()
        # Results of other weights, seeds or numbers of clips must not be mixed up with these.
        self.weights = _fingerprint()
        self.stamp = f"{phase}-{count}-{seed}-{self.weights}"
        self.journal = work / f"{self.stamp}.jsonl"
        work.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(1_000_003)  # not a seed that training uses
        self.reference = judge.look(digits.draw(REFERENCE, generator)[0], self.grader)[1]
        generator.manual_seed(2_000_003 + seed)
        self.real, self.labels = digits.draw(count, generator)
        self.noise = torch.randn(count, 48, 6, 4, 4, generator=generator)

    def done(self) -> dict[Cell, dict[str, Any]]:
        """Read the cells that are finished."""
        if not self.journal.exists():
            return {}
        lines = [line for line in self.journal.read_text().splitlines() if line.endswith("}")]
        return {cell_of(row.pop("cell")): row for row in map(json.loads, lines)}

    def tensors(self, cell: Cell) -> dict[str, Tensor]:
        """Read what the judge saw: features (N, 96), hits (N, 2) and grain (N,)."""
        found: dict[str, Tensor] = load_file(self._path(cell))
        return found

    def sample(self, cell: Cell, tick: Callable[[int], object]) -> Tensor:
        """Generate one clip per label, always from the same noise."""
        parts = []
        with cell.applied(self.pipe):
            for start in range(0, self.count, self.batch):
                labels, noise = self.labels[start : start + self.batch], self.noise[start : start + self.batch]
                call = demo.inputs(labels) | {"num_inference_steps": cell.steps}
                result = self.pipe(**call, guidance_scale=cell.guidance_scale, latents=noise)
                parts.append(demo.to_clips(result.frames))
                tick(len(labels))
        return torch.cat(parts)

    def run(self, cell: Cell, tick: Callable[[int], object]) -> None:
        """Sample one cell, grade it and write it down."""
        started = time.process_time()
        video = self.sample(cell, tick)
        seconds = (time.process_time() - started) / self.count
        found = self.grade(video)
        partial = self._path(cell).with_suffix(f".{os.getpid()}.partial")
        save_file(found, partial)
        partial.replace(self._path(cell))
        row = {"cell": dataclasses.asdict(cell), **self.measure(found), "cpu_seconds_per_clip": round(seconds, 4)}
        with self.journal.open("a") as file:  # one short write: two processes may share the file
            file.write(json.dumps(row) + "\n")

    def grade(self, video: Tensor) -> dict[str, Tensor]:
        """Let the judge look at clips."""
        seen, features = judge.look(video, self.grader)
        hits = judge.grade(seen, self.labels)
        return {"features": features, "hits": torch.stack(list(hits.values()), dim=1), "grain": judge.grain(video)}

    def measure(self, found: dict[str, Tensor]) -> dict[str, Any]:
        """Turn what the judge saw into rates with 95 % intervals, the Frechet distance and the mean grain."""
        rates = {name: _wilson(hits) for name, hits in zip(MEASURES, found["hits"].unbind(dim=1), strict=True)}
        distance = judge.frechet_distance(found["features"], self.reference)
        return rates | {"frechet_distance": round(distance, 4), "grain": round(found["grain"].mean().item(), 3)}

    def compare(self, cell: Cell, base: Cell) -> dict[str, list[float]]:
        """Compute cell - base with 95 % intervals, clip by clip: both started from the same noise."""
        ours, theirs = self.tensors(cell), self.tensors(base)
        grain = ours["grain"].double() - theirs["grain"].double()
        changes = {"grain": _interval(grain.mean().item(), grain.std().item() / math.sqrt(self.count))}
        for index, name in enumerate(MEASURES):
            change = ours["hits"][:, index].double() - theirs["hits"][:, index].double()
            changes[name] = _interval(change.mean().item(), change.std().item() / math.sqrt(self.count))

        def distances(rows: Tensor) -> float:
            return judge.frechet_distance(ours["features"][rows], self.reference) - judge.frechet_distance(
                theirs["features"][rows], self.reference
            )

        generator = torch.Generator().manual_seed(0)
        drawn = [distances(torch.randint(self.count, (self.count,), generator=generator)) for _ in range(RESAMPLES)]
        spread = torch.tensor(drawn).std().item()
        return changes | {"frechet_distance": _interval(distances(torch.arange(self.count)), spread)}

    def floor(self) -> dict[str, Any]:
        """Measure as many fresh real clips of the same conditions: what is sampled can hardly do better."""
        return self.measure(self.grade(self.real))

    def compute(self, cell: Cell) -> float:
        """Count the floating-point operations of one clip, without the checks that a first call makes."""
        with cell.applied(self.pipe):
            for _ in range(2):
                with FlopCounterMode(display=False) as counter:
                    call = demo.inputs(self.labels[:1]) | {"num_inference_steps": cell.steps}
                    self.pipe(**call, guidance_scale=cell.guidance_scale, latents=self.noise[:1])
        return float(counter.get_total_flops())

    def _path(self, cell: Cell) -> Path:
        text = "_".join(str(value) for value in dataclasses.astuple(cell))
        return self.work / f"{self.stamp}-{text}.safetensors"


def _fingerprint() -> str:
    """Tell weights apart."""
    files = ("config.json", "judge.safetensors", "transformer.safetensors")
    return hashlib.sha256(b"".join((WEIGHTS / name).read_bytes() for name in files)).hexdigest()[:16]


def _wilson(hits: Tensor) -> list[float]:
    """Give a rate and its 95 % interval (Wilson)."""
    n, rate, z = len(hits), hits.double().mean().item(), 1.96
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return [round(value, 5) for value in (rate, max(0.0, middle - half), min(1.0, middle + half))]


def _interval(value: float, error: float) -> list[float]:
    """Give a value and its 95 % interval (normal)."""
    return [round(value + z * error, 5) for z in (0, -1.96, 1.96)]


def coarse_cells(options: argparse.Namespace) -> list[Cell]:
    """List the settings of the sweep: no STG at several CFG scales, and every layer, mode and scale."""
    plain = [Cell(other, options.steps) for other in options.guidance]
    return plain + [
        dataclasses.replace(base, mode=mode, layers=layers, scale=scale)
        for base in plain[: options.guided]
        for mode in options.modes
        for layers in options.layers
        for scale in options.scales
    ]


def final_cells(chosen: Sequence[Cell], few: Sequence[int]) -> list[Cell]:
    """List the settings to measure well; the first of the chosen is the demo's.

    Beside the chosen: the plain pipeline at as many steps, and at more, which cost as much or more; other steps; CFG,
    also at half as many steps, which cost as much; and what may keep the background smoother (rescale, half the scale,
    guidance in the first or in the last steps only).
    """
    first = chosen[0]
    replace = dataclasses.replace
    more = (first.steps + 1, round(1.5 * first.steps), 2 * first.steps)
    plain = [first.plain, *(replace(first.plain, steps=steps) for steps in more)]
    others = [one for steps in few for one in (replace(first.plain, steps=steps), replace(first, steps=steps))]
    with_cfg = replace(first, guidance_scale=2.0)
    cfg = [with_cfg.plain, with_cfg, replace(with_cfg.plain, steps=first.steps // 2)]
    smoother = [{"rescale": 0.7}, {"scale": first.scale / 2}, {"stop": 0.5}, {"stop": 0.8}, {"start": 0.4}]
    return [*plain, *chosen, *others, *cfg, *(replace(first, **change) for change in smoother)]


def ranked(rows: Sequence[dict[str, Any]]) -> list[Cell]:
    """Order the settings with STG: most clips with both digits right, of those whose Frechet distance is not worse.

    Worse means that the whole interval of its change lies above 0. Ties go to the smaller distance.
    """
    fit = [row for row in rows if row.get("mode") and row["against_plain"]["frechet_distance"][1] <= 0]
    return [cell_of(row) for row in sorted(fit, key=lambda row: (-row["right"][0], row["frechet_distance"]))]


def cell_of(row: dict[str, Any]) -> Cell:
    """Return the setting of a row of the report."""
    values = {field.name: row[field.name] for field in dataclasses.fields(Cell)}
    return Cell(**values | {"layers": tuple(values["layers"])})


def layers_of(text: str) -> tuple[int, ...]:
    """Read layers that are skipped together."""
    return tuple(map(int, text.split(",")))


def compute_all(bench: Bench, cells: Sequence[Cell], part: tuple[int, int]) -> bool:
    """Compute what is missing of this process's part.

    Returns:
        Whether all cells of all parts are done.
    """
    done = bench.done()
    # Dear cells first, dealt to and fro, so that the parts end at about the same time.
    order = sorted(cells, key=lambda cell: -cell.steps * (1 if cell.guidance_scale == 1 else 2) - bool(cell.mode))
    index, parts = part
    turns = [*range(parts), *reversed(range(parts))]
    todo = [cell for place, cell in enumerate(order) if turns[place % len(turns)] == index and cell not in done]
    with tqdm(total=sum(bench.count * cell.steps for cell in todo), unit="step", smoothing=0.05) as bar:
        for cell in todo:
            bar.set_description(cell.name)
            bench.run(cell, lambda count, cell=cell: bar.update(count * cell.steps))  # type: ignore[misc]
    return set(cells) <= set(bench.done())


def report(bench: Bench, cells: Sequence[Cell]) -> dict[str, Any]:
    """Collect cells, compared with the same setting without STG; those without STG with the plain pipeline."""
    done = bench.done()
    base = cells[0]
    unit = bench.compute(base)
    rows = []
    for cell in tqdm(cells, desc="comparing"):
        row = {"name": cell.name, "role": "plain" if cell == base else "", **dataclasses.asdict(cell), **done[cell]}
        row["compute"] = round(bench.compute(cell) / unit, 3)
        row["against_plain"] = None if cell == base else bench.compare(cell, cell.plain if cell.mode else base)
        rows.append(row)
    real = {"name": "real clips", "role": "real", "compute": None, **bench.floor()}
    return {
        "clips": bench.count,
        "real_clips": REFERENCE,
        "seed": bench.seed,
        "weights": bench.weights,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "rows": [*rows, real],
    }


def table(report: dict[str, Any]) -> str:
    """Write the rows of a report in Markdown."""
    lines = [
        "| setting | compute | right | change | kept | change | Fréchet distance | change | grain |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in report["rows"]:
        against = row.get("against_plain")
        cells = [row["name"], "" if row["compute"] is None else f"{row['compute']:.2f}"]
        for measure in MEASURES:
            cells.append("{:.1f} ({:.1f}–{:.1f})".format(*(100 * value for value in row[measure])))
            cells.append(
                "{:+.1f} ({:+.1f} … {:+.1f})".format(*(100 * value for value in against[measure])) if against else ""
            )
        cells.append(f"{row['frechet_distance']:.2f}")
        cells.append("{:+.2f} ({:+.2f} … {:+.2f})".format(*against["frechet_distance"]) if against else "")
        lines.append(f"| {' | '.join(cells)} | {row['grain']:.1f} |")
    return "\n".join(lines)


def document(results: dict[str, Any]) -> str:
    """Write the results in Markdown."""
    parts = [
        """# Skip guidance on the demo's model

Made by `python -m benchmarks.demo_model.sweep`; do not edit. *Right*: % of clips in which the shipped judge reads both
digits as asked for in every frame. *Kept*: % in which it reads the same in every frame. Every row starts from the same
noise and conditions. Intervals are 95 %: Wilson for rates, paired for changes (for the Fréchet distance by a paired
bootstrap over clips). A change is against the same setting without STG, or, for rows without, against the first row.
The Fréchet distance (lower is better) is on the judge's features against 2,000 real clips; it is biased upwards for few
clips, so compare it with the row of real clips, the floor for as many, and only within a table. Grain is the noise of
the background, of 255. Compute counts floating-point operations, the first row being 1."""
    ]
    if "final" in results:
        final = results["final"]
        parts += [
            f"## Final: {final['clips']:,} clips a row, noise and conditions that the sweep has not seen",
            table(final),
            f"The demo's setting, chosen by the sweep below, is {final['guided']}.",
        ]
    if "sweep" in results:
        sweep = results["sweep"]
        parts += [
            f"## Sweep: {sweep['clips']:,} clips a row",
            "Few clips and many rows: the best of them are lucky too. It only serves to choose what the final has.",
            table(sweep),
        ]
    return "\n\n".join(parts) + "\n"


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def part_of(text: str) -> tuple[int, int]:
    """Read "0/2": the first of two parts."""
    index, _, count = text.partition("/")
    if not 0 <= int(index) < int(count):
        raise ValueError(text)
    return int(index), int(count)


def options_from_command_line() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--final", action="store_true", help="measure the best settings of the sweep well")
    parser.add_argument("--keep", type=int, default=2, help="for --final: how many of the sweep's best (default: 2)")
    parser.add_argument("--clips", type=int, help="clips per cell (default: 128, with --final 1024)")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--few", type=int, nargs="*", default=[4, 8, 12], help="for --final: other steps, too")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0], help="CFG scales without STG")
    parser.add_argument("--guided", type=int, default=1, help="the first N CFG scales are swept with STG, too")
    parser.add_argument("--layers", type=layers_of, nargs="+", default=LAYERS, help="4,5 skips both")
    parser.add_argument("--modes", nargs="+", default=["residual", "attention", "feed-forward"], choices=list(MODES))
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--seed", type=int, default=0, help="of the sweep; the final uses the next one")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", type=part_of, default=(0, 1), metavar="I/N", help="do only every Nth cell")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "demo_sweep", help="where cells are kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--evaluation",
        type=Path,
        default=WEIGHTS / "evaluation.json",
        help="for --final: the summary that the demo shows",
    )
    return parser.parse_args()


def main() -> int:
    """Compute cells; with the last of them, write the results."""
    options = options_from_command_line()
    torch.set_num_threads(options.threads)
    phase = "final" if options.final else "sweep"
    results_file: Path = options.results / "demo_model.json"
    results = json.loads(results_file.read_text()) if results_file.exists() else {}
    count = options.clips or (1024 if options.final else 128)
    bench = Bench(options.work, phase, count, options.seed + options.final, options.batch)
    chosen: list[Cell] = []
    if options.final:
        if "sweep" not in results or results["sweep"]["weights"] != bench.weights:
            raise SystemExit("there is no finished sweep of these weights: run without --final first")
        chosen = [cell_of(row) for row in results["sweep"]["best"][: options.keep]]
    cells = final_cells(chosen, options.few) if options.final else coarse_cells(options)
    cells = list(dict.fromkeys(cells))
    if not compute_all(bench, cells, options.part):
        print("this part is done; the results are written by the part that ends last")
        return 0
    results[phase] = report(bench, cells)
    if options.final:
        results[phase]["settings"] = chosen[0].settings()
        results[phase]["guided"] = chosen[0].name
        rows = [row for row in results[phase]["rows"] if row["role"] != "real"]
        guided = next(row for row in rows if row["name"] == chosen[0].name)
        guided["role"] = "guided"
        same = [row for row in rows if not row["mode"] and row["guidance_scale"] == guided["guidance_scale"]]
        dearer = [row for row in same if row["compute"] >= guided["compute"]]
        min(dearer, key=lambda row: row["compute"])["role"] = "more"  # steps for at least as much compute
        for row in rows:
            if (row["steps"], row["mode"]) == (guided["steps"], "") and row["guidance_scale"] > guided[
                "guidance_scale"
            ]:
                row["role"] = "cfg"
        write(options.evaluation, json.dumps(results[phase], indent=1) + "\n")
    else:
        results[phase]["best"] = [dataclasses.asdict(cell) for cell in ranked(results[phase]["rows"])]
    write(results_file, json.dumps(results, indent=1) + "\n")
    write(options.results / "demo_model.md", document(results))
    print(table(results[phase]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
