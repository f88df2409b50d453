"""Ask which cheap measure finds the good layers of the demo's model: profile it, sample a grid, correlate.

    python -m benchmarks.demo_model.choosing             # 49 cells of 96 clips: 40 minutes on a core
    python -m benchmarks.demo_model.choosing --report    # no sampling: report the modes of which all layers are done

Finished cells are kept in --work: interrupt and repeat at will.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor
from tqdm import tqdm

import stg_hooks as stg
from benchmarks.demo_model import choosing_report
from benchmarks.demo_model.sweep import RESULTS, ROOT, Bench, Cell, compute_all, write
from stg_hooks.demo import judge
from stg_hooks.study.metrics import BUILT_IN, DIFFERENCE, difference

OUTCOMES = ("all", "frechet_distance")
"""All three words right, and the Fréchet distance: names as in the rows of `sweep.py`."""
MEASURES = ("norm", "cosine", "high_frequency", "temporal", "std_ratio")
DEPTH = "cost"  # says only where the layer lies: what the other measures have to beat
RESAMPLES = 1000
CLIP_RESAMPLES = 300


class Study(Bench):
    """Keep the clips too: their metrics are compared with the plain cell's."""

    def grade(self, video: Tensor) -> dict[str, Tensor]:
        """Let the judge look at clips, and add them as pictures, (N, F, H, W, 3)."""
        pixels = ((video + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
        return super().grade(video) | {"clips": pixels.contiguous()}

    def metrics(self, cell: Cell, base: Cell) -> dict[str, float]:
        """Compute by how much the metrics of `stg.sweep` change, mean over clips."""
        ours, theirs = (self.tensors(one)["clips"].float().div(255).numpy() for one in (cell, base))
        changes = {
            name: np.mean([metric(a, "") - metric(b, "") for a, b in zip(ours, theirs, strict=True)])  # type: ignore[operator]
            for name, metric in BUILT_IN.items()
        }
        changes[DIFFERENCE] = np.mean([difference(a, b) for a, b in zip(ours, theirs, strict=True)])
        return {name: float(value) for name, value in changes.items()}


def profiled(pipe: Any, layers: Sequence[int], modes: Sequence[str], steps: int, seed: int) -> dict[Any, Any]:
    """Profile as a user would: by (mode, layer), each measure's mean over the run and over each third of its steps."""
    found = stg.profile(pipe, layers=layers, modes=modes, num_inference_steps=steps, seed=seed)
    table = {}
    for mode, layer in itertools.product(modes, layers):
        rows = [row for row in found.rows if (row.mode, row.layer) == (mode, layer)]
        values = {name: float(np.mean([getattr(row, name) for row in rows])) for name in MEASURES}
        for index, part in enumerate(("early", "middle", "late")):
            within = [row for row in rows if 3 * row.step // steps == index]
            values |= {f"{name}, {part}": float(np.mean([getattr(r, name) for r in within])) for name in MEASURES}
        table[mode, layer] = values | {DEPTH: rows[0].cost}
    return table


def ranks(values: Any) -> Any:
    """Rank along the first dimension, centred, of length 1; zeros where all are equal: no order, no correlation."""
    centred = rankdata(values, axis=0) - (len(values) + 1) / 2
    length = np.sqrt((centred**2).sum(axis=0))
    return centred / np.where(length > 0, length, 1)


def spearman(measures: Any, outcomes: Any) -> Any:
    """Compute Spearman's rho of every measure (N, M) with every outcome (N, K): (M, K)."""
    return ranks(measures).T @ ranks(outcomes)


def given(rho: Any, with_outcomes: Any, with_measures: Any) -> Any:
    """Compute partial rank correlations, a third quantity held fixed whose own correlations are given."""
    room = (1 - with_measures[:, None] ** 2) * (1 - with_outcomes[None] ** 2)
    rest = rho - with_measures[:, None] * with_outcomes[None]
    return np.where(room > 1e-9, rest / np.sqrt(np.maximum(room, 1e-9)), 0)


def outcomes_of(study: Study, cells: Sequence[Cell], base: Cell) -> tuple[Any, Any]:
    """Compute the change of both outcomes against the base, (N, 2), and for clips drawn with replacement, (R, N, 2)."""
    generator = torch.Generator().manual_seed(0)
    draws = [torch.arange(study.count)]
    draws += [torch.randint(study.count, (study.count,), generator=generator) for _ in range(CLIP_RESAMPLES)]

    def both(cell: Cell) -> Any:
        found = study.tensors(cell)
        hits, features = found["hits"][:, -1].double(), found["features"]
        distances = [judge.frechet_distance(features[rows], study.reference) for rows in draws]
        return np.array([[hits[rows].mean().item() for rows in draws], distances]).T

    plain = both(base)
    values = np.stack([both(cell) - plain for cell in tqdm(cells, desc="resampling")], axis=1)
    return values[0], values[1:]


def correlate(measures: Any, outcomes: Any, drawn: Any, pairs: Sequence[tuple[str, int]]) -> tuple[Any, Any]:
    """Correlate measures (N, M) with outcomes (N, 2), with intervals and with what chance gives.

    Intervals resample the pairs of mode and layer, and the clips. Chance deals the outcomes to other layers, the same
    in all modes, in every possible way, and takes the largest |rho| of all measures: its median and 95 % quantile.
    """
    depth = np.array([layer for _, layer in pairs])[:, None]
    rho = spearman(measures, outcomes)
    partial = given(rho, spearman(depth, outcomes)[0], spearman(depth, measures)[0])
    random = np.random.default_rng(0)
    boot = []
    for _ in range(RESAMPLES):
        rows = random.integers(len(pairs), size=len(pairs))
        boot.append(spearman(measures[rows], drawn[random.integers(len(drawn))][rows]))
    low, high = np.quantile(boot, [0.025, 0.975], axis=0)
    places = {pair: index for index, pair in enumerate(pairs)}
    layers = sorted({layer for _, layer in pairs})
    a, b = ranks(measures).T, ranks(outcomes)
    largest = []
    for dealt in itertools.permutations(layers):
        to = dict(zip(layers, dealt, strict=True))
        largest.append(np.abs(a @ b[[places[mode, to[layer]] for mode, layer in pairs]]).max(axis=0))
    by_chance = np.mean(np.array(largest)[:, None] >= np.abs(rho)[None] - 1e-9, axis=0)
    found = {"rho": rho, "low": low, "high": high, "given_depth": partial, "p": by_chance}
    return found, np.quantile(largest, [0.5, 0.95], axis=0)


def examine(study: Study, scale: float, modes: Sequence[str], options: argparse.Namespace, first: Any) -> list[Any]:
    """Report one scale: a row per cell, then the correlations over all modes and over each mode alone."""
    base = Cell(options.guidance, options.steps)
    pairs = [(mode, layer) for mode in modes for layer in options.layers]
    cells = [dataclasses.replace(base, mode=mode, layer=layer, scale=scale) for mode, layer in pairs]
    outcomes, drawn = outcomes_of(study, cells, base)
    error = 1.96 * drawn.std(axis=0, ddof=1)
    intervals = np.round(np.stack([outcomes, outcomes - error, outcomes + error], axis=2), 4).tolist()
    rows = [
        {"mode": cell.mode, "layer": cell.layer, "scale": scale}
        | dict(zip(OUTCOMES, interval, strict=True))
        | {"metrics": study.metrics(cell, base)}
        for cell, interval in zip(cells, intervals, strict=True)
    ]
    names = [*first[pairs[0]], *rows[0]["metrics"]]
    table = [first[pair] | row["metrics"] for pair, row in zip(pairs, rows, strict=True)]
    measures = np.array([[values[name] for name in names] for values in table])
    found = []
    for some in [modes, *([mode] for mode in modes)] if len(modes) > 1 else [modes]:
        at = [index for index, (mode, _) in enumerate(pairs) if mode in some]
        result, chance = correlate(measures[at], outcomes[at], drawn[:, at], [pairs[index] for index in at])
        for k, outcome in enumerate(OUTCOMES):
            values = {key: value[:, k].round(3).tolist() for key, value in result.items()}
            entry = {"scale": scale, "modes": list(some), "pairs": len(at), "outcome": outcome}
            entry["largest_by_chance"] = dict(zip(("median", "95 %"), chance[:, k].round(3).tolist(), strict=True))
            entry["measures"] = {
                name: {key: value[i] for key, value in values.items()} | {"sampled": name in rows[0]["metrics"]}
                for i, name in enumerate(names)
            }
            found.append(entry)
    return [rows, found]


def repeated(rows: Sequence[dict[str, Any]], first: Any, weights: str) -> list[dict[str, Any]]:
    """Correlate outcomes and profile with the outcomes of the demo's own sweep: other noise and conditions."""
    sweep = json.loads((RESULTS / "demo_model.json").read_text())["sweep"]
    theirs = {(r.get("mode"), r.get("layer"), r.get("scale")): r.get("against_plain") for r in sweep["rows"]}
    found = []
    for scale, mode in dict.fromkeys((row["scale"], row["mode"]) for row in rows):
        ours = [row for row in rows if (row["scale"], row["mode"]) == (scale, mode)]
        other = [theirs.get((mode, row["layer"], scale)) for row in ours]
        if sweep["weights"] == weights and None not in other:
            a, b = (np.array([[row[name][0] for name in OUTCOMES] for row in some]) for some in (ours, other))
            measures = [list(first[mode, row["layer"]].values()) for row in ours]
            rho = [*spearman(measures, b).round(3).tolist(), np.diag(spearman(a, b)).round(3).tolist()]
            names = [*first[mode, ours[0]["layer"]], "outcome"]
            found.append({"scale": scale, "mode": mode, "rho": dict(zip(names, rho, strict=True))})
    return found


def study_all(study: Study, options: argparse.Namespace) -> dict[str, Any]:
    """Report all that has been sampled; a mode counts where all its layers have been."""
    done = study.done()
    seeds = (options.seed, options.seed + 1)
    first, second = (profiled(study.pipe, options.layers, options.modes, options.steps, seed) for seed in seeds)
    cells, correlations = [], []
    for scale in options.scales:
        wanted = {mode: [c for c in grid(options) if (c.mode, c.scale) == (mode, scale)] for mode in options.modes}
        modes = [mode for mode, some in wanted.items() if set(some) <= set(done)]
        if modes:
            rows, found = examine(study, scale, modes, options, first)
            cells, correlations = cells + rows, correlations + found
    names = [name for name in next(iter(first.values())) if name != DEPTH]
    values = ([[row[name] for name in names] for row in table.values()] for table in (first, second))
    again = dict(zip(names, np.diag(spearman(*values)).round(3).tolist(), strict=True))
    return {
        "clips": study.count,
        "steps": options.steps,
        "guidance_scale": options.guidance,
        "seed": study.seed,
        "weights": study.weights,
        "torch": torch.__version__,
        "plain": done[Cell(options.guidance, options.steps)],
        "real": study.floor(),
        "cells": cells,
        "profile": [{"mode": mode, "layer": layer, **values} for (mode, layer), values in first.items()],
        "profile_again": again,
        "outcome_again": repeated(cells, first, study.weights),
        "correlations": correlations,
    }


def grid(options: argparse.Namespace) -> list[Cell]:
    """List the cells with skip guidance, in the order in which they are sampled."""
    wanted = itertools.product(options.scales, options.modes, options.layers)
    return [Cell(options.guidance, options.steps, mode, layer, scale) for scale, mode, layer in wanted]


def main(arguments: Sequence[str] | None = None) -> None:
    """Sample what is missing, then write the results and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="sample nothing")
    parser.add_argument("--clips", type=int, default=96, help="per cell")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--layers", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--modes", nargs="+", default=["residual", "attention", "feed-forward"])
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 0.5])
    parser.add_argument("--seed", type=int, default=2, help="the demo's sweep and its final used 0 and 1")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "choosing", help="where cells are kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    study = Study(options.work, "choosing", options.clips, options.seed, batch=16)
    if not options.report:
        compute_all(study, [Cell(options.guidance, options.steps)], (0, 1))
        compute_all(study, grid(options), (0, 1))
    results = study_all(study, options)
    write(options.results / "choosing_layers.json", json.dumps(results, indent=1) + "\n")
    write(options.results / "choosing_layers.md", choosing_report.document(results))
    choosing_report.draw(results, options.images)


if __name__ == "__main__":
    main()
